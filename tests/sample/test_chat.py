"""Conversations: a turn ends where another role begins, what was said is read back exactly, and only what is new is computed."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import png, wav

from unitok.api import Unitok
from unitok.document import Segment
from unitok.errors import UserError
from unitok.grammar import Grammar
from unitok.plan import parse_plan
from unitok.sample.chat import Chat, Reply
from unitok.sample.engine import Session, generate
from unitok.sample.prefixes import PrefixCache
from unitok.sample.running import Request

USER = {"role": "user", "content": "Draw a cat."}
IMAGE = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.fixture
def unitok(bundle_folder: Path) -> Unitok:
    return Unitok.from_pretrained(bundle_folder)


def test_a_turn_ends_at_the_next_role_or_the_end_whatever_the_plan(unitok):
    vocab, grammar = unitok.vocab, Grammar(unitok.vocab)
    prompt = np.array([vocab.bos, vocab.specials["<user>"], vocab.range("text").offset + 5, vocab.specials["<assistant>"]])
    ends = {vocab.eos, *vocab.roles}
    last = set()
    for modalities in ("free", "text", "image:2x2,text"):
        plan = parse_plan(modalities, vocab)
        requests = [Request(prompt, plan, 60, seed, turn=True) for seed in range(60)]
        for ids in generate(unitok.inference, grammar, requests):
            assert ids[-1] in ends
            assert ends.isdisjoint(ids[:-1].tolist())
            assert ids[-1] != vocab.specials["<assistant>"]
            last.add(int(ids[-1]))
    assert {vocab.eos, vocab.specials["<user>"]} <= last  # both happened
    for ids in generate(unitok.inference, grammar, [Request(prompt, parse_plan("image:2x2", vocab), 60, 0, turn=True)]):
        assert vocab.name_of(int(ids[-1])) == vocab.span("image").end


def test_a_config_says_what_a_turn_has_where_the_call_does_not(unitok):
    for given in ({"modalities": "text:4"}, {"generation_config": {"modalities": "text:4"}}):
        assert [s.modality for s in unitok.chat([USER], seed=1, **given).new.segments] == ["text"]


def test_what_the_assistant_said_is_read_back_with_exactly_its_codes(unitok):
    messages = [USER]
    for turn in range(3):
        reply = unitok.chat(messages, "text:6,image:2x3,audio:4", seed=turn)
        assert isinstance(reply, Reply)
        assert [part["type"] for part in reply.message["content"]] == ["text", "image_url", "audio_url"]
        assert {segment.role for segment in reply.new.segments} == {"assistant"}
        messages += [reply.message, {"role": "user", "content": [{"type": "text", "text": "Again."}]}]
        segments = unitok.chats.document(messages).segments
        said = [segment for segment in segments if segment.role == "assistant"][-3:]
        assert said == list(reply.new.segments)
    assert unitok.chat(messages, "text:3").message == {"role": "assistant", "content": unitok.chat(messages, "text:3").text}


def count_read(unitok, monkeypatch, counts):
    """Append the number of tokens of each reading to `counts`."""
    original = unitok.inference.read

    def counted(ids, *arguments):
        counts.append(sum(map(len, ids)))
        return original(ids, *arguments)

    monkeypatch.setattr(unitok.inference, "read", counted)


def test_a_later_turn_reads_only_what_is_new_and_says_the_same(unitok, monkeypatch):
    read: list[int] = []
    count_read(unitok, monkeypatch, read)
    messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What?"}]}
    ]
    for turn in range(3):
        read.clear()
        reply = unitok.chat(messages, "text:5", seed=turn)
        prompt = len(unitok.vocab.encode(unitok.chats.document(messages), eos=False)) + 1
        if turn:
            assert sum(read) < prompt  # the prompt alone is longer
        else:
            assert sum(read) >= prompt
        afresh = Chat(unitok)
        afresh._written = unitok.chats._written
        *_, alone = afresh.stream(messages, unitok._config({"modalities": "text:5", "seed": turn}, {}))
        np.testing.assert_array_equal(alone.ids, reply.ids)
        messages += [reply.message, {"role": "user", "content": "And?"}]


def test_other_conversations_and_other_weights_do_not_share_what_was_read(unitok):
    first = [{"role": "user", "content": "One two three."}]
    other = [{"role": "user", "content": "One two four."}]
    unitok.chat(first, "text:5")
    kept = unitok.chat(other, "text:5").ids
    np.testing.assert_array_equal(Unitok(unitok.vocab, unitok.tokenizers, unitok.model).chat(other, "text:5").ids, kept)
    with torch.no_grad():
        for parameter in unitok.model.parameters():
            parameter.mul_(1.5)
    changed = Unitok(unitok.vocab, unitok.tokenizers, unitok.model)
    unitok._inference = None  # as after a change of the weights
    np.testing.assert_array_equal(unitok.chat(other, "text:5").ids, changed.chat(other, "text:5").ids)


def test_what_a_user_writes_is_tokenized_although_the_assistant_wrote_the_same(unitok):
    codes = unitok.text.encode("red")
    before = [{"role": "user", "content": "red"}]
    unitok.chats._write(Segment("text", np.array([codes[0], *codes])), "red")
    assert unitok.chats.document(before).segments[0].codes.tolist() == codes
    after = [*before, {"role": "assistant", "content": "red"}, {"role": "user", "content": "red"}]
    assert [len(s.codes) for s in unitok.chats.document(after).segments] == [len(codes), len(codes) + 1, len(codes)]


def test_equal_prompts_are_read_once_also_where_prefixes_are_kept(unitok, monkeypatch):
    read: list[int] = []
    count_read(unitok, monkeypatch, read)
    session = Session(unitok.inference, Grammar(unitok.vocab), prefixes=PrefixCache())
    prompt = unitok.vocab.encode(unitok.read_prompt("a prompt of some length"), eos=False)
    for turn in range(2):
        read.clear()
        list(session.run([Request(prompt + 0, parse_plan("text:1", unitok.vocab), 9, seed) for seed in range(4)]))
        assert read[0] == len(prompt) if turn == 0 else sum(read) <= 4 + len(prompt)


def test_objects_files_and_data_are_taken(unitok, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    image = Image.new("RGB", (32, 32), "red")
    parts = [
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}},
        {"type": "audio", "audio": tmp_path / "a.wav"},
        {"type": "audio_url", "audio_url": {"url": str(tmp_path / "a.wav")}},
    ]
    document = unitok.chats.document([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert [segment.modality for segment in document.segments] == ["text", "image", "image", "audio", "audio", "audio"]
    assert document.segments[3].codes.tolist() == document.segments[4].codes.tolist() == document.segments[5].codes.tolist()


WRONG = {
    "messages: give a list": "Draw a cat.",
    "a conversation without messages": [],
    "the last message is of the assistant; it must be of the user": [USER, {"role": "assistant", "content": "Here."}],
    "message 1: role 'robot'": [{"role": "robot", "content": "Hi"}],
    "message 1: it is empty": [{"role": "user", "content": ""}],
    "no such file": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "nowhere.png"}}]}],
    "is no data URL": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}],
    "a data URL that is not base64": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}]}
    ],
    "no modality 'video' in this vocabulary": [
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": IMAGE}}]}
    ],
    "a part of type image without content": [{"role": "user", "content": [{"type": "image"}]}],
    "the decoder takes": [{"role": "user", "content": "a cat " * 2000}],
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_wrong_with_messages_is_said(unitok, reason):
    with pytest.raises(UserError, match=reason):
        unitok.chat(WRONG[reason])


def test_files_can_be_refused(unitok, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}]}
    assert Chat(unitok).document([message])
    with pytest.raises(UserError, match="is no data URL"):
        Chat(unitok, paths=False).document([message])


def test_without_roles_a_bundle_without_their_tokens_reads_messages_too(unitok, monkeypatch):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    specials = {name: id for name, id in unitok.vocab.specials.items() if name not in ("<user>", "<assistant>")}
    monkeypatch.setattr(unitok.vocab, "specials", specials)
    with pytest.raises(UserError, match="no token for the role user"):
        unitok.chats.document(messages)
    document = unitok.chats.document(messages, roles=False)
    assert [s.role for s in document.segments] == ["none"] * 3
