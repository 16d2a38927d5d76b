"""Promises of the command line: quick help, one line and exit code 2 for mistakes, nothing half-written."""

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from unitok.api import Unitok
from unitok.cli import LIGHTNING_VERBS, VERBS, flags, function_of, main
from unitok.cli.arguments import sampling_of_flags
from unitok.configs import CONFIGS, config_file
from unitok.data.shards import TokenDataset
from unitok.model import Decoder
from unitok.model.decoder import DecoderConfig
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig, ImageTokenizer, ImageTokenizerConfig

ROOT = Path(__file__).parent.parent.parent


def unitok(*arguments: object) -> subprocess.CompletedProcess:
    """`unitok …` in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "unitok", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def here(*arguments: object) -> subprocess.CompletedProcess:
    """The same in this process, which has imported everything."""
    return captured(lambda: main([str(argument) for argument in arguments]))


def captured(run: Callable[[], object]) -> subprocess.CompletedProcess:
    """How a function ends, as a process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def assert_one_line(done: subprocess.CompletedProcess, *telling: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in telling:
        assert word in lines[0], (word, lines[0])


def test_where_nobody_reads_what_is_printed_it_stops_quietly():
    command = [sys.executable, "-m", "unitok", "inspect", "chameleon-34b"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys\ntry:\n from unitok.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    code += "import unitok\nbad = {'torch', 'lightning', 'numpy', 'pyarrow'} & set(sys.modules)\nassert not bad, bad"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokenize" in done.stdout


def test_what_does_not_train_does_not_import_torchs_compiler(bundle_folder, scenes_folder, tmp_path):
    """It takes as long as torch itself, in every process: a start of `sample` and `tokenize` was twice as long."""
    out = str(tmp_path / "tokens")
    verbs = [
        ["tokenize", str(scenes_folder), out, "--bundle", str(bundle_folder)],
        ["detokenize", out, str(tmp_path / "files")],
    ]
    verbs = [*verbs, ["sample", "a circle", "--modalities", "image,audio", "--out", str(tmp_path / "made")]]
    bundle = ["--bundle", str(bundle_folder)]
    code = "import json, sys; from unitok.cli import main\nfor verb in json.loads(sys.argv[1]): main(verb)\n"
    code += "assert not {'torch._dynamo', 'lightning', 'transformers'} & set(sys.modules)"
    given = json.dumps([verbs[0], *(verb + bundle for verb in verbs[1:])])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: The last word of an option's name -> what its help must say it is measured in or counts.
UNITS = {"minutes": "minutes", "seconds": "seconds", "segment": "seconds", "size": "pixels|pieces|documents|outputs|of equal size",
         "area": "pixels", "workers": "processes", "threads": "threads", "ids": "ids", "validation": "fraction", "rate": "fraction|Hz",
         "prefix_fraction": "fraction", "mfu": "fraction", "jacobi_window": "tokens", "count": "number|scenes", "context": "tokens", "batch": "tokens"}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_says_what_it_is_its_unit_and_its_default(verb):
    done = here(*verb.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: unitok {verb} ")
    parser = flags.make_parser(function_of(verb), f"unitok {verb}")
    assert parser.description
    told = " ".join(done.stdout.split())
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{verb} {name}"
        assert name.split("/")[0] in told or action.choices
        unit = UNITS.get(name.rpartition("-")[2], "") if action.type in (int, float) else ""
        told_of = f"{action.help} {action.metavar}"
        assert re.search(unit, told_of), f"{verb} {name}: {told_of!r} says nothing of {unit}"
        if not (action.default is False or action.default in (None, "", [], argparse.SUPPRESS)):
            meaning = f"{str(action.default).removesuffix('.0')}: "  # as in `0: all`
            said = f"(default: {action.default})" in told or "(default" in action.help or meaning in action.help
            assert said, f"{verb} {name}: its default {action.default} is not said"


@pytest.mark.parametrize("verb", VERBS)
def test_the_docstring_of_every_verb_documents_each_argument(verb):
    function = function_of(verb)
    documented = [name for entries in flags.read_docstring(function)[1].values() for name in entries]
    assert sorted(documented) == sorted(inspect.signature(function).parameters)


def test_help_and_mistakes_that_need_no_torch_do_not_import_it(bundle_folder, tmp_path):
    """In one process, one after the other: what one imports would be seen after it."""
    bundle = ("--bundle", str(bundle_folder))
    (tmp_path / "file.txt").write_text("x")
    given = [[*verb.split(), "--help"] for verb in VERBS] + [[*verb.split(), "--tyop"] for verb in VERBS]
    given += [
        ["tokenize", str(tmp_path / "gone"), str(tmp_path / "out"), *bundle],
        ["tokenize", str(tmp_path), str(tmp_path / "out"), "--bundle", str(tmp_path / "gone")],
        ["tokenize", str(tmp_path / "out"), *bundle],
        ["tokenize", str(tmp_path), str(tmp_path / "out"), *bundle, "--image-fit", "squeeze"],
        ["tokenize", str(tmp_path), str(tmp_path / "out"), *bundle, "--image-area", "-1"],
        ["tokenize", str(tmp_path), str(tmp_path / "out"), *bundle, "--template", "{"],
        ["detokenize", str(tmp_path / "gone"), str(tmp_path / "out"), *bundle],
        ["sample", "--bundle", str(tmp_path / "gone"), "--text", "x"],
        ["sample", *bundle, "--image", str(tmp_path / "gone.png")],
        ["sample", *bundle, "--prompts", str(tmp_path / "gone.jsonl")],
        ["sample", *bundle, "--text", "x", "--image-top-p", "7"],
        ["train-text-tokenizer", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "out")],
        ["inspect", str(tmp_path / "gone")],
        ["bundle", str(tmp_path / "out"), "--image", str(tmp_path / "gone")],
        ["import", "encodec", str(tmp_path / "gone"), str(tmp_path / "out")],
        ["export", "hf-qwen3", str(tmp_path / "gone"), str(tmp_path / "out")],
        ["eval", *bundle, "--scenes", str(tmp_path / "gone")],
        ["eval", "image-tokenizer", str(bundle_folder), str(tmp_path / "gone")],
        ["eval", "audio-tokenizer", str(tmp_path / "gone"), str(tmp_path)],
    ]
    code = """
import json, sys
from unitok.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        assert stop.code == (0 if "--help" in words else 2), words
    else:
        raise AssertionError(words)
    bad = {"torch", "lightning", "scipy", "soundfile", "pyarrow"} & set(sys.modules)
    assert not bad, (words, bad)
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(given)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_library_says_of_an_argument_names_its_flag():
    known = ["--max-new-tokens", "--prefix-fraction", "--image-area", "--audio-top-p", "--top-p", "--out"]
    for said, shown in (
        ("max_new_tokens is 0: at least 1", "--max-new-tokens is 0: at least 1"),
        ("40 ids are too few; raise max_new_tokens", "40 ids are too few; raise --max-new-tokens"),
        ("prefix_fraction is 2: a share", "--prefix-fraction is 2: a share"),
        ("prefix_fraction: a prompt must end with an image", "--prefix-fraction: a prompt must end with an image"),
        ("out: not empty", "out: not empty"),  # a folder of that name
        ("image: area is -1", "--image-area is -1"),
        ("out /gone: no such folder", "--out /gone: no such folder"),
        ("audio top_p 0.0: above 0", "--audio-top-p 0.0: above 0"),
        ("top_p 7.0: at most 1", "--top-p 7.0: at most 1"),
        (
            "/a/max_new_tokens: no such file, and keep is no flag in here",
            "/a/max_new_tokens: no such file, and keep is no flag in here",
        ),
    ):
        assert flags.name_flags(said, known, paths=["--out"]) == shown


@pytest.mark.parametrize("verb", LIGHTNING_VERBS)
def test_lightnings_verbs_have_help(verb):
    done = here(verb, "--help")
    assert done.returncode == 0
    assert f"{verb} [" in done.stdout
    for option in ("--out", "--resume", "--checkpoint_seconds", "--config", "--print_config"):
        assert option in done.stdout


def test_the_overview_names_every_verb():
    done = here("--help")
    assert done.returncode == 0
    named = set(re.findall(r"^  ([a-z-]+(?: [a-z-]+)?)  ", done.stdout, flags=re.M))
    assert named == {*VERBS, *LIGHTNING_VERBS}


def test_a_whole_round_on_the_command_line(scenes_folder, bundle_folder, tmp_path, monkeypatch):
    done = here("tokenize", scenes_folder, tmp_path / "tokens", "--bundle", bundle_folder)
    assert done.returncode == 0, done.stderr
    assert here("inspect", tmp_path / "tokens", "--verify").stdout.strip().endswith("spans")
    out = tmp_path / "out"
    sample = [
        *("--bundle", bundle_folder, "--text", "a picture", "--image", scenes_folder / "images" / "000003.png"),
        *(
            "--modalities",
            "text,image:2x2,audio:0.3s",
            "--n",
            2,
            "--seed",
            7,
            "--image-guidance-scale",
            2,
            "--temperature",
            0.9,
        ),
    ]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, sample), "--out", str(out)])
    first = captured(lambda: runpy.run_path(str(ROOT / "sample.py"), run_name="__main__"))
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [[p["type"] for p in r["content"]] for r in rows] == [["text", "image", "text", "image", "audio"]] * 2
    assert all((out / p["path"]).exists() for r in rows for p in r["content"] if "path" in p)
    assert "<audio" in (out / "index.html").read_text()
    again = unitok("sample", *sample, "--out", tmp_path / "again")  # in another process, too
    assert again.returncode == 0, again.stderr
    for name in sorted(os.listdir(out)):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_two_tokenizers_of_a_kind_are_told_apart_by_names(bundle_folder, scenes_folder, tmp_path):
    out = tmp_path / "bundle"
    parts = [
        f"--{kind}={name}{bundle_folder}"
        for kind, name in (("text", ""), ("image", ""), ("audio", "speech="), ("audio", "music="))
    ]
    done = here("bundle", out, *parts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: text, image, speech, music; ")
    assert_one_line(here("bundle", tmp_path / "b", *parts, f"--audio=music={bundle_folder}"), "--audio", "'music'", "NAME=PATH")
    torch.manual_seed(0)
    tokens = ("tokenize", scenes_folder / "audio", tmp_path / "tokens", "--bundle", out)
    assert_one_line(here(*tokens), "audio", "speech, music")
    done = here(*tokens, "--instance", "audio=music")
    assert done.returncode == 0, done.stderr
    assert TokenDataset(tmp_path / "tokens").document(0).segments[0].modality == "music"
    whole = Unitok.from_pretrained(out)
    whole.model = Decoder(DecoderConfig(whole.vocab.size, 32, 64, 1, 2, 2)).eval()
    whole.save_pretrained(out, overwrite=True)
    drawn = []
    for seed, temperature in ((1, 0), (2, 0), (2, 5)):
        words = [
            "--modalities",
            "speech:3,music:3",
            "--seed",
            seed,
            "--sampling",
            json.dumps({"speech": {"temperature": temperature}}),
        ]
        done = here("sample", "--bundle", out, "--text", "x", *words, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "000000: speech, music" in done.stdout
        drawn.append([(tmp_path / "out" / f"000000-{i}.wav").read_bytes() for i in range(2)])
    assert drawn[0][0] == drawn[1][0] != drawn[2][0]
    assert drawn[0][1] != drawn[1][1]
    assert_one_line(here("sample", "--bundle", out, "--text", "x", "--sampling", "{"), "--sampling", "JSON")
    heard = scenes_folder / "audio" / "000000.wav"
    sample = ("sample", "--bundle", out, "--modalities", "text", "--out", tmp_path / "heard")
    assert_one_line(here(*sample, "--audio", heard), "several tokenizers for audio: speech, music")
    assert here(*sample, f"--audio=music={heard}").returncode == 0
    line = json.loads((tmp_path / "heard" / "outputs.jsonl").read_text())
    assert [part["type"] for part in line["content"]] == ["music", "text"]


def test_flags_of_a_kind_and_of_a_tokenizer_are_put_together():
    given = {"image": {"temperature": 2}, "audio": {"top_k": 5}}
    made = sampling_of_flags(given, '{"audio": {"temperature": 3}, "speech": {"temperature": 4}}')
    assert made == {"image": {"temperature": 2}, "audio": {"top_k": 5, "temperature": 3}, "speech": {"temperature": 4}}
    assert sampling_of_flags({}, "") == {}


def test_flags_count_before_the_config_file_and_that_before_the_bundles_own(bundle_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("unitok.api.generate_outputs", lambda bundle, prompts, config, *more: calls.append(config) or [])
    shutil.copytree(bundle_folder, tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text('{"n": 2, "temperature": 0.1, "image": {"top_k": 3}}')
    file = tmp_path / "mine.json"
    file.write_text('{"n": 3, "seed": 5, "audio": {"temperature": 0.2}, "image": {"temperature": 0.3}}')
    base = ("sample", "--bundle", tmp_path / "own", "--text", "x", "--out", tmp_path / "out")
    assert here(*base).returncode == 0
    assert here(*base, "--generation-config", file).returncode == 0
    assert here(*base, "--generation-config", file, "--n", 4, "--image-temperature", 0.4, "--top-p", 0.9).returncode == 0
    assert [(config.n, config.seed) for config in calls] == [(2, 0), (3, 5), (4, 5)]
    kinds = ("text", "image", "audio")
    assert [[getattr(config, kind)["temperature"] for kind in kinds] for config in calls] == [
        [0.1, 0.1, 0.1],
        [0.1, 0.3, 0.2],
        [0.1, 0.4, 0.2],
    ]
    assert calls[2].image == {"temperature": 0.4, "top_k": 3, "top_p": 0.9}
    file.write_text('{"temprature": 1}')
    assert_one_line(here(*base, "--generation-config", file), "mine.json", "'temprature'", "did you mean temperature")


def test_a_bundle_is_given_its_generation_config(bundle_folder, tmp_path):
    out, file = tmp_path / "own", tmp_path / "mine.json"
    file.write_text('{"temperature": 0.5, "image": {"guidance_scale": 3.0}}')
    assert_one_line(here("bundle", out, "--generation-config", file), "nothing to put into the bundle")
    shutil.copytree(bundle_folder, out)
    assert here("bundle", out, "--generation-config", file).returncode == 0
    own = Unitok.from_pretrained(out)
    assert own.generation_config.to_dict() == {"temperature": 0.5, "image": {"guidance_scale": 3.0}}
    assert own.parts == Unitok.from_pretrained(bundle_folder).parts
    file.write_text('{"smell": {"temperature": 0.5}}')
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    new = ("bundle", tmp_path / "new", "--text", bundle_folder)
    untrained = ("bundle", tmp_path / "new", "--untrained", "tiny")
    for content, *says in (
        ('{"smell": {"temperature": 0.5}}', "no tokenizer 'smell'"),
        ('{"modalities": "text,smell"}', "modalities 'smell'", "no modality 'smell'"),
        ('{"modalities": "audio:2 x 3"}', "modalities 'audio"),
        ('{"image": {"top_p": 2}}', "image: top_p 2"),
    ):
        file.write_text(content)
        for command in (("bundle", out, "--text", bundle_folder), ("bundle", out), new, untrained):
            assert_one_line(here(*command, "--generation-config", file), "mine.json", *says)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_live_view_leaves_out_what_the_bundle_asks_for_and_it_cannot_do(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text('{"best_of": 2, "jacobi_window": 4, "modalities": "image:2x2"}')
    base = ("sample", "--bundle", tmp_path / "own", "--text", "x", "--out", tmp_path / "out", "--live")
    assert here(*base).returncode == 0
    assert here(*base, "--best-of", "1", "--jacobi-window", "0").returncode == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_mistakes_in_prompts_and_flags_are_one_line(bundle_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "bad.jsonl").write_text("{\n")
    base = ("sample", "--bundle", bundle_folder, "--out", out)
    assert_one_line(here("sample", "--bundle", tmp_path / "gone", "--text", "x"), "gone", "unitok bundle")
    assert_one_line(here(*base, "--image", tmp_path / "gone.png"), "gone.png", "no such file")
    assert_one_line(here(*base, "--image", tmp_path / "notes.png"), "notes.png", "neither an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "seen.png")
    assert_one_line(here(*base, "--audio", tmp_path / "seen.png"), "seen.png", "give it with --image")
    assert_one_line(here(*base, "--text", ""), "empty text")
    assert_one_line(here(*base, "--text", "x", "--modalities", "smell"), "smell", "text, image, audio")
    assert_one_line(here(*base, "--text", "x", "--top-p", "7"), "--top-p")
    assert_one_line(here(*base, "--prompts", tmp_path / "bad.jsonl"), "line 1", "not JSON")
    assert_one_line(here(*base, "--text", "x", "--device", "cuda:9"), "--device", "cpu")
    assert_one_line(here(*base, "--txet", "x"), "--txet")
    assert_one_line(here(*base, "--text", "x", "--audio-top-p", "0"), "--audio-top-p 0.0", "above 0")
    assert_one_line(
        here(*base, "--text", "x", "--modalities", "image:8x8", "--max-new-tokens", "40"),
        "40 tokens",
        "at least 69",
        "--max-new-tokens",
    )
    assert_one_line(here(*base, "--text", "x " * 1100, "--modalities", "text"), "a prompt of 2", "the decoder takes 1024")
    assert_one_line(here(*base, "--text", "x", "--score"), "--score", "--prompts")
    scored = (*base, "--prompts", tmp_path / "bad.jsonl", "--score")
    assert_one_line(here(*scored, "--image-top-k", "3"), "--image-top-k: --score generates nothing; leave it out")
    assert_one_line(here(*base, "--text", "x", "--live", "--best-of", "3"), "--live", "--best-of")
    assert_one_line(here(*base, "--text", "x", "--live", "--jacobi-window", "4"), "--live", "--jacobi-window")
    assert_one_line(here(*base, "--text", "x", "--prefix-fraction", "2"), "--prefix-fraction", "above 0")
    assert_one_line(unitok("paint"), "paint", "sample")
    assert_one_line(unitok("train"), "did you mean fit?")
    assert_one_line(unitok("tokenise"), "did you mean tokenize?")
    assert_one_line(unitok("fit", "--out", out), "no configuration", "scenes/decoder.yaml")
    assert_one_line(here(*base, "--prompt", "x"), "--prompt;", "--prompts")
    assert not out.exists()


def test_mistakes_in_data_preparation_are_one_line_and_leave_nothing(bundle_folder, scenes_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert_one_line(here("tokenize", tmp_path / "gone", out, "--bundle", bundle_folder), "gone", "no such file or folder")
    assert_one_line(here("tokenize", tmp_path / "empty", out, "--bundle", bundle_folder), "no documents")
    assert_one_line(here("tokenize", scenes_folder, out, "--bundle", tmp_path / "empty"), "bundle.json")
    assert_one_line(here("detokenize", tmp_path / "empty", out, "--bundle", bundle_folder), "dataset.json")
    assert_one_line(here("train-text-tokenizer", tmp_path / "gone.txt", "--out", out), "gone.txt")
    assert_one_line(here("bundle", out), "--text")
    assert_one_line(here("inspect", tmp_path / "empty"), "neither a data set")
    assert not out.exists()


def test_mistakes_in_tokenizing_are_one_line_and_leave_nothing(bundle_folder, scenes_folder, tmp_path):
    out = tmp_path / "out"
    bundle = ("--bundle", bundle_folder)
    (tmp_path / "r.yaml").write_text("sources: [{path: nowhere}]")
    (tmp_path / "empty").mkdir()
    for words, telling in (
        ((tmp_path / "nowhere", out), ["nowhere", "no such file"]),
        ((tmp_path / "empty", out), ["empty", "no documents"]),
        ((out,), ["SOURCE and OUT", "--recipe"]),
        ((scenes_folder, out, "--recipe", tmp_path / "r.yaml"), ["not both"]),
        ((out, "--recipe", tmp_path / "r.yaml"), ["nowhere", "no such file"]),
        ((out, "--recipe", tmp_path / "no.yaml"), ["no.yaml", "no such file"]),
        ((out, "--recipe", tmp_path / "r.yaml", "--order", "random"), ["--order", "keys of each source"]),
        ((scenes_folder, out, "--template", "[{type: smell}]"), ["--template", "part 1"]),
        ((scenes_folder, out, "--template", "{"), ["--template", "YAML"]),
        ((scenes_folder, out, "--order", "image,smell"), ["type 'smell'", "choose"]),
        ((scenes_folder, out, "--instance", "audio"), ["--instance", "KIND=NAME"]),
        ((scenes_folder, out, "--job-index", "1"), ["--num-jobs"]),
        ((scenes_folder, out, "--job-index", "4", "--num-jobs", "4"), ["--job-index 4"]),
        ((scenes_folder, out, "--validation", "1"), ["--validation"]),
        ((scenes_folder, out, "--documents-per-shard", "-3"), ["--documents-per-shard -3"]),
        ((scenes_folder, out, "--bundel", "x"), ["--bundel", "did you mean --bundle?"]),
        ((scenes_folder, out, "--root", tmp_path / "nowhere"), ["--root", "no such folder"]),
        ((scenes_folder, out, "--template", "[]"), ["--template", "a list of parts"]),
        ((scenes_folder, "memory://out"), ["memory://out", "local (or mounted) folder"]),
        ((scenes_folder, out, "--max-error-rate", "2"), ["--max-error-rate 2", "from 0 to 1"]),
        ((scenes_folder, out, "--audio-segment", "-1"), ["--audio-segment -1"]),
        (("nosuchprotocol://x/y", out), ["nosuchprotocol"]),
        (("memory://nothing/here", out), ["no such file"]),
    ):
        assert_one_line(here("tokenize", *words, *bundle), *telling)
        assert not out.exists(), words
    assert_one_line(here("inspect", scenes_folder, "--page", out), "--bundle")


def test_a_dry_run_tells_how_much_it_will_be_and_a_recipe_does_it(bundle_folder, scenes_folder, tmp_path, capsys):
    recipe = {
        "sources": [{"path": str(scenes_folder), "weight": 0.5}, {"path": str(scenes_folder / "images"), "image": {"crops": 1}}]
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = [str(tmp_path / "out"), "--bundle", str(bundle_folder), "--recipe", str(tmp_path / "r.yaml")]
    main(["tokenize", *words, "--dry-run"])
    told = capsys.readouterr().out
    for word in ("documents listed", "tokens", "kB", "time"):
        assert word in told
    assert not (tmp_path / "out").exists()
    main(["tokenize", *words])
    assert "complete" not in capsys.readouterr().out
    assert (tmp_path / "out" / "dataset.json").exists()
    main(["tokenize", *words])
    assert "complete already" in capsys.readouterr().out


def test_a_dry_run_of_documents_that_are_all_bad_fails(bundle_folder, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"content": [{"type": "image", "path": "gone.png"}]}\n' * 5)
    words = ["tokenize", str(tmp_path / "x.jsonl"), str(tmp_path / "out"), "--bundle", str(bundle_folder), "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert "100.0% bad" in told.out
    assert "none of the 5 documents of the sample can be used; the first: gone.png: no such file" in told.err
    assert "and 2 more of the sample" in told.out


def test_a_config_of_any_content_is_inspected_and_what_is_no_data_set_is_not_verified(bundle_folder, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    for content in ("model: foo", "- 1", "model:", "model:\n  class_path: unitok.training.DecoderTraining\n  init_args:"):
        config.write_text(f"# a comment\n{content}\n")
        main(["inspect", str(config)])
        assert "# a comment" in capsys.readouterr().out
    assert_one_line(here("inspect", bundle_folder, "--verify"), "--verify checks data sets")
    assert_one_line(here("inspect", "scens"), "no built-in bundle (scenes)", "100m")


def test_mistakes_in_training_are_one_line_and_leave_nothing(tmp_path, scenes_folder, bundle_folder):
    out, config = tmp_path / "run", CONFIGS / "scenes" / "image.yaml"
    (tmp_path / "typo.yaml").write_text(config.read_text().replace("lr", "lerning_rate"))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("no pictures here")
    fit = ("fit", "--out", out, "--trainer.enable_progress_bar", "false")
    assert_one_line(here(*fit, "--config", tmp_path / "typo.yaml"), "lerning_rate")
    assert_one_line(here(*fit, "--config", tmp_path / "gone.yaml"), "gone.yaml")
    assert_one_line(
        here(*fit, "--config=configs/scenes/imag.yaml"), "no built-in configuration", "did you mean scenes/image.yaml?"
    )
    assert_one_line(
        here(*fit, "--config", config, "--data.init_args.path", tmp_path / "gone"), "gone", "no such file or folder"
    )
    assert_one_line(here(*fit, "--config", config, "--data.init_args.path", tmp_path / "words"), "no image files")
    assert_one_line(here(*fit, "--config", config, "--resume", tmp_path / "gone.ckpt"), "gone.ckpt")
    decoder = CONFIGS / "scenes" / "decoder.yaml"
    assert_one_line(here(*fit, "--config", decoder, "--data.init_args.path", tmp_path / "words"), "dataset.json")
    assert not out.exists()


def leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys, joined by dots -> values."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_configs_header_says_a_command_that_takes_it_as_it_is_and_how_large_it_is(path):
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Hardware: " in header
    command = re.search(r"Command: +unitok (fit --config \S+ --out \S+(?: --data\S+ \S+)?)", header)[1].split()
    assert config_file(command[2]) == path
    done = here(*command, "--print_config")
    assert done.returncode == 0, done.stderr
    mine, whole = leaves(yaml.safe_load(path.read_text())), leaves(yaml.safe_load(done.stdout))
    if len(command) > 5:
        assert command[5:6] == ["--data.init_args.path"]
        assert mine.pop("data.init_args.path", command[6])
        assert whole["data.init_args.path"] == command[6]
    assert {name: whole[name] for name in mine} == mine  # every line of it counts
    said = re.search(r"([\d.]+)([MB]) parameters( in its blocks)?", header)
    assert said or "/decoder/" not in str(path) or mine.get("model.init_args.init_from")  # then it is that one's size
    if said:
        shown, unit = float(said[1]), {"M": 1e6, "B": 1e9}[said[2]]
        digits = 10.0 ** -len(said[1].partition(".")[2])
        assert shown == pytest.approx(parameters(whole, bool(said[3])) / unit, abs=0.5 * digits + 1e-6)


def parameters(whole: dict[str, Any], in_blocks: bool) -> int:
    """Counted in the network that a config describes, built without memory."""
    inner = {name: value for key, value in whole.items() for head, _, name in [key.partition("init_args.")] if head == "model."}

    def options(part: str) -> dict[str, Any]:
        fields = {name.removeprefix(f"{part}."): value for name, value in inner.items() if name.startswith(f"{part}.")}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    with torch.device("meta"):
        if "decoder.hidden_size" in inner:
            fields = {name: value for name, value in options("decoder").items() if "." not in name}
            network: torch.nn.Module = Decoder(DecoderConfig(**fields | {"vocab_size": 1000}))
        elif "tokenizer.sample_rate" in inner:
            network = AudioTokenizer(AudioTokenizerConfig(**options("tokenizer")))
        else:
            network = ImageTokenizer(ImageTokenizerConfig(**options("tokenizer")))
    return sum(p.numel() for name, p in network.named_parameters() if not in_blocks or ".layers." in name)


def test_a_silent_sound_in_a_prompt_is_one_line(bundle_folder, tmp_path):
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "silent.wav", np.zeros(4000), 8000)
    done = here("sample", "--bundle", bundle_folder, "--audio", tmp_path / "silent.wav", "--out", tmp_path / "out")
    assert_one_line(done, "silent.wav", "silence")


def test_nothing_that_unitok_did_not_make_is_ever_replaced(tmp_path, scenes_folder, bundle_folder):
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(scenes_folder, mine)
    before = sorted(mine.rglob("*"))
    assert_one_line(here("train-text-tokenizer", mine / "text.txt", "--out", mine), "mine", "another folder")
    assert_one_line(here("bundle", mine, "--text", bundle_folder), "mine", "another folder")
    assert_one_line(here("scenes", mine / "text.txt"), "text.txt")
    assert_one_line(here("tokenize", mine, mine / "text.txt", "--bundle", bundle_folder), "text.txt")
    assert sorted(mine.rglob("*")) == before


def test_files_where_folders_belong_are_one_line(tmp_path, bundle_folder):
    file = tmp_path / "file"
    file.write_text("x")
    assert_one_line(here("sample", "--bundle", file, "--text", "x"), "file")
    assert_one_line(here("sample", "--bundle", bundle_folder, "--text", "x", "--out", file), "file")
    assert_one_line(here("sample", "--bundle", bundle_folder, "--image", tmp_path, "--out", tmp_path / "o"), str(tmp_path))
    assert_one_line(here("sample", "--bundle", bundle_folder, "--text", "x", "--batch-size", "0"), "--batch-size is 0")
    assert_one_line(here("inspect", file), "neither")
    assert_one_line(here("validate", "--config", CONFIGS / "scenes" / "image.yaml", "--out", tmp_path / "o"), "--resume")
