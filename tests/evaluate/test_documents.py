"""Promises of `unitok eval documents`: bits per direction, errors of texts, retrieval among candidates, and a page of the worst."""

import copy
import json
import math
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unitok.cli import main
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.document import Document, Segment
from unitok.errors import UserError
from unitok.evaluate.directions import direction_of
from unitok.evaluate.documents import DirectionTexts, WrittenText, evaluate_documents, read_documents
from unitok.grammar import Grammar
from unitok.plan import PlanItem


@pytest.fixture(scope="module")
def documents(tokens) -> list[Document]:
    data = TokenDataset(tokens)
    return [data.document(i) for i in range(len(data))]


def naive_bits(unitok, document: Document) -> list[tuple[str, int, float]]:
    """Direction, tokens and bits of each segment: whole passes in float64, the allowed tokens one position after the other."""
    model, grammar = copy.deepcopy(unitok.model).double(), Grammar(unitok.vocab)
    ids, spans = unitok.vocab.encode_placed(document)
    positions = torch.from_numpy(grammar.span_positions(ids))[None]
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None], span_positions=positions)[0]
    state, bits = grammar.row(), []
    for i, id in enumerate(ids[1:].tolist()):
        allowed = torch.cat([torch.arange(a, b) for a, b in state.allowed()])
        bits.append(float(logits[i, allowed].logsumexp(0) - logits[i, id]) / math.log(2))
        state.advance(id)
    segments = unitok.vocab.merged(document).segments
    return [
        (direction_of(segments[:k], segment), span.length, sum(bits[span.start - 1 : span.start - 1 + span.length]))
        for k, (segment, span) in enumerate(zip(segments, spans, strict=True))
        if segment.loss
    ]


def naive_text(unitok, document: Document, tokens: int) -> str:
    """The text that follows a document: whole passes, each time the likeliest of the allowed tokens."""
    grammar, ids = Grammar(unitok.vocab), unitok.vocab.encode(document, eos=False)
    state, start = grammar.follow(ids, complete=False).copy_for(tokens, [PlanItem("text")]), len(ids)
    while state.state != "done":
        positions = torch.from_numpy(grammar.span_positions(ids))[None]
        with torch.inference_mode():
            logits = unitok.model(torch.from_numpy(ids)[None], span_positions=positions)[0, -1]
        allowed = torch.cat([torch.arange(a, b) for a, b in state.allowed()])
        id = int(allowed[logits[allowed].argmax()])
        state.advance(id)
        ids = np.append(ids, id)
    return "".join(unitok.decode(segment) for segment in unitok.vocab.decode(ids[start:]).segments)


def test_bits_are_those_of_whole_passes_in_float64_by_direction(tiny, documents):
    shorter = [Document(document.segments[:3], document.id) for document in documents[:8]]
    unscored = Document((Segment("text", [5, 6, 7], loss=False), *shorter[0].segments[-1:]))
    wanted = defaultdict(list)
    for document in (*shorter, unscored):
        for direction, tokens, bits in naive_bits(tiny, document):
            wanted[direction].append((tokens, bits))
    scores = evaluate_documents(tiny, [*shorter, unscored], candidates=0, max_new_tokens=0)
    assert [row.direction for row in scores.bits] == sorted(wanted)
    assert len(wanted) > 3
    for row in scores.bits:
        tokens, bits = map(sum, zip(*wanted[row.direction], strict=True))
        assert (row.segments, row.tokens) == (len(wanted[row.direction]), tokens)
        assert row.bits_per_token == pytest.approx(bits / tokens, rel=1e-4)
    assert (scores.texts, scores.retrieval) == ([], [])
    tokens, bits = map(sum, zip(*(pair for pairs in wanted.values() for pair in pairs), strict=True))
    assert scores.summary()["bits_per_token"] == pytest.approx(bits / tokens, rel=1e-4)


