"""Every code block of the README and of docs/ is run or checked, in order, each page in a folder of its own.

A command line runs in this process, through `unitok.cli.main`, as `python -m unitok` would. Of `unitok fit` only the length is
changed (`--model.init_args.steps`). A line with an ellipsis, or for several machines, is parsed to its end. Other lines that are not
run are checked for what can be known without running them: a target of the Makefile, an extra of pyproject.toml, a file in the tree.
A block tagged bash or python that is not run as it is has a comment before it, `<!-- not run: the reason -->`.
"""

import contextlib
import glob
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clips import clip
from raw_data import FEATURES, png, tar_of, wav

from unitok.api import Unitok
from unitok.cli import LIGHTNING_VERBS, VERBS, main
from unitok.data.shards import TokenDataset
from unitok.interleaved import raw_document, read_raw_documents
from unitok.media import write_video
from unitok.modalities import Modality, modalities
from unitok.model import Decoder
from unitok.vocab import Vocab

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FEW_STEPS = ("--model.init_args.minutes", "null", "--model.init_args.steps", "6", "--trainer.enable_progress_bar", "false")


def blocks_of(page: Path) -> list[str]:
    """What stands between fences, whatever the fence says."""
    return re.findall(r"^```[^\n]*\n(.*?)^```$", page.read_text(), flags=re.S | re.M)


# ---- Running --------------------------------------------------------------------------------------------------------


def command_lines(block: str) -> Iterator[list[str]]:
    """The words of each command: lines that end with a backslash or within quotes go on; comments are left out."""
    waiting = ""
    for line in block.splitlines():
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # within quotes
            waiting += "\n"
            continue
        waiting = ""
        if words:
            yield [name for word in words for name in (("*" in word and sorted(glob.glob(word))) or [word])]
    assert not waiting, waiting


def ends(action: Callable[[], object]) -> tuple[int, str]:
    """The exit code of an action, and what it writes to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            action()
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def run_command(words: list[str]) -> None:
    """One command line, in this process."""
    if "unitok" in words[1:] or "…" in words:  # torchrun or srun before it, or the rest left to the reader
        verb, *rest = (word for word in words[words.index("unitok") + 1 :] if word != "…")
        assert verb == "fit"
        words = ["unitok", "fit", "--config", "configs/scenes/decoder.yaml", *rest, "--print_config"]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        code, said = done.returncode, done.stderr
    elif words[0] == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            code, said = ends(lambda: runpy.run_path(words[1], run_name="__main__"))
    elif words[0] == "unitok":
        short = FEW_STEPS if words[1] == "fit" and "--print_config" not in words else ()
        code, said = ends(lambda: main([*words[1:], *short]))
    else:
        raise AssertionError(f"no way to run {words}")
    assert code == 0, f"{shlex.join(words)}\n{said[-2000:]}"


def shell(block: str) -> None:
    for words in command_lines(block):
        if words[:2] != ["source", ".venv/bin/activate"]:
            run_command(words)


def python(block: str) -> None:
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def data_module(block: str) -> None:
    """A data module of one's own, in the current folder, trains an image tokenizer."""
    Path("my_module.py").write_text(block)
    run_command(["unitok", "fit", "--config", "configs/scenes/image.yaml", "--data", "my_module.Noise", "--out", "runs/noise"])
    assert list(Path("runs/noise/checkpoints").glob("*.ckpt"))


# ---- Checking what is not run ---------------------------------------------------------------------------------------


def needs_packages(block: str) -> None:
    """Not run: it needs packages of Debian, or hours. Its scripts, configurations and verbs exist."""
    for words in command_lines(block):
        if words[:2] == ["pip", "install"]:
            continue
        assert words[0] == "python" or words[1] in {**VERBS, **LIGHTNING_VERBS}, words
        for word in words[1:]:
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), word


