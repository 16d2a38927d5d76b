"""The endpoints, spoken to by OpenAI's own client and by clients that mean no good."""

import base64
import io
import json
import shutil
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from clips import clip
from PIL import Image
from pydantic import TypeAdapter
from raw_data import png, wav
from serving import LIMITS, running

from unitok.bundle import Bundle, make_bundle
from unitok.media import open_video, write_video
from unitok.model import Decoder, DecoderConfig
from unitok.sample.speech import PAUSE
from unitok.serve.generation import encoded

IMAGE = "data:image/png;base64," + base64.b64encode(png()).decode()
AUDIO = base64.b64encode(wav()).decode()
PARTS = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": IMAGE}},
    {"type": "input_audio", "input_audio": {"data": AUDIO, "format": "wav"}},
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
PLAN = {"modalities": ["text:5", "image:2x3", "audio:4"]}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def moving(bundle_folder, tmp_path_factory):
    """A server of a bundle with videos."""
    folder = tmp_path_factory.mktemp("moving") / "bundle"
    make_bundle(folder, {"model": bundle_folder}, add=["video"])
    with running(folder, *LIMITS) as server:
        yield server


def test_videos_are_read_streamed_and_continued(moving, tmp_path):
    client = openai.OpenAI(base_url=f"{moving.url}/v1", api_key="none", max_retries=0)
    write_video(tmp_path / "a.mp4", clip(4, 32, 32), 8)
    url = "data:video/mp4;base64," + base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    messages = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
    asked = {"model": "tiny", "seed": 1, "extra_body": {"modalities": ["video:8x12x2x2"]}}
    answer = client.chat.completions.create(messages=messages, **asked).choices[0].message
    (part,) = answer.parts
    with open_video(Path("a.mp4"), base64.b64decode(part["video_url"]["url"].partition("base64,")[2])) as video:
        whole = [np.asarray(frame.image) for frame in video.frames()]
    assert len(whole) == 12
    parts = [
        part
        for chunk in client.chat.completions.create(messages=messages, stream=True, **asked)
        for choice in chunk.choices
        for part in (choice.delta.model_extra or {}).get("parts", [])
    ]
    assert len(parts) > 1
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    frames = Image.open(io.BytesIO(base64.b64decode(parts[-1]["video_url"]["url"].partition("base64,")[2])))
    assert (frames.format, frames.n_frames, frames.size) == ("GIF", 12, whole[0].shape[1::-1])
    more = [*messages, {"role": "assistant", "content": answer.parts}, {"role": "user", "content": "again"}]
    assert client.chat.completions.create(messages=more, **asked).choices[0].message.parts


def validated(answer):
    """The answer, of which the client's own type takes every field as it is."""
    TypeAdapter(type(answer)).validate_python(answer.model_dump(), strict=False)
    return answer


def pixels_of(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2] or url))))


def metrics(server) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{server.url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def wait_until_idle(server) -> None:
    for _ in range(200):
        if metrics(server)["unitok_outputs_running"] == metrics(server)["unitok_outputs_waiting"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError("outputs are still running")


# ---- OpenAI's client --------------------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in validated(client.models.list()).data] == ["tiny"]
    assert validated(client.models.retrieve("tiny")).owned_by == "unitok"
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4o'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


def test_a_chat_with_text_images_and_audio_goes_on_with_what_was_answered(client):
    answer = validated(client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, extra_body=PLAN))
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert [part["type"] for part in choice.message.parts] == ["text", "image_url", "audio_url"]
    assert choice.message.content == choice.message.parts[0]["text"]
    assert pixels_of(choice.message.parts[1]["image_url"]["url"]).shape == (8, 12, 3)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(choice.message.audio.data)))
    assert rate == 8000
    assert len(samples)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    more = [*MESSAGES, choice.message.model_dump(exclude_none=True), {"role": "user", "content": "And?"}]
    validated(client.chat.completions.create(model="tiny", messages=more, max_tokens=20, seed=3))


