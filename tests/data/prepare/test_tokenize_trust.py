"""Promises of tokenize under trouble: killed, run twice at once, shared out, out of space, fed damaged files."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unitok.data.prepare import encode
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.tokenize import estimate, locked, tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.media.audio_streams import SLACK
from unitok.scenes.files import write_scenes


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix != ".log"}


def start(*words: object, limit: int = 0) -> subprocess.Popen:
    """`unitok tokenize` in a process of its own; limit: bytes that its files may have."""
    set_limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    command = [sys.executable, "-m", "unitok", "tokenize", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=set_limit)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(child) for child in tasks.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill_until_done(
    command: list[object], out: Path, kills: int, longest: float, also: Callable[[], list[int]] | None = None
) -> int:
    """Start, kill a random one of the run's processes at a random moment, start again; -> kills that hit before the end.

    also: other processes of the run than its own children.
    """
    rng = random.Random(5)
    hits = 0
    while hits < kills:
        run = start(*command)
        time.sleep(rng.uniform(0, longest))
        victims = [run.pid, *children_of(run.pid), *(also() if also else [])]
        if run.poll() is not None:
            assert (out / "dataset.json").exists(), run.communicate()[1]
            return hits
        victim = rng.choice(victims)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        hits += 1
        try:
            run.wait(timeout=60 if victim == run.pid else 10)  # without a worker it says so; without an actor it goes on
        except subprocess.TimeoutExpired:
            run.kill()
        run.communicate()
    last = start(*command)
    _, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    return hits


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_ends_with_the_same_bytes(scenes_folder, bundle_folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tokenize(Plan(str(scenes_folder), str(whole), str(bundle_folder), documents_per_shard=4))
    command = [scenes_folder, cut, "--bundle", bundle_folder, "--workers", 2, "--documents-per-shard", 4]
    run = start(*command)
    while not list(cut.glob("shard-*.arrow")) and run.poll() is None:
        time.sleep(0.01)
    victims = children_of(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (cut / "dataset.json").exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in victims) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)  # workers end with their parent
    made = {
        f.name: f.stat().st_mtime_ns for f in cut.glob("shard-*.arrow") if (cut / ".work" / f"{f.name[6:11]}.json").exists()
    }
    tokenize(Plan(str(scenes_folder), str(cut), str(bundle_folder), documents_per_shard=4))
    assert files_of(cut) == files_of(whole)
    assert not (cut / ".work").exists()
    for name, stamp in made.items():
        assert (cut / name).stat().st_mtime_ns == stamp  # what was whole is kept


@pytest.mark.long
def test_twenty_kills_of_two_workers_change_no_byte(bundle_folder, tmp_path):
    write_scenes(tmp_path / "scenes", 4000, seed=9, max_objects=2)
    tokenize(Plan(str(tmp_path / "scenes"), str(tmp_path / "whole"), str(bundle_folder), documents_per_shard=64), workers=2)
    hits, tried = 0, 0
    while hits < 20:
        out = tmp_path / f"cut{tried}"
        command = [tmp_path / "scenes", out, "--bundle", bundle_folder, "--workers", 2, "--documents-per-shard", 64]
        hits += kill_until_done(command, out, 20 - hits, longest=16)
        assert files_of(out) == files_of(tmp_path / "whole")
        tried += 1
    print(f"{hits} kills, {tried} outputs, all equal to the uncut one")


@pytest.mark.long
def test_five_kills_of_rays_driver_or_actors_change_no_byte(bundle_folder, tmp_path):
    pytest.importorskip("ray")
    write_scenes(tmp_path / "scenes", 6000, seed=9, max_objects=2)
    tokenize(Plan(str(tmp_path / "scenes"), str(tmp_path / "whole"), str(bundle_folder), documents_per_shard=64), workers=2)

    def actors() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"ray::Actor" in process.read_bytes():
                    found.append(int(process.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    hits, tried = 0, 0
    while hits < 5:
        out = tmp_path / f"cut{tried}"
        command = [
            tmp_path / "scenes",
            out,
            "--bundle",
            bundle_folder,
            "--workers",
            2,
            "--documents-per-shard",
            64,
            "--engine",
            "ray",
        ]
        hits += kill_until_done(command, out, 5 - hits, longest=40, also=actors)
        assert files_of(out) == files_of(tmp_path / "whole")
        tried += 1
    print(f"{hits} kills, {tried} outputs, all equal to the uncut one")


def test_ray_gives_the_same_bytes(scenes_folder, bundle_folder, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        tokenize(Plan(str(scenes_folder), str(tmp_path / "ray"), str(bundle_folder), documents_per_shard=20), 2, engine="ray")
    finally:
        ray.shutdown()
    tokenize(Plan(str(scenes_folder), str(tmp_path / "local"), str(bundle_folder), documents_per_shard=20))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_the_work_can_be_shared_out(scenes_folder, bundle_folder, tmp_path):
    whole, parts = (Plan(str(scenes_folder), str(tmp_path / name), str(bundle_folder), documents_per_shard=10) for name in "ab")
    tokenize(whole)
    assert [tokenize(parts, part=(i, 3)) is None for i in (2, 0, 1)] == [True, True, False]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with pytest.raises(UserError, match="part 3 of 3"):
        tokenize(parts, part=(3, 3))


def test_two_runs_on_one_output_do_not_mix(scenes_folder, bundle_folder, tmp_path):
    plan = Plan(str(scenes_folder), str(tmp_path / "out"), str(bundle_folder))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another `unitok tokenize` is at work on it"):
        tokenize(plan)
    with locked(tmp_path / "out", (0, 2)), pytest.raises(UserError, match="another"):
        tokenize(plan)
    with locked(tmp_path / "out", (0, 2)):
        assert tokenize(plan, part=(1, 2)) is None
    tokenize(plan)


def test_a_full_disk_is_one_line_and_the_run_goes_on(scenes_folder, bundle_folder, tmp_path):
    out = tmp_path / "out"
    command = [scenes_folder, out, "--bundle", bundle_folder, "--workers", 1, "--documents-per-shard", 70]
    run = start(*command, limit=20_000)  # the listing fits, a shard does not
    _, said = run.communicate()
    assert run.returncode == 2
    assert said.strip().splitlines()[-1] == f"error: {out}: File too large; make room and start again: what is done is kept"
    assert not list(out.glob("shard-*"))
    assert not list((out / ".work").glob("*.partial"))
    tokenize(Plan(str(scenes_folder), str(out), str(bundle_folder), documents_per_shard=70))
    assert TokenDataset(out).verify() == []


def catches(pid: int, sent: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(caught and int(caught[1], 16) >> (sent - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("sent", "at_work"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_run_that_is_asked_to_stop_says_one_line(scenes_folder, bundle_folder, tmp_path, sent, at_work):
    """As soon as it listens, while it still loads; and when its workers have made a shard."""
    (tmp_path / "r.yaml").write_text(json.dumps({"sources": [{"path": str(scenes_folder), "weight": 100}]}))
    words = (
        tmp_path / "out",
        "--recipe",
        tmp_path / "r.yaml",
        "--bundle",
        bundle_folder,
        "--workers",
        2,
        "--documents-per-shard",
        64,
    )
    command = [sys.executable, "-m", "unitok", "tokenize", *map(str, words)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    reached = (lambda: list(tmp_path.glob("out/shard-*.arrow"))) if at_work else (lambda: catches(run.pid, sent))
    while run.poll() is None and not reached():
        time.sleep(0.01)
    os.killpg(run.pid, sent) if sent == signal.SIGINT else run.send_signal(sent)  # Ctrl-C reaches all, SIGTERM the parent
    said = run.communicate(timeout=120)[1]
    # CPython ends by SIGINT itself (-2; 130 to a shell) if the interrupt came while a string was executed, as dataclasses do.
    assert run.returncode in (130, -signal.SIGINT), said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == "stopped; start it again to go on"


def test_too_many_bad_files_stop_the_run_early(bundle_folder, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(400):
        (source / f"{i:03d}.txt").write_bytes(b"good" if i % 2 else b"\xff\xfe\x00")
    plan = Plan(str(source), str(out), str(bundle_folder), documents_per_shard=50)
    with pytest.raises(UserError, match=r"of 100 documents could not be used, over max_error_rate 0.1") as caught:
        tokenize(plan, max_error_rate=0.1)
    assert "\n" not in str(caught.value)
    assert re.search(r"; the first: 000\.txt: .*UTF-8.*; all are in ", str(caught.value))
    listed = [json.loads(line)["id"] for line in (out / "errors.jsonl").read_text().splitlines()]
    assert listed == [f"{i:03d}.txt" for i in range(0, 100, 2)]
    assert tokenize(plan, max_error_rate=0.6)["documents"] == 200
    assert len((out / "errors.jsonl").read_text().splitlines()) == 200


def test_few_documents_are_judged_only_when_a_rate_is_asked_for(bundle_folder, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"good" if i else b"\xff\xfe\x00")
    out = tmp_path.with_name(f"{tmp_path.name}-out")
    plan = Plan(str(tmp_path), str(out), str(bundle_folder))
    with pytest.raises(UserError, match="1 of 4 documents could not be used"):
        tokenize(plan, max_error_rate=0.1)
    assert tokenize(plan)["documents"] == 3


def test_a_bad_image_with_crops_is_one_bad_document(bundle_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(10):
        Image.new("RGB", (40, 40), (i * 20, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "bad.png").write_bytes((tmp_path / "in" / "0.png").read_bytes()[:60])
    plan = Plan(
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        str(bundle_folder),
        spec=SourceSpec("", options={"image": {"crops": 4, "flip": True}}),
    )
    info = tokenize(plan, max_error_rate=0.1)
    assert (info["documents"], info["shards"][0]["items"], info["shards"][0]["skipped"]) == (60, 11, 1)


def test_an_estimate_is_near_the_truth(scenes_folder, bundle_folder, tmp_path):
    plan = Plan(str(scenes_folder), str(tmp_path / "out"), str(bundle_folder))
    found = estimate(plan, sample=40)
    assert not (tmp_path / "out").exists()
    info = tokenize(plan)
    assert found.listed == info["documents"]
    assert found.tokens == pytest.approx(info["tokens"], rel=0.25)
    assert found.gigabytes * 1e9 == pytest.approx(sum(s["bytes"] for s in info["shards"]), rel=0.4)


def test_little_room_slows_it_down_and_changes_nothing(scenes_folder, bundle_folder, tmp_path, monkeypatch):
    plans = [Plan(str(scenes_folder), str(tmp_path / name), str(bundle_folder)) for name in ("wide", "tight", "stopped")]
    tokenize(plans[0])
    monkeypatch.setattr(encode, "HELD_BYTES", 1)
    tokenize(plans[1])
    assert files_of(tmp_path / "wide") == files_of(tmp_path / "tight")

    def no_network(*_: object) -> None:
        raise RuntimeError("the network failed")

    monkeypatch.setattr(encode._Work, "_flush", no_network)
    with pytest.raises(RuntimeError, match="the network failed"):  # and its threads do not wait forever
        tokenize(plans[2])


# ---- Damaged files --------------------------------------------------------------------------------------------------


def bomb(side: int = 40_000) -> bytes:
    """A PNG of a few kilobytes that unpacks to gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def damage(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    if kind == "truncated":
        return data[: int(rng.integers(1, len(data)))]
    if kind == "flipped":
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            changed[at] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    return {"empty": b"", "bomb": bomb()}[kind]


def decodes(path: Path) -> bool:
    """Whether the reference libraries read a file."""
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:  # whatever Pillow raises
        pass
    try:
        return len(soundfile.read(path)[0]) > 0
    except Exception:  # whatever libsndfile raises
        pass
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def shorter(path: Path, by: int = 0) -> bool:
    """Whether the reference library finds less audio in a damaged file than in the good one beside it, by more than so many samples."""
    good = path.with_name(f"{path.name[:5]}{path.suffix}")
    try:
        return len(soundfile.read(path)[0]) + by < len(soundfile.read(good)[0])
    except soundfile.LibsndfileError:  # no audio, neither or one of the two
        return False


def write_good_and_damaged(folder: Path, count: int) -> tuple[set[str], set[str]]:
    """`count` good images, audio files and texts, and as many damaged ones, side by side; -> their names."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    good, bad = set(), set()
    kinds = ("truncated", "flipped", "misnamed", "empty", "bomb")
    for i in range(count):
        suffix = (".png", ".jpg", ".wav", ".flac", ".ogg")[i % 5]
        path = folder / f"{i:05d}{suffix}"
        if suffix in (".png", ".jpg"):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        else:
            soundfile.write(path, rng.uniform(-0.5, 0.5, 1600), 8000)
        good.add(path.name)
        kind = kinds[i // 5 % 5]
        wrong = folder / f"{i:05d}-{kind}{suffix}"
        if kind == "misnamed":  # a good file with the suffix of another kind: content decides
            wrong = wrong.with_suffix(
                {".png": ".wav", ".jpg": ".flac", ".wav": ".png", ".flac": ".jpg", ".ogg": ".gif"}[suffix]
            )
            wrong.write_bytes(path.read_bytes())
        else:
            wrong.write_bytes(damage(kind, path.read_bytes(), rng))
        bad.add(wrong.name)
    return good, bad


def check_damaged(folder: Path, out: Path, bundle: Path, good: set[str], bad: set[str], workers: int = 1) -> int:
    """Tokenize and compare with the reference libraries; -> how many damaged files were listed."""
    tokenize(Plan(str(folder), str(out), str(bundle)), workers, max_error_rate=1.0)
    data = TokenDataset(out)
    assert data.verify() == []
    made = {data.document(i).id for i in range(len(data))}
    listed = {json.loads(line)["id"] for line in (out / "errors.jsonl").read_text().splitlines()}
    assert good <= made
    assert made | listed == good | bad
    assert not made & listed
    for name in made - good:
        assert decodes(folder / name), name
        assert not shorter(folder / name, SLACK // 2), name  # samples of two bytes
    for name in listed:  # nothing is left out that the reference libraries read in full
        assert not decodes(folder / name) or shorter(folder / name), name
    return len(listed)


def test_damaged_files_among_good_ones_are_listed_and_nothing_else_is_lost(bundle_folder, tmp_path):
    good, bad = write_good_and_damaged(tmp_path / "in", 250)
    assert check_damaged(tmp_path / "in", tmp_path / "out", bundle_folder, good, bad) > 100


@pytest.mark.long
def test_two_thousand_damaged_files_among_as_many_good_ones(bundle_folder, tmp_path):
    good, bad = write_good_and_damaged(tmp_path / "in", 2000)
    listed = check_damaged(tmp_path / "in", tmp_path / "out", bundle_folder, good, bad, workers=2)
    assert listed > len(bad) // 2  # the others are as good as undamaged: names alone, or bits that do not matter
    print(f"{len(good)} good documents are there; of {len(bad)} damaged files {listed} are listed, the others decode")