def test_bits_per_character_are_of_texts_alone(tiny):
    text, image = Segment("text", tiny.text.encode("a dog")), Segment("image", np.arange(4).reshape(2, 2))
    scores = evaluate_documents(tiny, [Document((text, image))])
    assert scores.texts == []  # no text at the end
    assert [(row.documents, row.left_out) for row in scores.retrieval] == [(0, 1)] * 2  # nothing to choose from
    by_direction = {row.direction: row for row in scores.bits}
    assert by_direction["text"].bits_per_character == pytest.approx(sum(b for *_, b in naive_bits(tiny, Document((text,)))) / 5)
    assert by_direction["text>image"].bits_per_character is None


@pytest.mark.parametrize(
    ("reference", "generated", "characters", "words"),
    [
        ("a red dog", "a red dog", 0, 0),
        ("a red dog", "a bed dog", 1 / 9, 1 / 3),  # one letter, one word
        ("a red dog", "A red dog.", 2 / 9, 2 / 3),  # case and punctuation count
        ("a red dog", "", 1, 1),
        ("ab", "ab cd ef", 3, 2),  # more errors than the reference is long
        ("a b c d", "b c d", 2 / 7, 1 / 4),  # one deletion moves nothing else
    ],
)
def test_error_rates_are_edits_by_the_length_of_the_reference(reference, generated, characters, words):
    text = WrittenText.compare("image>text", reference, generated)
    assert (text.character_error_rate, text.word_error_rate) == pytest.approx((characters, words))
    other = WrittenText.compare("image>text", "xyz", "xyz")
    both = DirectionTexts.of("image>text", [text, other])
    assert both.exact_match == (1 if reference == generated else 0.5)
    assert both.character_error_rate == pytest.approx(characters * len(reference) / (len(reference) + 3))
    assert both.word_error_rate == pytest.approx(words * len(reference.split()) / (len(reference.split()) + 1))


def test_texts_are_what_greedy_sampling_writes_after_what_precedes(tiny):
    image = [Segment("image", np.random.default_rng(i).integers(0, 64, (2, 3))) for i in range(3)]
    text = Segment("text", tiny.text.encode("a dog"))
    given = [(image[0],), (Segment("text", tiny.text.encode("what?"), loss=False), image[1])]
    ends_otherwise = Document((text, image[2]))
    scores = evaluate_documents(tiny, [*(Document((*g, text)) for g in given), ends_otherwise], 0, max_new_tokens=12)
    written = [result.text and result.text.generated for result in scores.results]
    assert written == [*(naive_text(tiny, Document(g), 12).strip() for g in given), None]
    assert {result.text.reference for result in scores.results[:2]} == {"a dog"}
    assert [row.direction for row in scores.texts] == ["image>text", "text+image>text"]


def test_a_text_of_another_role_is_written_in_that_role(tiny, monkeypatch):
    seen = []

    def spy(decoder, grammar, requests, *arguments, **more):
        seen.extend(request.prompt for request in requests)
        return generate(decoder, grammar, requests, *arguments, **more)

    from unitok.evaluate.documents import generate

    monkeypatch.setattr("unitok.evaluate.documents.generate", spy)
    question = Segment("image", np.arange(6).reshape(2, 3), role="user", loss=False)
    answer = Segment("text", tiny.text.encode("a dog"), role="assistant")
    scores = evaluate_documents(tiny, [Document((question, answer))], max_new_tokens=8)
    assert [tiny.vocab.name_of(int(ids[-1])) for ids in seen] == ["<assistant>"]
    assert scores.texts[0].documents == 1


class Planted(torch.nn.Module):
    """Logits of each token by the second one of the document: a text of one piece, or the begin of a span without a condition."""

    def __init__(self, logits: torch.Tensor, longest: int = 64):
        super().__init__()
        self.lm_head = SimpleNamespace(weight=logits)
        self.config = SimpleNamespace(max_position_embeddings=longest, vocab_size=len(logits))
        self.device = logits.device

    def hidden(self, ids, span_positions):
        return torch.eye(len(self.lm_head.weight))[ids[:, 1:2].expand_as(ids)]


def planted(tiny, bonus: float, prior: float, pairs: list[tuple[int, int]]):
    """A bundle whose decoder knows pairs of a text's code and an image's; image code 0 is likelier by `prior` whatever precedes."""
    vocab, logits = tiny.vocab, torch.zeros(tiny.vocab.size, tiny.vocab.size)
    text, image = vocab.range("text").offset, vocab.range("image").offset
    logits[image] = prior
    for a, b in pairs:
        logits[image + b, text + a] += bonus
    bundle = copy.copy(tiny)
    bundle.model = Planted(logits)
    return bundle