def installs(block: str) -> None:
    """Not run: it fetches. Its extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = list(command_lines(block))
    assert all(words[:2] == ["pip", "install"] for words in lines)
    named = [
        name for words in lines for part in re.findall(r"(?:\.|unitok-lm)\[(.+)\]", " ".join(words)) for name in part.split(",")
    ]
    assert named
    assert set(named) <= set(extras)


def imports(block: str) -> None:
    """Not run: it needs published weights. Only their files are missing, which is the last thing that is looked at."""
    for words in command_lines(block):
        code, said = ends(lambda words=words: main(words[1:]))
        assert (code, said.count("\n")) == (2, 1), said
        assert f"error: {words[3]}: no such file or folder" in said


def needs_files(block: str) -> None:
    """Not run: it needs files that are not here, which is the last thing that is looked at."""
    for words in command_lines(block):
        code, said = ends(lambda words=words: main(words[1:]))
        assert (code, said.count("\n")) == (2, 1), said
        assert any(said.startswith(f"error: {path}") for path in words[2:]), said


def tree(block: str) -> None:
    """Not code: names of files, each in the folder that its line or a line above it names."""
    seen, top, folder = set(), ROOT, ROOT
    for line in block.splitlines():
        head = re.match(r"( *)([\w/]+)/(?: |$)", line)
        if head:
            top, folder = (ROOT / head[2],) * 2 if not head[1] else (top, top / head[2])
        elif re.match(r"  \w+\.py", line):
            folder = top
        seen |= {folder, *(folder / name for name in re.findall(r"\b\w+\.py\b", line))}
    assert len(seen) > 10
    for path in seen:
        assert path.exists(), path
    if "__init__" not in block and "pretrained.py" in block:  # the whole map: nothing is missing in it
        files = {f for f in (ROOT / "unitok").rglob("*.py") if not f.name.startswith("__")}
        assert files <= seen, files - seen


def diagram(block: str) -> None:
    """Not code: what its arrows name is there."""
    owners = {"modality": Modality, "vocab": Vocab}
    named = [label for label in re.findall(r'"([^"]+)"', block) if re.fullmatch(r"[a-z]+(\.[a-z]+)+", label)]
    assert len(named) > 8
    for label in named:
        owner, _, name = label.partition(".")
        there = (
            hasattr(owners[owner], name) if owner in owners else (ROOT / "unitok" / f"{label.replace('.', '/')}.py").exists()
        )
        assert there, label


def rooms_of_diagram(block: str) -> None:
    """Not code: every node but the content is a room of the package."""
    nodes = set(re.findall(r"(\w+)\[", block)) - {"content"}
    assert len(nodes) >= 4
    for name in nodes:
        assert (ROOT / "unitok" / name).is_dir() or (ROOT / "unitok" / f"{name}.py").exists(), name


def test_the_readme_is_short_and_its_rooms_are_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rooms = re.findall(r"`(unitok/[\w/.]+)`", text)
    assert len(rooms) > 8
    for room in rooms:
        assert (ROOT / room).exists(), room


# ---- Data -----------------------------------------------------------------------------------------------------------


def one_document(block: str) -> None:
    """A document in the interleaved format, which a file has on one line."""
    Path("photos").mkdir()
    Path("photos/dog.jpg").write_bytes(png())
    Path("documents.jsonl").write_text(json.dumps(json.loads(block)) + "\n")
    (raw,) = read_raw_documents(Path("documents.jsonl"))
    assert [(part.type, part.role, part.loss) for part in raw.content] == [
        *(("text", "user", False), ("image", "none", False), ("text", "assistant", True))
    ]
    run_command(["unitok", "tokenize", "documents.jsonl", "one", "--bundle", "BUNDLE"])
    assert TokenDataset("one").document(0).id == "7"


def with_a_template(block: str) -> None:
    """On a table of twelve rows, one of them bad, so that all files of a data set are there."""
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 2, "json": {"meta": {"color": "gray"}}} for i in range(12)]
    rows = [row | {"sound": {"bytes": wav(i), "path": None} if i % 3 else None} for i, row in enumerate(rows)]
    rows[5]["image"]["bytes"] = b"no picture"
    file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": FEATURES["image"], "sound": FEATURES["audio"], "label": FEATURES["kind"]}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    meta = pa.struct([("meta", pa.struct([("color", pa.string())]))])
    kinds = {"image": file, "label": pa.int64(), "json": meta, "sound": file}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds.items(), metadata=told)), "cats.parquet")
    shell(block)
    data = TokenDataset("OUT")
    assert [s.modality for s in data.document(0).segments] == ["text", "image", "text"]
    assert [s.modality for s in data.document(1).segments] == ["text", "image", "text", "audio"]
    text = data.document(1).segments[2]
    assert (text.role, len(data)) == ("assistant", 11)


def recipe(block: str) -> None:
    Path("photos").mkdir(exist_ok=True)
    for i in range(8):
        Path(f"photos/{i}.png").write_bytes(png(i, (160, 140)))
    Path("speech").mkdir()
    members = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("wav", wav(i, 0.8)), ("txt", b"a word or two"))]
    Path("speech/a.tar").write_bytes(tar_of(members))
    chats = [{"question": "what?", "image": {"bytes": png(), "path": None}, "answer": "a cat"}, {"question": "why?", "image": None, "answer": "so"}]  # fmt: skip
    told = {b"huggingface": json.dumps({"info": {"features": {"image": FEATURES["image"]}}}).encode()}
    pq.write_table(pa.Table.from_pylist(chats).replace_schema_metadata(told), "chats.parquet")
    Path("mix.yaml").write_text(block)
    run_command(["unitok", "tokenize", "mixed", "--bundle", "BUNDLE", "--recipe", "mix.yaml"])
    data = TokenDataset("mixed")
    kinds = [tuple((s.modality, s.role, s.loss) for s in data.document(i).segments) for i in range(len(data))]
    assert kinds.count((("audio", "user", False), ("text", "assistant", True))) == 4
    assert (("text", "user", False), ("image", "user", False), ("text", "assistant", True)) in kinds
    assert (("text", "user", False), ("text", "assistant", True)) in kinds


def what_a_data_set_holds(block: str) -> None:
    """Not code: names of files, all of which the data set before it has."""
    folder, *names = (line.split()[0] for line in block.splitlines())
    assert {*names} == {f.name for f in Path(folder).iterdir() if not f.name.startswith(".")}


def with_other_programs(block: str) -> None:
    datasets, polars = pytest.importorskip("datasets"), pytest.importorskip("polars")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
        read, frame = (eval(line, {"datasets": datasets, "polars": polars}) for line in block.splitlines())
    assert read["train"].num_rows == frame.height == len(TokenDataset("OUT"))


def from_a_bucket(block: str) -> None:
    """The bucket is a file system in memory."""
    memory = fsspec.filesystem("memory")
    memory.put("OUT", "/bucket/tokens", recursive=True)
    try:
        python(block.replace("s3://", "memory://"))
    finally:
        memory.rm("/bucket", recursive=True)


def export(block: str) -> None:
    """Of a bundle without `span_positions`, which Qwen3 does not have."""
    bundle = Unitok.from_pretrained("BUNDLE")
    bundle.model = Decoder(replace(bundle.model.config, span_positions=0))
    bundle.save_pretrained("plain", overwrite=True)
    shell(block.replace("BUNDLE", "plain"))


def own_values(block: str) -> None:
    """A generation_config.json."""
    Path("config.json").write_text(block)
    shutil.copytree(Path("BUNDLE").resolve(), "own")
    run_command(["unitok", "bundle", "own", "--generation-config", "config.json"])
    assert Unitok.from_pretrained("own").generation_config.to_dict() == json.loads(block)


def in_transformers(block: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    export("unitok export hf-qwen3 BUNDLE OUT")
    found = {"model": transformers.AutoModelForCausalLM.from_pretrained("OUT").eval(), "prompt": torch.tensor([[0]])}
    exec(compile(block, "block", "exec"), found)
    ids = found["ids"][0, 1:].tolist()
    vocab = json.loads(Path("OUT/unitok_ids.json").read_text())
    first, count = (vocab["ranges"]["image"][name] for name in ("first", "count"))
    assert sum(first <= id < first + count for id in ids) == 64  # 8 x 8 codes of one image


STAMPS = {
    "food/fruit/banana": "A banana.", "food/fruit/apple_red": "A red apple.", "food/fruit/lime": "A lime.", "food/pizza": "A pizza.",
    "animals/birds/owl": "An owl.", "animals/birds/crow": "A crow.", "animals/fish/shark": "A shark.", "animals/insects/bee": "A bee.",
    "plants/flower1": "A flower.", "plants/flower2": "A flower.", "town/flags/redflag": "A red flag.", "space/earth": "The planet earth.",
    "space/mars": "The planet Mars.", "symbols/a": "The letter a.", "symbols/e": "The letter e.", "symbols/k": "The letter k.",
}  # fmt: skip


def stamps(block: str) -> None:
    """Copies sixteen stamps as Tux Paint has them: captions with translations, a description and an audio file beside them."""
    for number, (name, caption) in enumerate(STAMPS.items()):
        path = Path("tuxpaint", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(png(number, (60 + 9 * number, 120)))
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Übersetzt.\n")
        path.with_suffix(".dat").write_text("tintable\n")
    path.with_name("without_caption.png").write_bytes(png())
    shell(block.replace("/usr/share/tuxpaint/stamps", "tuxpaint"))
    copied = {file.stem: file.read_text() for split in ("train", "validation") for file in Path("stamps", split).glob("*.txt")}
    assert copied == {name.replace("/", "-"): f"{name.split('/')[0]}: {caption}\n" for name, caption in STAMPS.items()}
    assert 1 <= len(list(Path("stamps/validation").glob("*.png"))) <= 8


def mixture(block: str) -> None:
    """A recipe, in the file that the next block names."""
    Path("stamps.yaml").write_text(block)


def folders(block: str) -> None:
    """Not code: names of files."""
    assert block.startswith("stamps/\n")


def drawing(block: str) -> None:
    """Not code: a diagram of ideas, whose arrows connect what has a name."""
    assert block.startswith("flowchart LR\n")
    assert all(re.fullmatch(r" +\w+ -(- \"[^\"]+\" -)?->? \w+(\[[^\]]+\])?", line) for line in block.splitlines()[1:])


# ---- Pages ----------------------------------------------------------------------------------------------------------


def a_modality(block: str) -> None:
    """A file of `unitok/modalities/`."""
    exec(compile(block, "dice.py", "exec"), {"__name__": "dice"})


def documents_with_dice(block: str) -> None:
    """One document of many."""
    (text, dice), rng = json.loads(block)["content"], np.random.default_rng(0)
    lines = []
    for i in range(40):
        low = i % 2 == 0
        throws = rng.integers(1, 4, 5) if low else rng.integers(4, 7, 5)
        content = [{**text, "text": "low throws" if low else "high throws"}, {**dice, "dice": throws.tolist()}]
        lines.append(json.dumps({"id": str(i), "content": content}) + "\n")
    Path("documents.jsonl").write_text("".join(lines))


#: What is done with each block of each page, in order.
def a_conversation(block: str) -> None:
    """Write the page's example, whose image is one of ours."""
    Path("talk.jsonl").write_text(json.dumps(json.loads(block.replace("photos/dog.jpg", "photo.png"))) + "\n")
    shutil.copyfile(Path("photo.png").resolve(), "copy.png")
    Path("photo.png").unlink()
    Path("copy.png").rename("photo.png")


