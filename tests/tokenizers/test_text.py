"""Promises of the text tokenizer: any text trains or is refused in one line, and every string comes back as it was."""

import random

import pytest

from unitok.cli import main
from unitok.data.prepare.texts import read_texts
from unitok.errors import UserError
from unitok.tokenizers import TextTokenizer
from unitok.tokenizers.text import MAX_LINE, cut_line

#: Characters and strings that tokenizers, normalizers and readers treat apart.
AWKWARD = [
    *("<unk>", "<s>", "</s>", "<pad>", "<0x0A>", "<0xE2>", "▁", "▅", "\0", "\t", "\r", "\n", "\r\n", " ", "  ", "\x0b", "\x1c", "\x7f", "\x85"),
    *("\u2028", "\u2029", "\ufeff", "\ufffd", "\ufffe", "\uffff", "\u00a0", "\u3000", "\u200b", "\u200d", "\u0301", "e\u0301", "é", "ﬁ", "Ａ", "①"),
    *("漢字", "👨‍👩‍👧🏽", "🇫🇷", "𝒳", "ไทย", "أهلا", "\U0010ffff", "a", "b", "the"),
]  # fmt: skip


def string(rng: random.Random) -> str:
    """Any of Unicode, the awkward ones often."""

    def one() -> str:
        if rng.random() < 0.7:
            return rng.choice(AWKWARD)
        code = rng.randrange(0x110000 - 0x800)
        return chr(code + 0x800 * (code >= 0xD800))

    return "".join(one() for _ in range(rng.randrange(30)))


def test_every_string_comes_back_whatever_the_tokenizer_was_trained_on():
    rng = random.Random(0)
    corpora = {
        "English": ["the red circle is above the blue square"],
        "no spaces": ["漢字かな交じり文" * 9],
        "awkward": ["".join(AWKWARD)] * 30 + AWKWARD,
        "one letter": ["a"],
    }
    for name, corpus in corpora.items():
        tokenizer, illegal = TextTokenizer.train(corpus, size=400), 0
        for _ in range(400):
            text = string(rng)
            codes = tokenizer.encode(text)
            assert tokenizer.decode(codes) == text, (name, text)
            illegal += len(set(codes) & set(tokenizer.illegal))
        assert illegal == 0
        assert len(tokenizer) == tokenizer.vocab_size == tokenizer.size
    long = "".join(rng.choice("abc漢é") for _ in range(200_000))
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_a_cut_corpus_teaches_what_the_whole_one_does(caplog):
    words = [f"w{i % 37}" * (1 + i % 5) for i in range(2000)]
    whole, apart = (
        TextTokenizer.train([" ".join(words)], 600),
        TextTokenizer.train([words[0], *(f" {w}" for w in words[1:])], 600),
    )
    assert whole.model == apart.model
    assert "1 texts of more than 4192 bytes were cut, at spaces if they have any" in caplog.text
    rng = random.Random(1)
    for text in [
        " " * 10_000,
        "a" * 70_000,
        "漢" * 9_000,
        *("".join(rng.choice("a漢𝒳 ") for _ in range(n)) for n in (3_000, 20_000)),
    ]:
        pieces = cut_line(text)
        assert "".join(pieces) == text
        assert len(pieces) > 1
        assert max(len(piece.encode()) for piece in pieces) <= MAX_LINE
    assert TextTokenizer.train(["a" * 70_000 + " b", "c d"], 300).size > 257


def test_lines_with_sentencepieces_own_characters_are_learned_from():
    plain = TextTokenizer.train(["hello hello hello"] * 9, 300)
    for mark in ("▅", "▁", "\0"):
        marked = TextTokenizer.train([f"{mark}hello hello hello{mark}"] * 9, 300)
        assert len(marked.encode("hello hello")) == len(plain.encode("hello hello")) < 9


def test_what_cannot_be_trained_on_is_one_line(tmp_path, capsys):
    characters = "".join(chr(0x4E00 + i) for i in range(1000))
    with pytest.raises(UserError, match=r"400 pieces: this text has more distinct characters .* at least (\d+)$") as caught:
        TextTokenizer.train([characters], 400)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    assert TextTokenizer.train([characters], enough).size == enough  # the number is right
    with pytest.raises(UserError, match="at least"):
        TextTokenizer.train([characters], enough - 1)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        TextTokenizer.train(["a\ud800"])
    for size in (299, -1, 1 << 31):
        with pytest.raises(UserError, match="at least 300"):
            TextTokenizer.train(["a b"], size)
    for empty in ([], [""], [" \n"], ["▁▅\0"]):
        with pytest.raises(UserError, match="no text to train on"):
            TextTokenizer.train(empty)
    tokenizer = TextTokenizer.train(["a b"], 300)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        tokenizer.encode("ok\udfff")
    (tmp_path / "corpus.txt").write_bytes(b"\xef\xbb\xbffirst line\r\nsecond \xe2\x80\xa8 line\r\n\r\n")
    assert list(read_texts(tmp_path / "corpus.txt")) == ["first line", "second \u2028 line"]
    (tmp_path / "corpus.jsonl").write_bytes(b'\xef\xbb\xbf{"content": [{"type": "text", "text": "one\\ntwo"}]}\r\n')
    assert list(read_texts(tmp_path / "corpus.jsonl")) == ["one\ntwo"]
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "empty.txt").write_bytes(b"\n")
    for source, says in (
        ("utf16.txt", "not UTF-8 text"),
        ("empty.txt", "no text in it"),
        ("no.txt", "no such file"),
    ):
        with pytest.raises(SystemExit):
            main(["train-text-tokenizer", str(tmp_path / source), "--out", str(tmp_path / "out")])
        printed = capsys.readouterr().err
        assert says in printed
        assert printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
    main(["train-text-tokenizer", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "out")])
    assert "pieces of the 8000 asked for" in capsys.readouterr().out
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"torn")
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        TextTokenizer.from_pretrained(tmp_path / "out")
