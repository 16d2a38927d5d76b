"""Raw data for tests: images, audio, archives and tables, and what `tokenize` makes of them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.document import RawDocument
from unitok.errors import UserError
from unitok.scenes.files import read_scenes

FEATURES = {
    "caption": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "audio": {"_type": "Audio"},
    "kind": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}


def tar_of(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (40, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seed: int = 0, seconds: float = 0.3) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(8000 * seconds))
    soundfile.write(buffer, samples, 8000, format="WAV")
    return buffer.getvalue()


def table_of(rows: list[dict], features: dict = FEATURES) -> pa.Table:
    """A table as Hugging Face `datasets` writes it."""
    file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"caption": pa.string(), "image": file, "audio": file, "kind": pa.int64()}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds[name]) for name in rows[0]], metadata=told))


def write_in_every_format(scenes: Path, out: Path) -> dict[str, Path]:
    """Scenes with their captions, images and audio as a folder, JSON Lines, archives, Parquet and a data set on disk."""
    contents = []
    for row in read_scenes(scenes):
        contents.append((row["id"], row["caption"], scenes / row["image"], scenes / row["audio"]))
    for name in ("folder", "lines", "archives", "tables", "dataset"):
        (out / name).mkdir(parents=True)
    lines, members, rows = [], [], []
    for id, caption, image, audio in contents:
        for file in (image, audio):
            os.link(file, out / "folder" / f"{id}{file.suffix}")
            os.link(file, out / "lines" / f"{id}{file.suffix}")
            members.append((f"{id}{file.suffix}", file.read_bytes()))
        (out / "folder" / f"{id}.txt").write_text(caption + "\n")
        members.append((f"{id}.json", json.dumps({"caption": caption, "url": "http://example.org"}).encode()))
        parts = [
            {"type": "text", "text": caption},
            {"type": "image", "path": f"{id}.png"},
            {"type": "audio", "path": f"{id}.wav"},
        ]
        lines.append(json.dumps({"id": id, "content": parts}))
        media = {name: {"bytes": file.read_bytes(), "path": None} for name, file in (("image", image), ("audio", audio))}
        rows.append({"caption": caption} | media)
    (out / "lines" / "documents.jsonl").write_text("\n".join(lines) + "\n")
    cut = len(members) // 6 * 3
    (out / "archives" / "a-000.tar").write_bytes(tar_of(members[:cut]))
    (out / "archives" / "a-001.tar.gz").write_bytes(tar_of(members[cut:], "w:gz"))
    pq.write_table(table_of(rows), out / "tables" / "part-0.parquet", row_group_size=7)
    with pa.OSFile(str(out / "dataset" / "data-00000-of-00001.arrow"), "wb") as file:
        table = table_of(rows)
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    (out / "dataset" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (out / "dataset" / "dataset_info.json").write_text("{}")
    return {f.name: f for f in sorted(out.iterdir())}


def tokens_of(source: Path | str, out: Path, bundle: Path, **options) -> dict[str, list[int]]:
    """Tokens by document, after `tokenize`."""
    tokenize(Plan(str(source), str(out), str(bundle), **options))
    data = TokenDataset(out)
    assert data.verify() == []
    return {data.document(i).id: data.ids(i).tolist() for i in range(len(data))}


def errors_of(out: Path) -> list[str]:
    return [json.loads(line)["error"] for line in (out / "errors.jsonl").read_text().splitlines()]


def found_in(source: Path | SourceSpec, root: str = "") -> tuple[list[RawDocument], list[str]]:
    """Documents (whose files are read) and refusals."""
    opened = Source(source if isinstance(source, SourceSpec) else SourceSpec(str(source), root=root))
    good, bad = [], []
    for item in opened.items():
        for make in opened.read([item]):
            try:
                raws = make()
                for part in (part for raw in raws for part in raw.content if part.file):
                    part.file.read()
                good += raws
            except UserError as error:
                bad.append(str(error))
    return good, bad


def documents_of(out: Path, unitok) -> dict[str, list[str]]:
    """The documents of a data set by id: their texts, and of images and audio the modality."""
    data = TokenDataset(out)
    return {
        d.id: [unitok.decode(s) if s.modality == "text" else s.modality for s in d.segments]
        for d in map(data.document, range(len(data)))
    }
