"""From prompts to outputs, and outputs to files: text, PNG, WAV, `outputs.jsonl` and one page to look at."""

import html
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from unitok.document import Document, Part, RawDocument, format_raw_document
from unitok.errors import UserError
from unitok.grammar import Grammar, parse_plan
from unitok.sample.engine import Request, generate
from unitok.sample.sampling import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from unitok.bundle import Unitok


@dataclass
class Output:
    """One continuation.

    Args:
        prompt: the Document that it continues. new: what was generated. ids: the new ids.
    """

    unitok: "Unitok" = field(repr=False)
    prompt: Document
    new: Document
    ids: np.ndarray
    index: int = 0

    @property
    def document(self) -> Document:
        """Prompt and continuation together."""
        return Document(self.prompt.segments + self.new.segments, f"{self.index:06d}")

    @cached_property
    def text(self) -> str:
        """All generated text."""
        return "".join(self.unitok.decode_segment(s) for s in self.new.segments if s.modality == "text")

    @cached_property
    def images(self) -> "list[Tensor]":
        """Generated pictures, float [3, H, W] in [-1, 1]."""
        return [self.unitok.decode_segment(s) for s in self.new.segments if s.modality == "image"]

    @cached_property
    def audios(self) -> "list[Tensor]":
        """Generated sounds, float [C, T] in [-1, 1] at the audio tokenizer's rate."""
        return [self.unitok.decode_segment(s) for s in self.new.segments if s.modality == "audio"]

    def save(self, folder: str | Path) -> RawDocument:
        """Write the whole document's files into a folder; files of the prompt are copied as they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.index:06d}"
        parts: list[Part] = []
        for i, segment in enumerate(self.prompt.segments):
            source = Path(segment.source) if segment.source else None
            if source is not None and source.is_file():
                copy = folder / f"{name}-prompt-{i}{source.suffix}"
                copy.write_bytes(source.read_bytes())
                parts.append(Part(segment.modality, path=copy, role=segment.role, loss=False))
            else:
                one = self.unitok.write_document(Document((segment,)), folder, f"{name}-prompt-{i}")
                parts += [Part(p.type, p.text, p.path, p.role, False) for p in one.content]
        parts += self.unitok.write_document(self.new, folder, name).content
        return RawDocument(name, tuple(parts))


def generate_outputs(
    unitok: "Unitok",
    prompts: list[Document],
    want: str,
    n: int,
    seed: int,
    max_ids: int,
    settings: dict[str, Settings],
    batch_size: int,
    progress: bool,
) -> list[Output]:
    """`Unitok.generate` on documents."""
    for name, value, least in (("n", n, 1), ("batch size", batch_size, 1), ("seed", seed, 0), ("max ids", max_ids, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    decoder, vocab = unitok.need("model"), unitok.vocab
    grammar = Grammar(vocab)
    plan = parse_plan(want, vocab, unitok.audio.frame_rate if unitok.audio else None)
    requests: list[Request] = []
    for prompt in prompts:
        ids = vocab.encode(prompt, eos=False)
        requests += [Request(ids, plan, max_ids, seed, len(requests) + i) for i in range(n)]
    outputs: list[Output] = []
    with tqdm(total=len(requests), desc="sample", unit="output", disable=not progress, mininterval=1.0) as bar:
        for start in range(0, len(requests), batch_size):
            chunk = requests[start : start + batch_size]
            for request, ids in zip(chunk, generate(decoder, grammar, chunk, settings), strict=True):
                prompt = prompts[request.row // n]
                role = prompt.segments[-1].role if prompt.segments else "none"
                outputs.append(Output(unitok, prompt, vocab.decode(ids, role=role), ids, request.row))
            bar.update(len(chunk))
    return outputs


def save_outputs(outputs: list[Output], folder: Path, title: str = "unitok sample") -> None:
    """Write all outputs into a folder: their files, `outputs.jsonl` (a line is the whole document) and `index.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    raws = [output.save(folder) for output in outputs]
    (folder / "index.html").write_text(_page(raws, folder, title))
    partial = folder / "outputs.jsonl.partial"
    partial.write_text("".join(format_raw_document(raw, folder) + "\n" for raw in raws))
    partial.replace(folder / "outputs.jsonl")


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
article{border:1px solid #ddd;border-radius:8px;padding:.8rem 1rem;margin:1rem 0;display:flex;flex-wrap:wrap;gap:1rem;align-items:center}
img{width:160px;border-radius:4px;image-rendering:auto;background:#eee}.given{opacity:.75;border-left:4px solid #bbb;padding-left:.6rem}
.new{border-left:4px solid #2a7;padding-left:.6rem}"""


def _page(raws: list[RawDocument], folder: Path, title: str) -> str:
    """One page with every document: what was given is grey, what was generated green."""
    articles = []
    for raw in raws:
        pieces = []
        for part in raw.content:
            name = part.path.relative_to(folder).as_posix() if part.path else ""
            inner = {
                "text": lambda part=part: html.escape(part.text),
                "image": lambda name=name: f'<img src="{name}" alt="picture">',
                "audio": lambda name=name: f'<audio controls src="{name}"></audio>',
            }[part.type]()
            pieces.append(f'<div class="{"new" if part.loss else "given"}">{inner}</div>')
        articles.append(f"<article>{''.join(pieces)}</article>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>Grey: given. Green: generated.</p>{''.join(articles)}</html>\n"
    )


def settings_from(options: dict[str, Any]) -> dict[str, Settings]:
    """Flags -> settings: `temperature` holds for all modalities, `image_temperature` for one."""
    out = {}
    for modality in ("text", "image", "audio"):
        values = {}
        for key in ("temperature", "top_k", "top_p", "guidance"):
            value = options.get(f"{modality}_{key}")
            value = options.get(key) if value is None else value
            if value is not None:
                values[key] = value
        out[modality] = _checked(Settings(**values))
    return out


def _checked(s: Settings) -> Settings:
    if s.temperature < 0:
        raise UserError(f"--temperature {s.temperature}: it must be 0 or more")
    if s.top_k < 0:
        raise UserError(f"--top-k {s.top_k}: it must be 0 (all) or more")
    if not 0 < s.top_p <= 1:
        raise UserError(f"--top-p {s.top_p}: it must be above 0 and at most 1")
    return s


def read_prompts(path: Path) -> list[RawDocument]:
    """Prompts of an interleaved JSON Lines file; a bad line is an error."""
    from unitok.document import read_raw_documents

    raws = []
    for raw in read_raw_documents(path):
        if isinstance(raw, UserError):
            raise raw
        raws.append(raw)
    if not raws:
        raise UserError(f"{path}: no prompts in it")
    return raws
