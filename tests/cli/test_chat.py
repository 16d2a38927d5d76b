"""`unitok chat`: lines in, answers out; commands that change the conversation; files of it that others read."""

import io
import json
import sys

import pytest
from raw_data import png

from unitok.cli import main
from unitok.data.shards import TokenDataset


@pytest.fixture
def talk(bundle_folder, tmp_path, monkeypatch, capsys):
    """Runs `unitok chat` on lines; returns what it printed."""

    def run(*lines, flags=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.chdir(tmp_path)
        main(["chat", str(bundle_folder), "--modalities", "text:4", "--out", str(tmp_path / "out"), *flags])
        return capsys.readouterr().out

    return run


def roles(printed):
    return [line.partition(":")[0] for line in printed.splitlines() if line.startswith(("system:", "user:", "assistant:"))]


def test_a_conversation_with_files_is_held_edited_saved_and_read_as_data(talk, tmp_path, bundle_folder):
    (tmp_path / "a.png").write_bytes(png())
    printed = talk(
        "/image a.png",
        "What is it?",
        "/modalities image:2x2",
        "Draw it.",
        "/history",
        "/save talk.json",
        flags=["--system", "Be brief."],
    )
    assert roles(printed) == ["system", "user", "assistant", "user", "assistant"]
    assert "user: [image] What is it?" in printed
    assert "assistant: [image]" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000.png"]
    main(["tokenize", str(tmp_path / "talk.json"), str(tmp_path / "tokens"), "--bundle", str(bundle_folder), "--workers", "1"])
    (document,) = [TokenDataset(tmp_path / "tokens").document(0)]
    assert [(s.role, s.modality) for s in document.segments] == [
        ("system", "text"), ("user", "image"), ("user", "text"), ("assistant", "text"), ("user", "text"), ("assistant", "image"),
    ]  # fmt: skip
    printed = talk("/load talk.json", "/edit", "/history", "And now?", "/edit Then?", "/history", "/new", "/history")
    assert roles(printed) == ["system", "user", "assistant", *["system", "user", "assistant", "user", "assistant"]]
    assert "user: Then?" in printed
    assert "And now?" not in printed


def test_a_config_file_says_what_answers_have(bundle_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "g.json").write_text('{"modalities": "text:4", "seed": 5}')
    shown = []
    for flags in (["--generation-config", str(tmp_path / "g.json")], ["--modalities", "text:4", "--seed", "5"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        main(["chat", str(bundle_folder), "--out", str(tmp_path / "out"), *flags])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert not (tmp_path / "out").exists()  # no image and no audio


def test_a_message_that_cannot_be_said_leaves_the_conversation(bundle_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n/edit {'word ' * 2000}\n/history\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: sys.stdin.readline().rstrip("\n") or (_ for _ in ()).throw(EOFError))
    main(["chat", str(bundle_folder), "--modalities", "text:4"])
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert roles(printed.out) == ["user", "assistant"]


def test_another_answer_has_another_seed(talk):
    said = [line for line in talk("Hello", "/history", "/again", "/history").splitlines() if line.startswith("assistant:")]
    assert len(set(said)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/nope"], "/nope: no such command; there is /image, /audio, /video, /modalities"),
        (["/image nowhere.png"], "nowhere.png: no such file"),
        (["/image"], "/image FILE: name a file"),
        (["/image empty.png"], "empty.png: an empty file"),
        (["/image bad.json"], "bad.json: image: neither an image nor audio; it is not attached"),
        (["/save bad.json/a.json"], "bad.json/a.json: "),
        (["/edit"], "/edit: nothing was said yet"),
        (["/again"], "/again: nothing was said yet"),
        (["/modalities smell"], "smell"),
        (["/save talk.txt"], "/save FILE.json"),
        (["/load nowhere.json"], "nowhere.json: No such file"),
        (["/load bad.json"], "bad.json: not a conversation that /save wrote"),
    ],
)
def test_mistakes_are_told(talk, tmp_path, capsys, lines, message):
    (tmp_path / "empty.png").touch()
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(SystemExit) as ended:
        talk(*lines)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