def test_a_stream_says_what_the_whole_answer_says(client):
    given = {"model": "tiny", "messages": MESSAGES, "seed": 3, "n": 2, "extra_body": PLAN}
    whole = client.chat.completions.create(**given)
    texts, images, audio, ends = ["", ""], [None, None], [b"", b""], {}
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        validated(chunk)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for part in getattr(choice.delta, "parts", None) or []:
                images[choice.index] = part
            if sound := getattr(choice.delta, "audio", None):
                audio[choice.index] += base64.b64decode(sound.data)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert chunk.usage.model_dump() == whole.usage.model_dump()
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert images[choice.index]["done"]
        url = images[choice.index]["image_url"]["url"]
        np.testing.assert_array_equal(pixels_of(url), pixels_of(choice.message.parts[1]["image_url"]["url"]))
        samples, _ = soundfile.read(io.BytesIO(base64.b64decode(choice.message.audio.data)), dtype="int16")
        streamed = np.frombuffer(audio[choice.index], "<i2")
        assert len(streamed) == len(samples)
        assert np.abs(streamed.astype(int) - samples).max() <= 1
        assert ends[choice.index] == choice.finish_reason


def test_outputs_of_many_clients_are_those_of_one(client):
    def ask(seed):
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, extra_body=PLAN)
        return answer.choices[0].message.parts

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_an_image_alone_is_an_answer_that_goes_on(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=-3, extra_body={"modalities": ["image:2x3"]})
    message = answer.choices[0].message
    assert message.content is None
    more = [*MESSAGES, message.model_dump(exclude_none=True), {"role": "user", "content": "And?"}]
    following = client.chat.completions.create(model="tiny", messages=more, max_tokens=20)
    assert following.usage.prompt_tokens > answer.usage.prompt_tokens


def test_an_answer_that_fills_the_context_says_so(client):
    long = [{"role": "user", "content": "zq" * 505}]
    given = {"model": "tiny", "messages": long, "n": 8, "seed": 0, "extra_body": {"modalities": ["text"]}}
    answer = client.chat.completions.create(**given)
    assert answer.usage.prompt_tokens > 1000
    reasons = [choice.finish_reason for choice in answer.choices]
    assert "length" in reasons
    assert client.chat.completions.create(**given, max_tokens=1000).choices[0].finish_reason == reasons[0]


