"""Conversations in the field's formats: the roles, contents and masks that come out, and what is refused."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import errors_of, png, wav

from unitok.cli import main
from unitok.conversations import Media, read_conversation, texts_of
from unitok.data.packing import PackedDataset
from unitok.data.prepare.plan import Plan
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.texts import read_texts
from unitok.data.prepare.tokenize import tokenize
from unitok.data.shards import TokenDataset
from unitok.document import Part
from unitok.errors import UserError

IMAGE_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
AUDIO = base64.b64encode(wav()).decode()

#: A small file in the true format of each, and its turns: role, contents in order, whether they are learned.
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": IMAGE_URL}},
                {"type": "image_url", "image_url": {"url": "pictures/0.png", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": AUDIO, "format": "wav"}},
            ],
        },
        {"role": "assistant", "content": "A cat.", "weight": 0},
        {"role": "user", "content": "Draw it."},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Here:"}, {"type": "image_url", "image_url": {"url": IMAGE_URL}}],
        },
    ]
}
OPENAI_TURNS = [
    ("system", ["Be brief."], False),
    ("user", ["What is it?", "image", "image", "audio"], False),
    ("assistant", ["A cat."], False),
    ("user", ["Draw it."], False),
    ("assistant", ["Here:", "image"], True),
]
LLAVA = {
    "id": "000000033471",
    "image": "pictures/0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "What color?"},
        {"from": "gpt", "value": "Red."},
    ],
}
LLAVA_TURNS = [
    ("user", ["image", "What is it?"], False),
    ("assistant", ["A cat."], True),
    ("user", ["What color?"], False),
    ("assistant", ["Red."], True),
]
FORMATS = {
    "openai.jsonl": (OPENAI, OPENAI_TURNS),
    "llava.json": ([LLAVA], LLAVA_TURNS),
    "sharegpt.json": (
        [
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
                "system": "Be kind.",
                "tools": "",
            }
        ],
        [("system", ["Be kind."], False), ("user", ["Hi"], False), ("assistant", ["Hello."], True)],
    ),
    "alpaca.json": (
        [{"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "", "history": [["Say a.", "a"]]}],
        [
            ("user", ["Say a."], False),
            ("assistant", ["a"], True),
            ("user", ["Add.\n1 and 2"], False),
            ("assistant", ["3"], True),
        ],
    ),
    "llamafactory.json": (
        [
            {
                "messages": [{"role": "user", "content": "<image><audio>Who?"}, {"role": "assistant", "content": "They."}],
                "images": ["pictures/0.png"],
                "audios": ["0.wav"],
            }
        ],
        [("user", ["image", "audio", "Who?"], False), ("assistant", ["They."], True)],
    ),
    "swift.jsonl": (
        {
            "messages": [
                {"role": "user", "content": "Find <ref-object> in <image>"},
                {"role": "assistant", "content": "<ref-object> at <bbox>", "loss": True},
            ],
            "images": ["pictures/0.png"],
            "objects": {"ref": ["a cat", "It"], "bbox": [[1, 2, 3, 4]]},
        },
        [("user", ["Find a cat in ", "image"], False), ("assistant", ["It at [1, 2, 3, 4]"], True)],
    ),
    "nextgpt.json": (
        [
            {
                "input_image": "pictures/0.png",
                "output_audio": "0.wav",
                "output_image": ["pictures/0.png", "pictures/1.png"],
                "conversations": [
                    {"from": "human", "value": "Make more."},
                    {"from": "gpt", "value": "So: <image> <image>"},
                    {"from": "human", "value": "And how does it sound?"},
                    {"from": "gpt", "value": "<audio>"},
                ],
            }
        ],
        [
            ("user", ["image", "Make more."], False),
            ("assistant", ["So: ", "image", " ", "image"], True),
            ("user", ["And how does it sound?"], False),
            ("assistant", ["audio"], True),
        ],
    ),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "in" / "pictures" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "in" / "0.wav").write_bytes(wav())
    return tmp_path


def run(folder, source, bundle_folder, **options):
    out = folder / f"out-{len(list(folder.iterdir()))}"
    tokenize(Plan(str(source), str(out), str(bundle_folder), **options))
    return out


def turns_of(out, tiny):
    """By document: (role, contents, loss) of each turn, decoded from the tokens."""
    dataset, found = TokenDataset(out), []
    for index in range(len(dataset)):
        turns = []
        for segment in dataset.document(index).segments:
            content = tiny.decode(segment) if segment.modality == "text" else segment.modality
            if turns and turns[-1][0] == segment.role:
                turns[-1][1].append(content)
                assert turns[-1][2] == segment.loss
            else:
                turns.append((segment.role, [content], segment.loss))
        found.append(turns)
    return found


def learned(out, tiny):
    """What training learns of the first document, as text; `<image>` for the codes of one, and special tokens by their names."""
    packed = PackedDataset(TokenDataset(out), 4096, condition_dropout=0.0)
    ids, weights = packed.document(packed.rows(0)[0][0])
    out = ""
    for id in ids[weights > 0].tolist():
        name = tiny.vocab.name_of(id)
        if tiny.vocab.range("text").offset <= id < tiny.vocab.range("text").stop:
            out += tiny.tokenizers["text"].decode([id - tiny.vocab.range("text").offset])
        elif name.startswith("<") and not name.startswith("</"):
            out += name
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_turns_that_its_file_says(name, folder, bundle_folder, tiny):
    content, turns = FORMATS[name]
    path = folder / "in" / name
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    out = run(folder, path, bundle_folder)
    assert turns_of(out, tiny) == [turns]
    assert not (out / "errors.jsonl").exists()


def test_files_that_conversations_name_are_no_documents_of_their_own(folder, bundle_folder, tiny):
    (folder / "in" / "a.jsonl").write_text(json.dumps(OPENAI))
    (folder / "in" / "b.json").write_text(json.dumps([LLAVA]))
    assert turns_of(run(folder, folder / "in", bundle_folder), tiny)[:2] == [OPENAI_TURNS, LLAVA_TURNS]
    assert len(turns_of(run(folder, folder / "in", bundle_folder), tiny)) == 4  # and 1.png and 0.wav, which none names


def test_tables_with_messages_and_images_as_transformers_writes_them(folder, bundle_folder, tiny):
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    image = pa.array([[{"bytes": png(), "path": None}]], pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    pq.write_table(pa.table({"messages": [messages], "images": image}), folder / "a.parquet")
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    pq.write_table(pa.table({"messages": [plain]}), folder / "b.parquet")
    assert turns_of(run(folder, folder / "a.parquet", bundle_folder), tiny) == [
        [("user", ["image", "What is it?"], False), ("assistant", ["A cat."], True)]
    ]
    assert turns_of(run(folder, folder / "b.parquet", bundle_folder), tiny) == [
        [("user", ["Hi"], False), ("assistant", ["Hello."], True)]
    ]


def test_masks_are_what_the_assistant_says_and_the_ends_of_its_turns(folder, bundle_folder, tiny):
    path = folder / "in" / "a.json"
    path.write_text(json.dumps([LLAVA]))
    assert learned(run(folder, path, bundle_folder), tiny) == "<assistant>A cat.<user><assistant>Red.<eos>"
    history = SourceSpec(str(path), mask_history=True)
    assert learned(run(folder, path, bundle_folder, spec=history), tiny) == "<assistant>Red.<eos>"
    (folder / "in" / "b.jsonl").write_text(json.dumps(OPENAI))
    assert learned(run(folder, folder / "in" / "b.jsonl", bundle_folder), tiny).startswith("<assistant>Here:<image>")


def test_the_command_line_learns_the_last_turn_alone(folder, bundle_folder, tiny):
    path = folder / "in" / "a.json"
    path.write_text(json.dumps([LLAVA]))
    main(["tokenize", str(path), str(folder / "out"), "--bundle", str(bundle_folder), "--mask-history", "--workers", "1"])
    assert learned(folder / "out", tiny) == "<assistant>Red.<eos>"


def test_the_page_shows_what_is_learned_and_what_is_read_in_two_colors(folder, bundle_folder):
    path = folder / "in" / "a.json"
    path.write_text(json.dumps([LLAVA]))
    out = run(folder, path, bundle_folder)
    main(["inspect", str(out), "--page", str(folder / "page.html"), "--bundle", str(bundle_folder)])
    page = (folder / "page.html").read_text()
    assert page.index('class="given"') < page.index("What is it?") < page.index('class="new"') < page.index("A cat.")


def turns(*texts, **more):
    names = ("user", "assistant")
    return {"messages": [{"role": names[i % 2], "content": text} for i, text in enumerate(texts)]} | more


BAD = {
    "2 image tags in the messages, but 1 files in image": turns("<image><image>Which?", "One.", images=["a.png"]),
    "0 image tags in the messages, but 1 files in image": turns("Which?", "One.", image="a.png"),
    "1 audio tags in the messages, but 0 files in audio": turns("<audio> What?", "One."),
    "message 2 is of the user: the assistant's turn is missing": {"messages": [{"role": "user", "content": "a"}] * 2},
    "message 1 is of the assistant: the user's turn is missing": {"conversations": [{"from": "gpt", "value": "a"}]},
    "the last message is of the user; it must be of the assistant": turns("a", "b", "c"),
    "message 2: it is empty": turns("a", "  "),
    "message 1: audio by its id: answers are not kept": {
        "messages": [{"role": "assistant", "content": "a", "audio": {"id": "audio-1"}}]
    },
    "message 3 is of the system: the system's message must be the first": {
        "messages": [*turns("a", "b")["messages"], {"role": "system", "content": "c"}]
    },
    "message 1: role 'tool'": {"messages": [{"role": "tool", "content": "a"}]},
    "message 1: role None": {"messages": [{"content": "a"}]},
    "message 2: a call of a tool": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    },
    "tools: calls of tools": turns("a", "b", tools="[{}]"),
    "nothing of this conversation is learned": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    },
    "message 2: weight and loss must be 0 or 1": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    },
    "message 1, part 1: it must be an object with a type": {"messages": [{"role": "user", "content": [7]}]},
    "message 1, part 1: image_url must be": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "objects: fewer than there are <bbox>": turns("<bbox>", "a", objects={"ref": ["a"], "bbox": []}),
    "objects: 1 bbox more": turns("a", "b", objects={"bbox": [[1, 2, 3, 4]]}),
    "history: it must be a list of pairs": {"instruction": "a", "output": "b", "history": ["a"]},
    "the bundle has no video": turns("<video>What?", "a", videos=["a.mp4"]),
    "is a URL, which is not followed": turns("<image>What?", "a", images=["https://example.org/a.png"]),
    "a conversation without messages": {"messages": []},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_agree_is_listed_with_the_reason(reason, folder, bundle_folder):
    path = folder / "in" / "a.jsonl"
    path.write_text(json.dumps(turns("a", "b")) + "\n" + json.dumps(BAD[reason]) + "\n")
    out = run(folder, path, bundle_folder)
    (error,) = errors_of(out)
    assert error.startswith("a.jsonl, line 2: ")
    assert reason in error
    assert len(TokenDataset(out)) == 1


def test_texts_of_conversations_train_a_text_tokenizer(folder):
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (OPENAI, LLAVA)))
    (folder / "in" / "b.json").write_text(json.dumps([LLAVA]))
    assert list(read_texts(folder / "in" / "a.jsonl")) == [
        *("Be brief.", "What is it?", "A cat.", "Draw it.", "Here:"),
        *("What is it?", "A cat.", "What color?", "Red."),
    ]
    assert list(read_texts(folder / "in" / "b.json")) == ["What is it?", "A cat.", "What color?", "Red."]


def conversation(*pieces, **more):
    """Types and values of the parts of a row."""
    row = turns(*pieces) | more
    return [(part.type, part.value) for part in read_conversation(row, lambda media: Part(media.kind, media.content))]


def test_what_data_sets_really_hold_is_read():
    assert conversation("Use <video> in HTML", "Yes", tools="[]", image="", images=[None], system="") == [
        ("text", "Use <video> in HTML"),
        ("text", "Yes"),
    ]
    assert conversation("What is it?\n<image>\n", "A cat", images=["a.png"])[0] == ("text", "What is it?\n")
    empty = {"role": "system", "content": ""}
    assert read_conversation({"messages": [empty, *turns("a", "b")["messages"]]}, pytest.fail)[0].value == "a"
    numbered = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    row = {
        "messages": [{"role": "user", "content": numbered}, {"role": "assistant", "content": "b"}],
        "images": ["0.png", "1.png"],
    }
    assert [p.value for p in read_conversation(row, lambda media: Part(media.kind, media.content))] == ["1.png", "0.png", "b"]
    made = {
        "conversations": [{"from": "human", "value": "Make it"}, {"from": "gpt", "value": "Here."}],
        "output_image": "a.png",
    }
    parts = read_conversation(made, lambda media: Part(media.kind, media.content))
    assert [(p.type, p.role) for p in parts] == [("text", "user"), ("text", "assistant"), ("image", "assistant")]
    with_null = LLAVA | {"output_image": None}
    assert read_conversation(with_null, lambda media: Part(media.kind, media.content))[0].value == "pictures/0.png"


def test_parts_of_a_conversation_are_not_put_into_another_order(folder, bundle_folder):
    path = folder / "in" / "a.json"
    path.write_text(json.dumps([LLAVA]))
    with pytest.raises(UserError, match="order: the parts of a conversation stay in their order"):
        run(folder, path, bundle_folder, spec=SourceSpec(str(path), order=("image", "text")))


def test_a_text_of_parts_keeps_its_tags():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is <image>?"}]},
            {"role": "assistant", "content": "A tag."},
        ]
    }
    parts = read_conversation(row, lambda media: pytest.fail(str(media)))
    assert [part.value for part in parts] == ["What is <image>?", "A tag."]
    assert texts_of(row) == ["What is <image>?", "A tag."]


def test_media_are_taken_in_order_and_answers_with_audio_are_read():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "b.png"}]},
            {"role": "assistant", "content": None, "audio": {"data": "AAAA"}},
        ],
        "images": ["a.png"],
    }
    parts = read_conversation(row, lambda media: Part(media.kind, media.content))
    assert [(part.type, part.value, part.loss) for part in parts] == [
        ("image", "a.png", False),
        ("image", "b.png", False),
        ("audio", "data:audio/wav;base64,AAAA", True),
    ]
    with pytest.raises(UserError, match="2 image tags"):
        read_conversation({"messages": [{"role": "user", "content": [{"type": "image"}] * 2}, row["messages"][1]]}, Media)