def pair(a: int, b: int) -> Document:
    return Document((Segment("text", [a]), Segment("image", [[b]])))


def retrieval(bundle, documents: list[Document], candidates: int) -> dict[str, tuple[float, float, float]]:
    rows = evaluate_documents(bundle, documents, candidates, max_new_tokens=0).retrieval
    return {row.choose: (row.recall_at_1_logprob, row.recall_at_1_pmi, row.chance) for row in rows}


def test_retrieval_finds_what_a_planted_decoder_knows(tiny):
    pairs = [(5 + i, i) for i in range(8)]
    documents = [pair(a, b) for a, b in pairs]
    assert retrieval(planted(tiny, 4, 0, pairs), documents, 8) == {"image": (1, 1, 1 / 8), "text": (1, 1, 1 / 8)}
    assert retrieval(planted(tiny, 4, 0, pairs), documents, 4) == {"image": (1, 1, 1 / 4), "text": (1, 1, 1 / 4)}
    wrong = [(a, (b + 1) % 8) for a, b in pairs]
    assert retrieval(planted(tiny, 4, 0, wrong), documents, 8) == {"image": (0, 0, 1 / 8), "text": (0, 0, 1 / 8)}


def test_pmi_discounts_what_is_likely_whatever_precedes(tiny):
    pairs = [(5 + i, i) for i in range(8)]
    found = retrieval(planted(tiny, 2, 6, pairs), [pair(a, b) for a, b in pairs], 8)
    assert found == {"image": (1 / 8, 1, 1 / 8), "text": (1, 1, 1 / 8)}


def test_a_decoder_that_knows_nothing_is_at_chance(tiny):
    documents = [pair(5 + i, i) for i in range(7)]
    found = retrieval(planted(tiny, 0, 0, []), documents, 3)
    assert set(found) == {"image", "text"}
    assert all(value == pytest.approx(3 / 7) for values in found.values() for value in values)  # 7 documents in 3 groups


@pytest.mark.parametrize("seed", range(4))
def test_what_another_document_joins_is_never_a_wrong_candidate(tiny, seed):
    pairs = [(5, 0), (5, 1), (6, 1), (7, 2), (8, 3)]  # a text twice, an image twice
    documents = [pair(a, b) for a, b in pairs]
    for row in evaluate_documents(planted(tiny, 4, 0, pairs), documents, 4, max_new_tokens=0, seed=seed).retrieval:
        assert (row.recall_at_1_logprob, row.recall_at_1_pmi) == (1, 1)
        assert row.documents > row.chance * row.documents >= 1
    for row in evaluate_documents(tiny, [pair(5, i) for i in range(4)], 4, max_new_tokens=0).retrieval:
        assert (row.documents, row.left_out, row.chance) == (0, 4, None)


def test_candidates_have_the_roles_of_the_true_one(tiny):
    pairs = [(5 + i, i) for i in range(6)]
    documents = [
        Document((Segment("text", [a], role="user"), Segment("image", [[b]], role="user" if b < 3 else "assistant")))
        for a, b in pairs
    ]
    for row in evaluate_documents(planted(tiny, 0, 0, []), documents, 6, max_new_tokens=0).retrieval:
        assert (row.documents, row.left_out) == (6, 0)
        assert (row.recall_at_1_logprob, row.chance) == pytest.approx((1 / 3, 1 / 3))  # two groups of three


def test_documents_that_are_too_long_are_counted(tiny):
    bundle = planted(tiny, 4, 0, [(5 + i, i) for i in range(8)])
    long = Document((Segment("text", [5]), Segment("image", np.zeros((8, 8)))))
    text = Document((Segment("text", [9] * 52), Segment("image", [[3]])))  # fits, but not before the image of the next
    large = Document((Segment("text", [10]), Segment("image", np.full((3, 7), 4))))
    scores = evaluate_documents(bundle, [pair(5, 0), long, pair(6, 1), text, large], 4, max_new_tokens=0)
    assert (scores.skipped, len(scores.results)) == (1, 4)
    assert {(row.documents, row.left_out) for row in scores.retrieval} == {(3, 1)}
    with pytest.raises(UserError, match="none of 1 documents has at most 64 tokens"):
        evaluate_documents(bundle, [long])
    with pytest.raises(UserError, match="candidates 1: at least 2, or 0"):
        evaluate_documents(bundle, [text], candidates=1)