def test_images_and_images_that_grow(client):
    (large,) = client.images.generate(model="tiny", prompt="a cat", size="96x96").data  # more than 512 tokens
    assert pixels_of(large.b64_json).shape == (96, 96, 3)
    whole = validated(client.images.generate(model="tiny", prompt="a cat", n=2, size="24x16", extra_body={"seed": 1}))
    assert [pixels_of(image.b64_json).shape for image in whole.data] == [(16, 24, 3)] * 2
    small = {"model": "tiny", "prompt": "a cat", "size": "24x16", "stream": True, "partial_images": 1}
    assert pixels_of(next(iter(client.images.generate(**small))).b64_json).shape == (16, 24, 3)
    given = {
        "model": "tiny",
        "prompt": "a cat",
        "size": "64x64",
        "stream": True,
        "partial_images": 3,
        "extra_body": {"seed": 1},
    }
    events = [validated(event) for event in client.images.generate(**given)]
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    rows = [int((np.ptp(pixels_of(event.b64_json).reshape(64, -1), axis=1) > 0).sum()) for event in events]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def test_an_image_is_edited_and_what_a_mask_shows_transparent_is_made_anew(client):
    original = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    y, x = np.mgrid[:24, :32]
    hole = (x < 12) & (y < 12)
    mask = Image.fromarray(np.dstack([original, np.where(hole, 0, 255).astype(np.uint8)]), "RGBA")
    files = {}
    for name, image in (("image", Image.fromarray(original)), ("mask", mask)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[name] = (f"{name}.png", buffer.getvalue())
    given = {"model": "tiny", "prompt": "a cat", "n": 2, "response_format": "b64_json"}
    filled = validated(client.images.edit(**given, **files)).data
    for image in filled:
        pixels = pixels_of(image.b64_json)
        assert np.array_equal(pixels[18:, 18:], original[18:, 18:])
        assert (pixels[hole] != original[hole]).any()
    answer = client.images.edit(**given, image=files["image"])
    (edited, _) = validated(answer).data
    assert pixels_of(edited.b64_json).shape == original.shape
    details = answer.usage.input_tokens_details
    assert details.image_tokens > 24 * 32 // 8**2  # its codes, its size, and where it begins and ends
    assert details.image_tokens + details.text_tokens == answer.usage.input_tokens
    small = io.BytesIO()
    mask.resize((8, 8)).save(small, "PNG")
    for bad, message in (
        ({"mask": ("mask.png", small.getvalue())}, "a mask of 8 x 8 for an image of 32 x 24 pixels"),
        ({"mask": ("mask.png", b"nothing")}, "mask"),
        ({"image": ("a.png", b"nothing")}, "image"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(**given, **(files | bad))
    listed = client.images.edit(**given, image=[files["image"]], size="auto", extra_body={"user": "a"})
    assert len(validated(listed).data) == 2
    for more, message in (
        ({"stream": True}, "stream: this value is not supported"),
        ({"size": "512x512"}, "size: this value is not supported"),
        ({"extra_body": {"bogus": 1}}, "bogus: there is no such field"),
        ({"image": [files["image"]] * 2}, "image: 2 images; one is edited at a time"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(**(given | {"image": files["image"]} | more))
    with pytest.raises(openai.BadRequestError, match="instruction: give a text"):
        client.images.edit(**(given | {"prompt": " "}), image=files["image"])


def test_opus_knows_few_rates():
    for rate, written in ((22_050, 48_000), (8_000, 8_000)):
        sine = torch.sin(torch.arange(rate) / rate * 2 * np.pi * 440)[None]
        samples, found = soundfile.read(io.BytesIO(encoded(sine, rate, "opus")))
        assert (found, len(samples)) == (written, written)


def test_speech_and_transcriptions(client):
    audio = {}
    for format in ("wav", "pcm", "flac"):
        answer = client.audio.speech.create(
            model="tiny", voice="any", input="a bell", response_format=format, extra_body={"seed": 1, "seconds": 0.8}
        )
        audio[format] = answer.content
    samples, rate = soundfile.read(io.BytesIO(audio["flac"]), dtype="int16")
    assert rate == 8000
    np.testing.assert_allclose(np.frombuffer(audio["pcm"], "<i2"), samples, atol=1)
    assert audio["wav"][44:] == audio["pcm"]
    spoken = {}
    for text in ("One bell in the old tower.", "Two bells!", "One bell in the old tower. Two bells!"):
        given = {"model": "tiny", "voice": "any", "input": text, "response_format": "pcm"}
        spoken[text] = client.audio.speech.create(**given, extra_body={"seed": 1, "temperature": 0}).content
    pause = bytes(2 * round(PAUSE * rate))
    assert (
        spoken["One bell in the old tower. Two bells!"] == spoken["One bell in the old tower."] + pause + spoken["Two bells!"]
    )
    assert isinstance(validated(client.audio.transcriptions.create(model="tiny", file=("a.wav", wav()))).text, str)
    assert isinstance(client.audio.transcriptions.create(model="tiny", file=("a.wav", wav()), response_format="text"), str)


@pytest.fixture(scope="module")
def word_server(tmp_path_factory, bundle_folder):
    """A server of a bundle that speaks and listens word by word."""
    folder = tmp_path_factory.mktemp("words") / "tiny"
    shutil.copytree(bundle_folder, folder)
    (folder / "generation_config.json").write_text('{"speech_unit": "word"}')
    with running(folder, *LIMITS) as server:
        yield server


def test_speech_word_by_word(word_server):
    client = openai.OpenAI(base_url=f"{word_server.url}/v1", api_key="none", max_retries=0)
    given = {"model": "tiny", "voice": "any", "input": "Two red bells", "extra_body": {"seed": 1, "temperature": 0}}
    streamed = client.audio.speech.create(**given, response_format="pcm").content
    samples, rate = soundfile.read(
        io.BytesIO(client.audio.speech.create(**given, response_format="flac").content), dtype="int16"
    )
    assert rate == 8000
    np.testing.assert_allclose(np.frombuffer(streamed, "<i2"), samples, atol=1)
    recording = ("a.wav", wav(1, 1.0))
    said = validated(client.audio.transcriptions.create(model="tiny", file=recording, response_format="verbose_json"))
    assert said.text.replace(" ", "") == "".join(word.word for word in said.words).replace(" ", "")
    assert all(0 <= word.start < word.end <= 1.1 for word in said.words)
    assert client.audio.transcriptions.create(model="tiny", file=recording, response_format="text").strip() == said.text
    for data, message in ((b"", "an empty file"), (b"RIFF", "file: ")):
        answer = httpx.post(f"{word_server.url}/v1/audio/transcriptions", files={"file": ("a.wav", data)})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="give a text to speak"):
        client.audio.speech.create(**given | {"input": "  "}, response_format="pcm")


# ---- Bad input --------------------------------------------------------------------------------------------------------


def huge_png(side: int = 40_000) -> str:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def hours() -> str:
    """Ten hours of silence in a few kilobytes."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8000, 1, format="FLAC") as file:
        for _ in range(36):
            file.write(np.zeros(8_000_000, np.int16))
    return base64.b64encode(buffer.getvalue()).decode()


def image(url):
    return user([{"type": "image_url", "image_url": {"url": url}}])


HI = user("Hi")
JSON = {"Content-Type": "application/json"}
BAD = [
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": "Hi"}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "Hi"}]}, "message 1: role 'robot'"),
    ("chat/completions", HI | {"temperature": "hot"}, "temperature"),
    ("chat/completions", HI | {"temperature": -1}, "temperature"),
    ("chat/completions", HI | {"top_p": 2}, "top_p"),
    ("chat/completions", HI | {"n": 0}, "n"),
    ("chat/completions", HI | {"n": 1000}, "n"),
    ("chat/completions", HI | {"n": 9}, "n: 9 outputs are more than the 8 that this server can have in progress"),
    ("chat/completions", HI | {"max_tokens": 10**9}, "max_tokens"),
    ("chat/completions", HI | {"top_k": 10**23}, "top_k"),
    ("chat/completions", HI | {"modalities": "audio:" + "9" * 400 + "s"}, "modalities"),
    ("chat/completions", HI | {"modalities": "text:" + "9" * 5000}, "modalities"),
    ("chat/completions", HI | {"stream_options": [1]}, "stream_options"),
    ("chat/completions", HI | {"audio": {"format": "mp3"}}, "audio"),
    ("chat/completions", user([{"type": "\ud800", "text": "a"}]), "no such content"),
    ("chat/completions", image("data:image/png;base64,é"), "not base64"),
    ("chat/completions", user("a" * 400_000), "400000 characters"),
    ("images/generations", {"prompt": "a", "output_format": "jpeg"}, "output_format"),
    ("images/generations", {"prompt": "a", "size": "9" * 5000 + "x8"}, "size"),
    ("chat/completions", HI | {"seed": 2**70}, "seed"),
    ("chat/completions", HI | {"modalities": ["smell"]}, "modalities"),
    ("chat/completions", HI | {"modalities": []}, "modalities"),
    ("chat/completions", HI | {"stop": ["."]}, "stop"),
    ("chat/completions", HI | {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", HI | {"temprature": 1}, "temprature: there is no such field"),
    ("chat/completions", user("a cat " * 3000), "the decoder takes"),
    ("chat/completions", image("data:image/png;base64,%%%"), "not base64"),
    ("chat/completions", image("data:image/png;base64," + base64.b64encode(b"no image").decode()), "image"),
    ("chat/completions", image("data:image/png;base64," + huge_png()), "1600000000 pixels are too many"),
    (
        "chat/completions",
        user([{"type": "input_audio", "input_audio": {"data": hours(), "format": "flac"}}]),
        "36000 s of audio are",
    ),
    ("chat/completions", image("https://example.org/a.png"), "is no data URL"),
    ("chat/completions", image("/etc/passwd"), "is no data URL"),
    ("chat/completions", image("file:///etc/passwd"), "is no data URL"),
    ("images/generations", {"prompt": ""}, "prompt"),
    ("images/generations", {"prompt": "a", "size": "7x7"}, "size"),
    ("images/generations", {"prompt": "a", "size": "big"}, "size"),
    ("images/generations", {"prompt": "a", "size": "400000x400000"}, "modalities"),
    ("images/generations", {"prompt": "a", "response_format": "url"}, "response_format"),
    ("audio/speech", {"input": "a", "response_format": "aac"}, "response_format"),
    ("audio/speech", {"input": "a", "seconds": 100_000}, "budget"),
    ("audio/speech", {"input": "a" * 100_000}, "at most 60000 characters"),
]


@pytest.mark.parametrize(("path", "body", "said"), BAD, ids=[f"{path}-{said}-{i}" for i, (path, _, said) in enumerate(BAD)])
def test_what_is_wrong_is_said_in_openais_form(server, path, body, said):
    answer = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), headers=JSON, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{}", b'"text"', b"[" * 100_000, b'{"messages": "\xe9"}'])
def test_bodies_that_are_no_json_are_refused(server, body):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_bodies_hosts_and_files_have_limits(server):
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=b" " * 3_000_000).status_code == 413
    assert httpx.post(url, content=iter([b" " * 1_000_000] * 3)).status_code == 413  # chunked: no length is told before
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    unknown = httpx.post(f"{server.url}/v1/embeddings", json={})
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "there is no POST /v1/embeddings here")
    assert httpx.delete(url).status_code == 405
    broken = httpx.post(url, content=b'{"a"', headers={"Content-Type": "application/json"}).json()["error"]
    assert (broken["message"], broken["param"]) == ("the body is not JSON, at character 4", None)
    for path in ("/../pyproject.toml", "/%2e%2e/app.py", "//etc/passwd", "/app.py"):
        assert httpx.get(server.url + path).status_code in (404, 405)
    assert "default-src 'self'" in httpx.get(f"{server.url}/").headers["content-security-policy"]
    for data in (b"", b"no audio", png()):
        answer = httpx.post(f"{server.url}/v1/audio/transcriptions", files={"file": ("a.wav", data)})
        assert answer.status_code == 400


# ---- Clients that come and go -----------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_slot(server, client):
    before = metrics(server)["unitok_generated_tokens"]
    for _ in range(3):
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=4, stream=True, extra_body={"modalities": ["text:300"]}
        )
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):  # one that did not stream
        client.with_options(timeout=httpx.Timeout(5, read=0.001), max_retries=0).chat.completions.create(
            model="tiny", messages=MESSAGES, n=4, extra_body={"modalities": ["text:300"]}
        )
    wait_until_idle(server)
    assert metrics(server)["unitok_generated_tokens"] - before < 16 * 300
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20)


def test_a_client_that_leaves_the_queue_is_not_generated_for(server, client):
    long = {"model": "tiny", "messages": MESSAGES, "extra_body": {"modalities": ["text:250"]}}
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(client.chat.completions.create, **long) for _ in range(4)]
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{server.url}/v1/chat/completions", json=HI | {"stream": True}, timeout=httpx.Timeout(5, read=0.001)
                )
        assert all(answer.result().choices for answer in slow)
    wait_until_idle(server)


def test_a_full_queue_says_come_again(server, client):
    def ask(_):
        body = {"messages": MESSAGES, "n": 2, "modalities": ["text:200"]}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    wait_until_idle(server)


def test_sigterm_finishes_what_runs(bundle_folder):
    with running(bundle_folder, *LIMITS) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = iter(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, extra_body={"modalities": ["text:250"]}
            )
        )
        next(stream)
        codes = []
        stopping = threading.Thread(target=lambda: codes.append(server.stop()))
        stopping.start()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        stopping.join()
        assert codes == [0]


def test_a_key_is_asked_for(bundle_folder):
    with running(bundle_folder, UNITOK_API_KEY="secret") as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret").models.list().data
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_step_that_fails_ends_its_requests_and_no_others(tiny, monkeypatch):
    from unitok.serve.engine import Engine, Job
    from unitok.serve.generation import Generation

    generation = Generation(tiny)
    engine: Engine = generation.engine
    engine.start()

    def ask() -> SimpleNamespace:
        got, done = [], threading.Event()
        (draft,) = generation.drafts(
            generation.chat.document([{"role": "user", "content": "Hi"}]), {"modalities": "text:5"}, turn=True
        )
        engine.submit([Job(draft, lambda ids, last: (got.append(ids), last and done.set()))])
        assert done.wait(20)
        return SimpleNamespace(failed=None in got)

    read = engine._session.decoder.read
    monkeypatch.setattr(engine._session.decoder, "read", lambda *a, **k: 1 / 0)
    assert ask().failed
    monkeypatch.setattr(engine._session.decoder, "read", read)
    assert not ask().failed
    engine.stop()
    assert json.dumps(len(engine.running)) == "0"


def test_boxes_come_in_answers_and_go_back_in_conversations(tmp_path, bundle_folder):
    parts = {name: bundle_folder / "tokenizers" / name for name in ("text", "image", "audio")}
    made = make_bundle(tmp_path / "b", parts, add=["box"])
    config = DecoderConfig(made.vocab.size, 64, 2, 96, 4, 4, 16, max_position_embeddings=512)
    Bundle(made.vocab, made.tokenizers, Decoder(config).eval()).save_pretrained(tmp_path / "b", overwrite=True)
    with running(str(tmp_path / "b")) as server:
        url, body = f"{server.url}/v1/chat/completions", {"messages": MESSAGES, "modalities": ["text:3", "box:2"], "seed": 1}
        message = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]
        box = message["parts"][1]
        assert box["type"] == "box"
        assert all(0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 for x0, y0, x1, y1 in box["boxes"])
        more = [*MESSAGES, {"role": "assistant", "content": message["parts"]}, {"role": "user", "content": "and now?"}]
        assert httpx.post(url, json=body | {"messages": more}, timeout=60).status_code == 200
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        assert [part["boxes"] for delta in deltas for part in delta.get("parts", [])] == [box["boxes"]]
