"""Promises about files of strangers: nothing leads elsewhere, damage costs what is damaged, and all of it is listed."""

import bz2
import gzip
import io
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from raw_data import errors_of, found_in, png, table_of, tar_of, wav

from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.sources import Source
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.errors import UserError
from unitok.media import open_audio
from unitok.storage import open_files


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(png())
    inside = tmp_path / "in"
    (inside / "sub").mkdir(parents=True)
    (inside / "ok.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (inside / "alias.png").symlink_to("ok.png")
    (inside / "folder").symlink_to(tmp_path / "outside")
    (inside / "loop").symlink_to(inside)
    os.mkfifo(inside / "pipe.png")
    good, bad = found_in(inside)
    assert [raw.id for raw in good] == ["alias.png", "ok.png"]
    for name, why in (("folder:", "leaves"), ("link.png", "leaves"), ("loop", "not followed"), ("pipe.png", "a pipe")):
        assert sum(name in line and why in line for line in bad) == 1, (name, bad)
    paths = ["../outside/secret.png", str(tmp_path / "outside" / "secret.png"), "link.png", "sub/../ok.png", "pipe.png"]
    lines = [json.dumps({"content": [{"type": "image", "path": path}]}) for path in paths]
    (inside / "documents.jsonl").write_text("\n".join(lines))
    good, bad = found_in(inside)
    assert [raw.where for raw in good] == ["documents.jsonl, line 4"]
    assert len(bad) == 4
    good, bad = found_in(inside, root=str(tmp_path))
    assert len(good) == 4
    assert len(bad) == 1


def test_the_file_that_is_named_is_read_wherever_the_root_and_its_link_lead(tmp_path):
    for name in ("media", "lines", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png())
    paths = [str(tmp_path / "media" / "0.png"), "0.png", str(tmp_path / "elsewhere" / "0.png")]
    rows = [json.dumps({"content": [{"type": "image", "path": path}]}) for path in paths]
    (tmp_path / "lines" / "all.jsonl").write_text("\n".join(rows))
    (tmp_path / "lines" / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "all.jsonl")
    (tmp_path / "elsewhere" / "all.jsonl").write_text("\n".join(rows))
    for name in ("all", "link"):
        good, bad = found_in(tmp_path / "lines" / f"{name}.jsonl", root=str(tmp_path / "media"))
        assert [raw.where for raw in good] == [f"{name}.jsonl, line 1", f"{name}.jsonl, line 2"]
        assert len(bad) == 1
        assert "`root` names another folder" in bad[0]
    with pytest.raises(UserError, match=f"^{tmp_path}/gone: no such folder"):  # the folder is to blame, not the root
        open_files(f"{tmp_path}/gone", str(tmp_path))
    with pytest.raises(UserError, match=f"^root {tmp_path}: the paths of a URL .*cannot lead out of it"):
        open_files("memory://bucket", str(tmp_path))
    with pytest.raises(UserError, match="root .*gone: no such folder"):
        found_in(tmp_path / "lines" / "all.jsonl", root=str(tmp_path / "gone"))


def test_members_of_archives_that_lead_elsewhere_are_refused(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as archive:
        for name in ("../up.png", "/abs.png", "bad\udcff.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        device = tarfile.TarInfo("device.png")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    good, bad = found_in(tmp_path / "a.tar")
    assert [raw.id for raw in good] == ["good"]
    assert len(bad) == 5
    assert all("a.tar" in line for line in bad)


def test_names_that_are_not_utf8_are_listed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as file:
        file.write(png())
    (tmp_path / "é.png").write_bytes(png())
    good, bad = found_in(tmp_path)
    assert [raw.id for raw in good] == ["é.png"]
    assert bad == ["bad\\xff.png: its name is not UTF-8; rename it"]
    json.dumps(bad).encode("utf-8")


def test_files_that_change_are_not_used(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    source = Source(SourceSpec(str(tmp_path)))
    items = list(source.items())
    (tmp_path / "a.png").write_bytes(png(1) + b"more")
    first, second = source.read(items)
    with pytest.raises(UserError, match=r"a.png: has changed since the run was planned"):
        first()[0].content[0].file.read()
    assert second()[0].content[0].file.read() == png()
    (tmp_path / "documents.jsonl").write_text('{"content": [{"type": "text", "text": "a"}]}\n')
    source = Source(SourceSpec(str(tmp_path)))
    items = list(source.items())
    (tmp_path / "documents.jsonl").write_text('{"content": [{"type": "text", "text": "another"}]}\n')
    with pytest.raises(UserError, match="documents.jsonl: has changed"):
        list(source.read(items))


def test_damaged_containers_give_what_comes_before_the_damage(tmp_path):
    members = [(f"{i:03d}.txt", b"text %d" % i) for i in range(50)]
    whole = tar_of(members)
    cases = {
        "cut.tar": whole[: 512 * 51 + 100],
        "torn.tar": whole[: 512 * 40] + b"\xa7" * 512 + whole[512 * 41 :],
        "cut.tar.gz": gzip.compress(whole)[:-200],
        "no.tar": b"no archive at all",
        "no.parquet": b"PAR1 but no table",
        "no.arrow": b"ARROW?",
        "lines.jsonl.bz2": bz2.compress(b'{"content": [{"type": "text", "text": "ok"}]}\n' * 3)[:-9],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        good, bad = found_in(tmp_path / name)
        assert bad or name == "no.tar", name  # which is text, and read as that
        assert all(name in line for line in bad)
        if name == "cut.tar":
            assert 15 < len(good) < 50
            assert "the rest cannot be read" in bad[-1]
        if name == "torn.tar":  # it goes on after the damage
            assert len(good) == 49
            assert "are not a member" in bad[0]


def test_damaged_pages_of_a_table_cost_their_rows_alone(bundle_folder, tmp_path):
    rows = [{"caption": f"number {i} " * 40, "image": {"bytes": png(i), "path": None}} for i in range(40)]
    pq.write_table(table_of(rows), tmp_path / "t.parquet", row_group_size=10, compression="zstd")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    for at in range(start + 40, start + 400):
        content[at] ^= 0xFF
    (tmp_path / "t.parquet").write_bytes(content)
    tokenize(Plan(str(tmp_path / "t.parquet"), str(tmp_path / "out"), str(bundle_folder)))
    data = TokenDataset(tmp_path / "out")
    made = {data.document(i).id for i in range(len(data))}
    bad = errors_of(tmp_path / "out")
    assert {f"t.parquet/{i}" for i in (*range(10), *range(20, 40))} <= made
    assert bad
    assert len(made) + len(bad) == 40


def test_compressed_files_with_flipped_bits_are_listed(tmp_path):
    lines = b"".join(b'{"content": [{"type": "text", "text": "%d"}]}\n' % i for i in range(5000))
    for name, data in (("a.jsonl.gz", lines), ("b.tar.gz", tar_of([(f"{i}.txt", b"%d" % i) for i in range(500)]))):
        packed = bytearray(gzip.compress(data))
        packed[len(packed) // 2] ^= 0xFF
        (tmp_path / name).write_bytes(packed)
        _, bad = found_in(tmp_path / name)
        assert any(name in line for line in bad)


def test_an_output_in_its_own_source_is_refused(bundle_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="is inside the source"):
        tokenize(Plan(str(tmp_path), str(tmp_path / "tokens"), str(bundle_folder)))
    assert not (tmp_path / "tokens").exists()


def test_what_cannot_be_used_is_listed_never_passed_over(tmp_path):
    cases = {
        "empty.png": (b"", "an empty file"),
        "hidden_tar.bin": (tar_of([("a.txt", b"a")]), "name it .tar"),
        "table.dat": (b"PAR1\x00\x00", "name it .parquet"),
        "zeros.raw": (bytes(100), "nothing but zeros"),
        "noise.raw": (b"\x00\xfe\x01", "neither an image nor audio nor UTF-8 text"),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    good, bad = found_in(tmp_path)
    assert not good
    for name, (_, why) in cases.items():
        assert sum(name in line and why in line for line in bad) == 1, (name, bad)


def test_what_no_one_thought_of_is_listed_too(bundle_folder, tmp_path):
    lines = ['{"content": [{"type": "text", "text": "good"}]}', '{"content": ' + "[" * 200_000, '{"id": "x", "content": 7}']
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    info = tokenize(Plan(str(tmp_path / "documents.jsonl"), str(tmp_path / "out"), str(bundle_folder)))
    assert info is not None
    assert info["documents"] == 1
    found = errors_of(tmp_path / "out")
    assert len(found) == 2
    assert all(f"line {n}" in line for n, line in zip((2, 3), found, strict=True))


def test_text_where_an_image_or_audio_should_be_is_listed(tmp_path):
    page = b"<html>404 not found</html>"
    (tmp_path / "folder").mkdir()
    for name, data in {
        "a.jpg": page,
        "a.txt": b"a dog",
        "b.WAV": b"version https://git-lfs",
        "c.tar": b"prose",
        "d.pdf": b"%PDF",
    }.items():
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "a.tar").write_bytes(tar_of([("1.jpg", page), ("1.txt", b"a dog"), ("2.cls", b"7"), ("2.txt", b"kept")]))
    table = table_of([{"caption": "a dog", "image": {"bytes": page, "path": None}}])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a dog", "image": "folder/a.jpg"}')
    for source, count in (("folder", 4), ("a.tar", 1), ("a.parquet", 1), ("a.jsonl", 1)):
        good, bad = found_in(tmp_path / source)
        assert [[part.value for part in raw.content] for raw in good] == ([["kept"]] if source == "a.tar" else [])
        assert len(bad) == count
        assert all(": text, where a" in line and "should be" in line for line in bad), bad


def test_a_byte_order_mark_is_no_text_and_a_caption_is_told_from_its_record(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "caption.json").write_text('{"caption": "seen"}')
    (tmp_path / "other.json").write_text('{"size": 3}')
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first line"}')
    good, bad = found_in(tmp_path)
    assert [raw.content[0].value for raw in good] == [
        "first line",
        "marked",
        "seen",
        '{"size": 3}',
    ]  # files that hold many come first
    assert not bad


def test_parts_that_say_what_no_part_says_are_refused(tmp_path):
    lines = ['{"type": "text", "text": "x", "los": false}', '{"type": "image", "path": "https://there/a.png"}']
    (tmp_path / "x.jsonl").write_text("\n".join(f'{{"content": [{line}]}}' for line in lines))
    good, bad = found_in(tmp_path)
    assert not good
    assert "line 1, part 1: los: unknown; a part of type text has type, text, role, loss" in bad[0]
    assert "line 2, part 1: https://there/a.png is a URL, which is not followed" in bad[1]


def test_a_sound_that_is_cut_off_is_listed_and_one_of_a_stream_is_not(tmp_path):
    audio = wav(seconds=1.0)
    (tmp_path / "cut.wav").write_bytes(audio[: len(audio) // 2])
    (tmp_path / "stream.wav").write_bytes(audio[:4] + b"\xff\xff\xff\xff" + audio[8:])
    for name, fails in (("cut.wav", True), ("stream.wav", False)):
        for data in (None, (tmp_path / name).read_bytes()):
            if fails:
                with pytest.raises(UserError, match=f"{name}: audio that is cut off: its header says 1.00 s, 0.50 s can"):
                    open_audio(tmp_path / name, data)
            else:
                with open_audio(tmp_path / name, data) as file:
                    assert file.frames == file.samplerate