def a_document(block: str) -> None:
    """The page's example is a document of a part of each kind."""
    (row,) = [json.loads(block)]
    assert [part["type"] for part in row["content"]] == ["image", "text", "box"]
    raw_document(row, Path(), "the page", "1")


BLOCKS: dict[str, list[Callable[[str], None]]] = {
    "docs/add-a-modality.md": [a_modality, documents_with_dice, shell, python],
    "README.md": [shell, shell, shell, installs, shell, shell, shell, python, rooms_of_diagram],
    "docs/data-formats.md": [
        *(one_document, with_a_template, recipe, what_a_data_set_holds, with_other_programs, from_a_bucket)
    ],
    "docs/concepts.md": [drawing],
    "docs/decoder.md": [shell],
    "docs/design.md": [tree, diagram],
    "docs/evaluation.md": [shell, python, shell],
    "docs/fine-tuning.md": [needs_files, shell],
    "docs/conversations.md": [a_conversation, shell, python],
    "docs/grounding.md": [a_document, shell, python, shell, python],
    "docs/serving.md": [installs, installs],
    "docs/video.md": [shell, python, needs_packages],
    "docs/speech.md": [needs_packages, needs_packages],
    "docs/interchange.md": [imports, shell, export, export],
    "docs/own-files.md": [folders, stamps, shell, mixture, shell, shell, shell, python, shell],
    "docs/scaling.md": [shell, shell],
    "docs/generation.md": [shell, python, python, own_values, python, python, python, in_transformers],
    "docs/tokenizers.md": [python, python, imports, imports, shell],
    "docs/training.md": [shell, data_module, shell, shell, shell],
}