def test_a_data_set_is_measured_and_shown_the_worst_first(bundle_folder, tokens, tmp_path, capsys):
    out, data = tmp_path / "out", TokenDataset(tokens)
    flags = ["--bundle", str(bundle_folder), "--out", str(out), "--max-new-tokens", "8", "--count", "12"]
    main(["eval", "documents", str(tokens), *flags])
    printed = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert scores["documents"] == len(rows) == 12
    assert {row["id"] for row in rows} < {data.document(i).id for i in range(len(data))}
    bits = [row["bits_per_token"] for row in rows]
    assert bits == sorted(bits, reverse=True)
    page = (out / "index.html").read_text()
    assert page.count("<article>") == 12
    assert page.index(rows[0]["id"]) < page.index(rows[-1]["id"])
    for row in scores["bits"]:
        assert row["direction"].replace(">", "&gt;") in page
        assert f"{row['bits_per_token']:.4g}" in printed
    main(["eval", "documents", str(tokens), *flags])
    assert json.loads((out / "scores.json").read_text()) == scores  # the same seed draws the same


def test_documents_are_read_from_data_sets_and_json_lines(tiny, tokens, scenes_folder, documents, tmp_path):
    assert read_documents(tiny, str(tokens)) == documents
    few = read_documents(tiny, str(tokens), count=3, seed=1)
    assert len(few) == 3
    assert all(document in documents for document in few)
    raw = read_documents(tiny, str(scenes_folder), count=4)  # a folder with documents.jsonl
    assert len(raw) == 4
    known = {document.id: document for document in documents}
    for document in raw:
        for one, other in zip(document.segments, known[document.id].segments, strict=True):
            assert np.array_equal(one.codes, other.codes)
    for data, split, message in (
        (str(tmp_path), "", "neither a tokenized data set"),
        (str(tokens), "test", "no split 'test'"),
        (str(scenes_folder), "train", "is no tokenized data set"),
    ):
        with pytest.raises(UserError, match=message):
            read_documents(tiny, data, split=split)
    with pytest.raises(UserError, match="count -1: at least 0"):
        read_documents(tiny, str(tokens), -1)
    with pytest.raises(UserError, match="is a tokenized data set, which names no files"):
        read_documents(tiny, str(tokens), root=str(tmp_path))


def test_documents_to_measure_come_from_validation_then_test_then_with_a_warning_from_all(
    tiny, bundle_folder, tmp_path, caplog
):
    for splits, expected in ((("train", "test", "validation"), 2), (("train", "test"), 1), (("train",), 0)):
        folder = tmp_path / str(len(splits))
        folder.with_suffix(".jsonl").write_text("\n".join(json.dumps({"id": s, "text": s, "split": s}) for s in splits))
        tokenize(Plan(str(folder.with_suffix(".jsonl")), str(folder), str(bundle_folder)))
        assert "was trained on" not in caplog.text
        assert [document.id for document in read_documents(tiny, str(folder))] == [splits[expected]]
    assert "no split validation or test: documents that the decoder was trained on" in caplog.text


@pytest.mark.parametrize("verb", ["documents", "image-tokenizer", "audio-tokenizer"])
def test_what_is_measured_is_never_replaced(bundle_folder, scenes_folder, tmp_path, capsys, verb):
    """Not even where it is asked to overwrite the folder."""
    data = tmp_path / "data"
    shutil.copytree(scenes_folder, data)
    before = sorted(data.rglob("*"))
    inputs = [str(data), "--bundle", str(bundle_folder)] if verb == "documents" else [str(bundle_folder), str(data)]
    with pytest.raises(SystemExit) as stop:
        main(["eval", verb, *inputs, "--out", str(data), "--overwrite"])
    assert stop.value.code == 2
    assert "contains the input" in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before
