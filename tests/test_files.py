"""Promises of files: whole or not there at every moment, replaced only by their own kind, locked while they are written; JSON by one reader."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from unitok.bundle import Bundle
from unitok.errors import UserError
from unitok.files import (
    atomic_write,
    check_inputs,
    check_replaceable,
    json_line,
    kind_of,
    lock,
    read_json,
    read_json_lines,
    remove_partials,
    settle,
    whole_folder,
    write_json,
    write_json_lines,
    write_text,
)

SEPARATORS = [c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) > 1]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; -> its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child runs nothing that threads could hold
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- One file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_kill_while_a_file_is_written_leaves_the_one_before_and_the_next_writer_clears_up(tmp_path, moment):
    path = tmp_path / "scores.json"
    write_text(path, "before")

    def killed() -> None:
        if moment != "write":
            setattr(os, moment, die)
        with atomic_write(path) as file:
            file.write("half")
            file.flush()
            if moment == "write":
                die()

    assert in_a_child(killed) == -signal.SIGKILL
    assert path.read_text() == "before"
    assert names(tmp_path) == [".scores.json.partial", "scores.json"]  # what is left is not taken for anything
    write_text(path, "after")
    assert contents(tmp_path) == {"scores.json": b"after"}


def test_what_killed_processes_left_in_a_staging_folder_is_removed_by_its_owner(tmp_path):
    (tmp_path / "work").mkdir()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a", staging=tmp_path / "work") as file:
            raise KeyboardInterrupt
        assert names(tmp_path / "work") == []  # an error leaves nothing
    for _ in range(2):
        with atomic_write(tmp_path / "a", staging=tmp_path / "work") as file:  # two at once: each in a file of its own
            with atomic_write(tmp_path / "a", staging=tmp_path / "work") as other:
                other.write("other")
            file.write("last")
        assert (tmp_path / "a").read_text() == "last"
    in_a_child(lambda: [setattr(os, "fsync", die), write_text(tmp_path / "a", "half", tmp_path / "work")])
    assert len(names(tmp_path / "work")) == 1
    remove_partials(tmp_path / "work")
    assert contents(tmp_path) == {"a": b"last"}


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_one_before(tmp_path):
    code = (
        "import resource, sys; from unitok.files import write_text; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 9999)\n"
        "except OSError as error: print(error.filename, error.strerror)"
    )
    write_text(tmp_path / "a", "before")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'a'} File too large\n"
    assert contents(tmp_path) == {"a": b"before"}


def test_two_processes_that_write_one_file_take_turns(tmp_path):
    begun, begins = os.pipe()

    def other() -> None:
        os.write(begins, b"!")
        write_text(tmp_path / "a", "second")

    with atomic_write(tmp_path / "a") as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            other()
            os._exit(0)
        os.read(begun, 1)
        file.write("first")
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it waits
    assert os.waitpid(child, 0)[1] == 0
    assert contents(tmp_path) == {"a": b"second"}


def test_a_file_that_is_replaced_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    mask = os.umask(0o022)
    os.umask(mask)
    write_text(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


# ---- Locks ----------------------------------------------------------------------------------------------------------


def test_a_lock_keeps_others_off_or_waiting_and_ends_with_its_process(tmp_path):
    path = tmp_path / "l"
    with lock(path, "busy", shared=True):
        with lock(path, "busy", shared=True):
            pass
        with pytest.raises(UserError, match="^taken$"), lock(path, "taken"):
            pass
    with lock(path, "busy"), pytest.raises(UserError, match="^taken$"), lock(path, "taken", shared=True):
        pass
    assert in_a_child(lambda: [lock(path).__enter__(), die()]) == -signal.SIGKILL
    with lock(path, "busy"):
        assert in_a_child(lambda: lock(path, "taken").__enter__()) == 1  # a child holds none of its parent's locks
    with pytest.raises(FileNotFoundError), lock(tmp_path / "gone" / "l"):
        pass


def test_who_waited_for_a_file_that_was_renamed_holds_the_new_one(tmp_path):
    path = tmp_path / "l"
    begun, begins = os.pipe()

    with lock(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            os.write(begins, b"!")
            with lock(path):
                os._exit(0 if path.exists() else 1)
        os.read(begun, 1)
        path.rename(tmp_path / "elsewhere")
    assert os.waitpid(child, 0)[1] == 0


# ---- One folder -----------------------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_of_replacing_a_folder_is_mended_by_who_looks_next(bundle_folder, tmp_path):
    here, more = tmp_path / "b", contents(bundle_folder)

    def killed_at(moment: int) -> bool:
        """Replace the bundle in a process that ends without a word before or after its n-th renaming."""
        calls, rename = [], os.rename

        def dying(*names):
            calls.append(names)
            if moment == 2 * len(calls) - 1:
                die()
            rename(*names)
            if moment == 2 * len(calls):
                die()

        def replaces() -> None:
            os.rename = dying
            with whole_folder(here, "bundle", overwrite=True) as new:
                shutil.copytree(bundle_folder, new, dirs_exist_ok=True)
                (new / "vocab.json").write_bytes(more["vocab.json"] + b" ")

        return in_a_child(replaces) == -signal.SIGKILL

    moments = 0
    while True:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(bundle_folder, here)
        (here / "mine.txt").write_text("mine")
        if not killed_at(moments + 1):
            break
        moments += 1
        if moments % 2:
            Bundle.from_pretrained(here, parts=("text",))  # a reader
        else:
            settle(here)
        found = contents(here)
        assert found.pop("mine.txt") == b"mine"
        assert found in (more, more | {"vocab.json": more["vocab.json"] + b" "})
        assert not killed_at(0)  # and the next writer
        assert names(tmp_path) == ["b"]
    assert moments == 6


def test_two_commands_never_write_one_folder_at_once_and_a_full_disk_changes_nothing(tmp_path):
    with whole_folder(tmp_path / "b", "decoder") as new:
        (new / "config.json").write_text("{}")
        with pytest.raises(UserError, match="another command is writing it"), whole_folder(tmp_path / "b", "decoder"):
            pass
    assert contents(tmp_path / "b") == {"config.json": b"{}"}
    full = pytest.raises(UserError, match="No space left on device; the folder was left unchanged")
    for name in (None, "a file inside"):
        with full, whole_folder(tmp_path / "b", "decoder", overwrite=True) as new:
            (new / "config.json").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *filter(None, [name]))
        assert contents(tmp_path) == {"b/config.json": b"{}"}


def test_what_a_killed_command_left_half_written_is_cleared_by_the_next(tmp_path):
    def killed() -> None:
        with whole_folder(tmp_path / "b", "decoder") as new:
            (new / "sub").mkdir()
            (new / "sub" / "half").write_text("half")
            die()

    assert in_a_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    with whole_folder(tmp_path / "b", "decoder") as new:
        write_json(new / "config.json", {})
    assert contents(tmp_path) == {"b/config.json": b"{}\n"}


def test_the_current_folder_and_what_is_read_are_never_replaced(bundle_folder, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("mine")
    monkeypatch.chdir(tmp_path / "home")
    for folder in (".", "..", str(tmp_path)):
        with pytest.raises(UserError, match="the current folder, or one above it"), whole_folder(folder, "bundle", True):
            pass
    (tmp_path / "link").symlink_to(bundle_folder)
    for folder in (bundle_folder, bundle_folder.parent, tmp_path / "link"):
        with pytest.raises(UserError, match="contains the input .*; choose another folder"):
            check_inputs(folder, ["x", bundle_folder])
    check_inputs(tmp_path / "new", [bundle_folder])
    assert (tmp_path / "home" / "thesis").read_text() == "mine"


def test_a_part_of_any_name_is_known_as_unitoks_and_only_by_its_own_kind_replaced(tmp_path):
    def save(folder: Path, kind: str, text: str) -> None:
        with whole_folder(folder, kind) as new:
            write_json(new / "config.json", {"unitok": 1, "kind": kind, "text": text})

    save(tmp_path / "p", "speech tokenizer", "first")
    (tmp_path / "p" / "mine.txt").write_text("mine")
    save(tmp_path / "p", "speech tokenizer", "second")
    assert read_json(tmp_path / "p" / "config.json", "")["text"] == "second"
    assert kind_of(tmp_path / "p") == "speech tokenizer"
    assert (tmp_path / "p" / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="holds a speech tokenizer; choose another folder"):
        save(tmp_path / "p", "decoder", "")
    with pytest.raises(UserError, match=r"mine.txt/a/b: .*mine.txt is a file; give a folder"):
        check_replaceable(tmp_path / "p" / "mine.txt" / "a" / "b", "decoder")  # before the work, not after it
    speech = tmp_path / "b" / "tokenizers" / "speech"
    save(speech, "speech tokenizer", "inside")
    for name, value in (("bundle.json", {"version": 1, "parts": ["speech"]}), ("vocab.json", {})):
        write_json(tmp_path / "b" / name, value)
    with pytest.raises(UserError, match=f"a speech tokenizer of the bundle {tmp_path / 'b'}"):
        check_replaceable(speech, "speech tokenizer")
    with pytest.raises(UserError, match=r"holds a bundle \(speech\)"), whole_folder(tmp_path / "b", "bundle") as new:
        shutil.copy(tmp_path / "b" / "bundle.json", new)  # the part would be lost
    assert speech.exists()


# ---- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1]", "a JSON list, not an object"),
        (b"3", "a JSON int, not an object"),
        (b'{"a": 1', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 9999 + b"}", "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not JSON"),
        (b'{"b": 1}', "has no a; it is damaged"),
        (None, "no such file; make one"),
    ],
    ids=["a list", "a number", "cut off", "too many brackets", "too many digits", "UTF-16", "a key that is missing", "none"],
)
def test_a_file_of_wrong_json_is_one_line_that_names_it(tmp_path, content, says):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        read_json(tmp_path / "x.json", "make one", "a")
    assert str(raised.value).startswith(f"{tmp_path / 'x.json'}: ")
    assert "\n" not in str(raised.value)


def test_json_comes_back_whatever_editor_saved_it(tmp_path):
    value = {"é\u2028": ["漢", 1.5, None]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "") == value
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())  # with a byte order mark
    assert read_json(tmp_path / "x.json", "") == value


def test_json_lines_come_back_with_their_numbers_and_bad_lines_with_why(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"text": f"é{c}漢"} for c in SEPARATORS] + [None, "\ud800", 3]
    assert len(rows) > 12
    write_json_lines(path, iter(rows))
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(rows)  # a line each, for every reader
    assert list(read_json_lines(path)) == list(enumerate(rows, 1))
    path.write_bytes(b"\xef\xbb\xbf1\r\n\n  \n{\n" + b"[" * 100_000 + b'\n"last"')
    found = dict(read_json_lines(path))
    assert found.keys() == {1, 4, 5, 6}
    assert (found[1], found[6]) == (1, "last")
    assert str(found[4]).startswith("x.jsonl, line 4: not JSON (Expecting property name enclosed in double quotes at column ")
    assert str(found[5]) == "x.jsonl, line 5: JSON with too many nested brackets; mend or remove the line"
    path.write_text('{"id": "bad", "content": [\n')
    assert "Expecting value at column 27" in str(dict(read_json_lines(path))[1])
    for content, says in (("1".encode("utf-16"), "not UTF-8 text; convert it"), (None, "no such file")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"x.jsonl: {says}"):
            list(read_json_lines(path))


def test_a_line_is_readable_text(tmp_path):
    line = json_line({"text": "漢", "key\u2028": [1, None]})
    assert line == '{"text": "漢", "key\\u2028": [1, null]}'