@pytest.fixture
def names(tmp_path, monkeypatch, scenes_folder, bundle_folder) -> Path:
    """An empty folder with what the blocks of any page name."""
    for name in ("examples", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("RAW", "SCENES"):
        (tmp_path / name).symlink_to(scenes_folder)
    for name, inside in (("IMAGES", "images"), ("AUDIO", "audio"), ("corpus.txt", "text.txt"), ("photo.png", "images/000003.png")):  # fmt: skip
        (tmp_path / name).symlink_to(scenes_folder / inside)
    (tmp_path / "BUNDLE").symlink_to(bundle_folder)
    (tmp_path / "VIDEOS").mkdir()
    write_video(tmp_path / "VIDEOS" / "bar.mp4", clip(20, 32, 32), 8)
    (tmp_path / "VIDEOS" / "bar.txt").write_text("a bar moves to the right")
    line = {"id": "a", "content": [{"type": "text", "text": "a large red circle"}]}
    for name in ("prompts.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def demo_folder(names, scenes_folder, bundle_folder) -> Path:
    """The same with a demo's scenes and bundle, and another bundle of that name."""
    (names / "runs" / "demo" / "scenes").mkdir(parents=True)
    for inside in ("demo/scenes/train", "demo/scenes/test"):
        shutil.copytree(scenes_folder, names / "runs" / inside)
    for inside in ("demo/bundle", "bundle"):
        shutil.copytree(bundle_folder, names / "runs" / inside)
    return names


def run_page(name: str) -> None:
    blocks = blocks_of(ROOT / name)
    assert len(blocks) == len(BLOCKS[name]), f"{name} has {len(blocks)} code blocks: say in BLOCKS what is done with each"
    for block, action in zip(blocks, BLOCKS[name], strict=True):
        action(block)


def test_every_page_with_code_is_run():
    assert {str(page.relative_to(ROOT)) for page in PAGES if "```" in page.read_text()} == set(BLOCKS)


def test_a_block_of_code_that_is_not_run_says_why():
    tagged = 0
    for page, actions in BLOCKS.items():
        fences = re.findall(
            r"^(?:<!-- not run: ([^\n]+) -->\n\n?)?```([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.S | re.M
        )
        for (reason, tag, block), action in zip(fences, actions, strict=True):
            runs = action not in (installs, imports, needs_packages) and not re.search(
                r"(?:^| )…(?: |$)|^(?:make|srun|torchrun) ", block * (tag != "python"), re.M
            )
            if tag in ("bash", "python"):
                tagged += 1
                assert runs != bool(reason), f"{page}: {block[:80]}"
            else:
                assert not reason, f"{page}: {block[:80]}"
    assert tagged > 8


def test_blocks_and_commands_are_found_in_full():
    for page in PAGES:
        assert 2 * len(blocks_of(page)) == len(re.findall(r"^ *(```|~~~)", page.read_text(), flags=re.M)), page
    block = "unitok a --b 'c\n  d' \\\n  --e   # it's a note\n\n# only this\npip install x\n"
    assert list(command_lines(block)) == [["unitok", "a", "--b", "c\n  d", "--e"], ["pip", "install", "x"]]


def test_the_readme_runs_from_top_to_bottom(names):
    run_page("README.md")
    assert (names / "one" / "000000-0.png").exists()
    assert (names / "samples" / "index.html").exists()
    assert (names / "files" / "documents.jsonl").exists()
    assert (names / "runs" / "bundle" / "model" / "model.safetensors").exists()


def test_the_page_on_data_formats_runs(names):
    run_page("docs/data-formats.md")


@pytest.mark.parametrize(
    "page", ["concepts", "conversations", "decoder", "design", "evaluation", "generation", "grounding", "tokenizers"]
)
def test_the_pages_on_models_run(page, demo_folder):
    run_page(f"docs/{page}.md")


def test_the_pages_on_scaling_and_interchange_run(demo_folder):
    run_page("docs/scaling.md")
    assert len(TokenDataset("tokens-of-two")) > 10
    run_page("docs/interchange.md")
    assert (Path("runs/qwen3/unitok_ids.json")).exists()


def test_the_page_on_ones_own_files_runs(names, capsys):
    run_page("docs/own-files.md")
    assert re.search(r"the first word is right in \d+ of \d+ captions", capsys.readouterr().out)
    assert len(list(Path("runs/stamps/samples").glob("*.png"))) == 4
    assert len(list(Path("runs/stamps/captions").glob("*.txt"))) == 1


def test_the_page_on_training_runs(names):
    run_page("docs/training.md")
    assert (names / "runs" / "bundle" / "model" / "model.safetensors").exists()


def test_the_page_on_fine_tuning_runs_and_the_example_scores_what_it_writes(demo_folder, capsys):
    run_page("docs/fine-tuning.md")
    assert re.search(r"\d+ of 24 right", capsys.readouterr().out)
    written = [json.loads(line)["content"] for line in Path("runs/esperanto.jsonl").read_text().splitlines()]
    assert len(written) == 24
    assert all(content[-1].get("loss", True) and not content[0]["loss"] and not content[1]["loss"] for content in written)
    run_command(["python", "examples/esperanto.py", "score", "SCENES", "runs/esperanto.jsonl"])
    assert "24 of 24 right (100%)" in capsys.readouterr().out
    run_command(
        ["python", "examples/esperanto.py", "score", "SCENES", "runs/esperanto-test.jsonl"]
    )  # the question is no answer
    assert "0 of 24 right (0%)" in capsys.readouterr().out


def test_a_new_modality_goes_from_json_lines_to_generated_files(names, monkeypatch):
    monkeypatch.setattr("unitok.modalities._REGISTRY", dict(modalities()))
    run_page("docs/add-a-modality.md")
    throws = json.loads(Path("runs/samples/outputs.jsonl").read_text().splitlines()[0])["content"][-1]["dice"]
    assert json.dumps(throws) in Path("runs/samples/index.html").read_text()


def test_esperanto_says_what_a_scene_shows():
    from unitok.scenes.world import Scene, SceneObject

    caption = runpy.run_path(str(ROOT / "examples" / "esperanto.py"))["caption"]
    things = (SceneObject("red", "circle", "large"), SceneObject("blue", "square", "small"))
    row, one = Scene("white", "row", things), Scene("black", "one", things[1:])
    assert caption(row) == "granda ruĝa cirklo maldekstre de malgranda blua kvadrato sur blanka fono"
    assert caption(one) == "malgranda blua kvadrato sur nigra fono"


def test_every_file_that_the_docs_link_to_is_there():
    found = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            found += 1
    assert found > 20
