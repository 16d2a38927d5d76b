"""Promises of JSON Lines: a line for every reader, text readable as it is, a byte order mark passed over."""

import json
import sys

import pytest

from unitok.document import Part, RawDocument
from unitok.errors import UserError
from unitok.files import json_line
from unitok.interleaved import format_raw_document, read_raw_documents

SEPARATORS = [c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) > 1]


def test_what_is_written_is_one_line_for_every_reader(tmp_path):
    assert len(SEPARATORS) > 9  # of str.splitlines: \\n and more than JSON escapes
    text = "".join(f"é{c}漢" for c in SEPARATORS)
    line = json_line({"text": text, "key\u2028": [1, None]})
    assert line.splitlines() == [line]
    assert "漢" in line
    assert json.loads(line) == {"text": text, "key\u2028": [1, None]}
    assert json.loads(json_line("\ud800").encode()) == "\ud800"  # a name that is not UTF-8 can be written down
    document = RawDocument("7", (Part("text", text), Part("text", "two", role="user", loss=False)))
    written = format_raw_document(document, tmp_path)
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{written}\r\n\n{written}\n".encode())
    read = list(read_raw_documents(tmp_path / "d.jsonl"))
    assert [(d.id, d.content) for d in read] == [("7", document.content)] * 2


def test_a_file_that_is_no_utf8_is_one_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes("{}".encode("utf-16"))
    with pytest.raises(UserError, match=r"d.jsonl: not UTF-8 text; convert it"):
        list(read_raw_documents(tmp_path / "d.jsonl"))
