"""Promises of the command line: quick help, one line and exit code 2 for mistakes, nothing half-written."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unitok.cli import main

ROOT = Path(__file__).parent.parent


def unitok(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "unitok", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


def here(*arguments: object) -> subprocess.CompletedProcess:
    """The same in this process, which has imported everything: most mistakes need no other."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, stop.value.code, out.getvalue(), err.getvalue())


def assert_one_line(done: subprocess.CompletedProcess, *telling: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in telling:
        assert word in lines[0], (word, lines[0])


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys\ntry:\n from unitok.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    code += "import unitok\nbad = {'torch', 'lightning', 'numpy', 'pyarrow'} & set(sys.modules)\nassert not bad, bad"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokenize" in done.stdout


@pytest.mark.parametrize(
    "verb",
    [
        "scenes",
        "train-text",
        "bundle",
        "tokenize",
        "detokenize",
        "import",
        "export",
        "inspect",
        "sample",
        "eval",
        "demo",
        "doctor",
    ],
)
def test_every_verb_has_help(verb):
    done = unitok(verb, "--help")
    assert done.returncode == 0
    assert f"usage: unitok {verb}" in done.stdout


def test_a_whole_round_on_the_command_line(scenes_folder, bundle_folder, tmp_path):
    done = unitok("tokenize", scenes_folder, tmp_path / "tokens", "--bundle", bundle_folder)
    assert done.returncode == 0, done.stderr
    assert unitok("inspect", tmp_path / "tokens", "--verify").stdout.strip().endswith("spans")
    out = tmp_path / "out"
    sample = [
        *("--bundle", bundle_folder, "--text", "a picture", "--image", scenes_folder / "images" / "000003.png"),
        *("--want", "text,image:2x2,audio:0.3s", "--n", 2, "--seed", 7, "--image-guidance", 2, "--temperature", 0.9),
    ]
    first = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *map(str, sample), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [[p["type"] for p in r["content"]] for r in rows] == [["text", "image", "text", "image", "audio"]] * 2
    assert all((out / p["path"]).exists() for r in rows for p in r["content"] if "path" in p)
    assert "<audio" in (out / "index.html").read_text()
    again = unitok("sample", *sample, "--out", tmp_path / "again")
    assert again.returncode == 0
    for name in sorted(os.listdir(out)):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_mistakes_in_prompts_and_flags_are_one_line(bundle_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "bad.jsonl").write_text("{\n")
    base = ("sample", "--bundle", bundle_folder, "--out", out)
    assert_one_line(unitok("sample", "--bundle", tmp_path / "gone", "--text", "x"), "gone", "unitok bundle")
    assert_one_line(here(*base, "--image", tmp_path / "gone.png"), "gone.png", "no such file")
    assert_one_line(here(*base, "--image", tmp_path / "notes.png"), "notes.png", "neither an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "seen.png")
    assert_one_line(here(*base, "--audio", tmp_path / "seen.png"), "seen.png", "give it with --image")
    assert_one_line(here(*base, "--text", ""), "empty text")
    assert_one_line(here(*base, "--text", "x", "--want", "smell"), "smell", "text, image, audio")
    assert_one_line(here(*base, "--text", "x", "--top-p", "7"), "--top-p")
    assert_one_line(here(*base, "--prompts", tmp_path / "bad.jsonl"), "line 1", "not JSON")
    assert_one_line(here(*base, "--text", "x", "--device", "cuda:9"), "--device", "cpu")
    assert_one_line(here(*base, "--txet", "x"), "--txet")
    assert_one_line(here(*base, "--text", "x", "--audio-top-p", "0"), "--audio-top-p 0.0", "above 0")
    assert_one_line(here(*base, "--text", "x", "--want", "image:8x8", "--max-ids", "40"), "40 ids", "at least 69", "--max-ids")
    assert_one_line(here(*base, "--text", "x " * 1100, "--want", "text"), "a prompt of 2", "the decoder takes 1024")
    assert_one_line(here(*base, "--text", "x", "--score"), "--score", "--prompts")
    assert_one_line(here(*base, "--text", "x", "--live", "--best-of", "3"), "--live", "--best-of")
    assert_one_line(here(*base, "--text", "x", "--keep", "2"), "keep", "share")
    assert_one_line(unitok("paint"), "paint", "sample")
    assert not out.exists()


def test_mistakes_in_data_preparation_are_one_line_and_leave_nothing(bundle_folder, scenes_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert_one_line(here("tokenize", tmp_path / "gone", out, "--bundle", bundle_folder), "gone", "no such file or folder")
    assert_one_line(here("tokenize", tmp_path / "empty", out, "--bundle", bundle_folder), "no documents")
    assert_one_line(here("tokenize", scenes_folder, out, "--bundle", tmp_path / "empty"), "bundle.json")
    assert_one_line(here("detokenize", tmp_path / "empty", out, "--bundle", bundle_folder), "dataset.json")
    assert_one_line(here("train-text", tmp_path / "gone.txt", "--out", out), "gone.txt")
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
        ((out, "--recipe", tmp_path / "r.yaml", "--flip"), ["--flip", "for each source"]),
        ((scenes_folder, out, "--template", "[{type: smell}]"), ["--template", "part 1"]),
        ((scenes_folder, out, "--template", "{"), ["--template", "YAML"]),
        ((scenes_folder, out, "--order", "image,smell"), ["order", "smell"]),
        ((scenes_folder, out, "--shard-index", "1"), ["--num-shards"]),
        ((scenes_folder, out, "--shard-index", "4", "--num-shards", "4"), ["--shard-index 4"]),
        ((scenes_folder, out, "--validation", "1"), ["--validation"]),
        ((scenes_folder, out, "--shard-size", "-3"), ["--shard-size -3"]),
        ((scenes_folder, out, "--bundel", "x"), ["--bundel", "did you mean --bundle?"]),
        ((scenes_folder, out, "--root", tmp_path / "nowhere"), ["--root", "no such folder"]),
        ((scenes_folder, out, "--template", "[]"), ["--template", "a list of parts"]),
        ((scenes_folder, "memory://out"), ["memory://out", "local folder"]),
        ((scenes_folder, out, "--max-error-rate", "2"), ["--max-error-rate"]),
        ((scenes_folder, out, "--audio-segment", "-1"), ["audio_segment"]),
        (("nosuchprotocol://x/y", out), ["nosuchprotocol"]),
        (("memory://nothing/here", out), ["no such file"]),
    ):
        assert_one_line(here("tokenize", *words, *bundle), *telling)
        assert not out.exists(), words
    assert_one_line(here("inspect", scenes_folder, "--page", out), "--bundle")


def test_a_dry_run_tells_how_much_it_will_be_and_a_recipe_does_it(bundle_folder, scenes_folder, tmp_path, capsys):
    recipe = {"sources": [{"path": str(scenes_folder), "weight": 0.5}, {"path": str(scenes_folder / "images"), "crops": 1}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = [str(tmp_path / "out"), "--bundle", str(bundle_folder), "--recipe", str(tmp_path / "r.yaml")]
    main(["tokenize", *words, "--dry-run"])
    told = capsys.readouterr().out
    for word in ("documents listed", "ids", "kB", "time"):
        assert word in told
    assert not (tmp_path / "out").exists()
    main(["tokenize", *words])
    assert "complete" not in capsys.readouterr().out
    assert (tmp_path / "out" / "dataset.json").exists()
    main(["tokenize", *words])
    assert "complete already" in capsys.readouterr().out


def test_mistakes_in_training_are_one_line_and_leave_nothing(tmp_path, scenes_folder, bundle_folder):
    out, config = tmp_path / "run", ROOT / "configs" / "scenes" / "image.yaml"
    (tmp_path / "typo.yaml").write_text(config.read_text().replace("learning_rate", "lerning_rate"))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("no pictures here")
    fit = ("fit", "--out", out, "--trainer.enable_progress_bar", "false")
    assert_one_line(here(*fit, "--config", tmp_path / "typo.yaml"), "lerning_rate")
    assert_one_line(here(*fit, "--config", tmp_path / "gone.yaml"), "gone.yaml")
    assert_one_line(here(*fit, "--config", config, "--data.init_args.path", tmp_path / "gone"), "gone", "no such folder")
    assert_one_line(here(*fit, "--config", config, "--data.init_args.path", tmp_path / "words"), "no image files")
    assert_one_line(here(*fit, "--config", config, "--resume", tmp_path / "gone.ckpt"), "gone.ckpt")
    decoder = ROOT / "configs" / "scenes" / "decoder.yaml"
    assert_one_line(here(*fit, "--config", decoder, "--data.init_args.path", tmp_path / "words"), "dataset.json")
    assert not out.exists()


def test_every_config_parses_and_says_its_command(capsys):
    from unitok.fit import run_lightning

    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(paths) >= 7
    for path in paths:
        with pytest.raises(SystemExit) as stop:
            run_lightning(["fit", "--config", str(path), "--print_config"])
        assert stop.value.code == 0, f"{path}: {capsys.readouterr().err}"
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any("unitok fit" in line and path.name in line for line in header)
        assert any("Hardware" in line for line in header)


def test_a_silent_sound_in_a_prompt_is_one_line(bundle_folder, tmp_path):
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "silent.wav", np.zeros(4000), 8000)
    done = unitok("sample", "--bundle", bundle_folder, "--audio", tmp_path / "silent.wav", "--out", tmp_path / "out")
    assert_one_line(done, "silent.wav", "silence")


def test_nothing_that_unitok_did_not_make_is_ever_replaced(tmp_path, scenes_folder, bundle_folder):
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(scenes_folder, mine)
    before = sorted(mine.rglob("*"))
    assert_one_line(here("train-text", mine / "text.txt", "--out", mine), "mine", "another folder")
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
    assert_one_line(here("sample", "--bundle", bundle_folder, "--text", "x", "--batch-size", "0"), "batch size")
    assert_one_line(here("inspect", file), "neither")
    assert_one_line(here("validate", "--config", ROOT / "configs/scenes/image.yaml", "--out", tmp_path / "o"), "--resume")
