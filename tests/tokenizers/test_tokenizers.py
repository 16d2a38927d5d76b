"""Promises of the tokenizers: exact text, any size and length."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.errors import UserError
from unitok.media import load_audio, load_image, save_audio
from unitok.tokenizers import AudioTokenizer, ImageTokenizer, ImageTokenizerConfig, TextTokenizer


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(["the red circle is above the blue square", "naïve café  twice spaced\tand tabbed"], size=320)


AWKWARD = [
    "",
    " ",
    "  a  b ",
    "\n\n",
    "a\r\nb",
    "▁",
    "▁▁ ▁x",
    "<unk>",
    "<s></s>",
    "<0x0A>",
    "\x00",
    "\ufeff",
    "👩‍👩‍👧",
    "\u202eabc",
    "e\u0301",
]


@pytest.mark.parametrize("string", AWKWARD)
def test_awkward_strings_come_back_as_they_were(text, string):
    assert text.decode(text.encode(string)) == string


def test_every_utf8_string_comes_back_and_uses_no_illegal_piece(text):
    chance = random.Random(0)
    ranges = [(0, 0x300), (0x2570, 0x2590), (0x4E00, 0x4F00), (0xE000, 0xE100), (0x1F300, 0x1F700), (0x10FF00, 0x10FFFF)]
    for _ in range(500):
        string = "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randrange(1, 30)))
        codes = text.encode(string)
        assert text.decode(codes) == string
        assert not set(codes) & set(text.illegal)


def test_a_corpus_too_small_for_the_size_gives_fewer_pieces_and_an_empty_one_says_so():
    assert 256 < TextTokenizer.train(["abc abc"], size=8000).size < 400
    with pytest.raises(UserError, match="no text to train on"):
        TextTokenizer.train(["", "  "])


@pytest.mark.parametrize("size", [(32, 32), (7, 45), (1, 1), (33, 20)])
def test_images_of_any_size_encode_and_come_back_in_that_size(tiny, tmp_path, size):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    codes, kept = tiny.image.encode_file(path, area=100_000)
    assert kept == size
    assert codes.shape == tuple(-(-side // tiny.image.stride) for side in size)
    tiny.image.decode_file(codes, tmp_path / "again.png", kept)
    assert load_image(tmp_path / "again.png").shape == (3, *size)


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"), [(8000, 1, 1.0), (44_100, 2, 0.31), (11_025, 1, 0.003), (48_000, 6, 0.5)]
)
def test_audio_of_any_rate_channels_and_length_come_back_at_their_length(tiny, tmp_path, rate, channels, seconds):
    path = tmp_path / "sound.wav"
    save_audio(path, np.random.default_rng(0).uniform(-0.5, 0.5, (channels, int(rate * seconds))).astype(np.float32), rate)
    codes, kept = tiny.audio.encode_file(path)
    assert kept == (max(1, round(int(rate * seconds) * 8000 / rate)),)
    assert codes.shape == (tiny.audio.num_codebooks, -(-kept[0] // tiny.audio.hop_length))
    tiny.audio.decode_file(codes, tmp_path / "again.wav", kept)
    samples, again = load_audio(tmp_path / "again.wav")
    assert (samples.shape, again) == ((1, kept[0]), 8000)


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tiny, tmp_path, name):
    part = getattr(tiny, name)
    part.save_pretrained(tmp_path / name)
    again = type(part).from_pretrained(tmp_path / name)
    assert again.fingerprint() == part.fingerprint()
    if name != "text":
        assert not again.training


def test_an_unknown_key_and_weights_that_do_not_fit_are_said_with_the_file(tiny, tmp_path):
    tiny.image.save_pretrained(tmp_path / "image")
    config = tmp_path / "image" / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"ch":', '"chanels":'))
    with pytest.raises(UserError, match=r"config.json: unknown keys chanels"):
        ImageTokenizer.from_pretrained(tmp_path / "image")
    config.write_text(good.replace('"ch": 64', '"ch": 32'))
    with pytest.raises(UserError, match="do not fit"):
        ImageTokenizer.from_pretrained(tmp_path / "image")


def test_encoding_does_not_depend_on_the_batch(tiny):
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        alone = torch.cat([tiny.image(i[None], quantize=False).projected for i in images])
        torch.testing.assert_close(tiny.image(images, quantize=False).projected, alone, atol=1e-5, rtol=0)


def test_the_decoder_of_a_patched_vqgan_is_exact_about_shape():
    model = ImageTokenizer(
        ImageTokenizerConfig(ch=32, ch_mult=(1, 1, 2), patch=3, z_channels=8, resolution=24, codebook_size=8)
    )
    assert model.stride == 12
    assert model(torch.zeros(1, 3, 25, 13), quantize=False).signal.shape == (1, 3, 25, 13)


def test_a_patch_encoder_reads_each_patch_alone():
    torch.manual_seed(0)
    model = ImageTokenizer(ImageTokenizerConfig(ch=32, ch_mult=(1, 2), patch=4, encoder="patch", z_channels=8, codebook_size=8))
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        whole = model(images, quantize=False).projected.unflatten(1, (4, 3))  # a code for 8 x 8 pixels
        for row, column in ((0, 0), (1, 2), (3, 1)):
            patch = images[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            torch.testing.assert_close(model(patch, quantize=False).projected[:, 0], whole[:, row, column], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="encoder is square: choose vqgan or patch"):
        ImageTokenizerConfig(encoder="square")


def test_audio_properties_say_the_rates(tiny):
    audio: AudioTokenizer = tiny.audio
    assert audio.hop_length * audio.frame_rate == audio.sample_rate == 8000


def test_the_longest_side_of_an_image_has_a_grid_size():
    from unitok.tokenizers.image import LONGEST_SIDE
    from unitok.vocab import GRID_SIZES

    assert LONGEST_SIDE == GRID_SIZES


@pytest.mark.parametrize(("fit", "shape"), [("keep", (3, 23, 45)), ("crop", (3, 32, 32)), ("resize", (3, 32, 32))])
def test_an_image_is_made_to_fit_as_the_user_says(tiny, fit, shape):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), dtype=np.uint8))
    assert tiny.image.prepare(picture, fit=fit).shape == shape


@pytest.mark.parametrize("size", [(1, 1), (3, 20_000), (20_000, 3)])
def test_images_of_absurd_shapes_are_neither_refused_nor_too_large_for_a_grid(tiny, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    codes = tiny.image.encode(tiny.image.prepare(picture)[None])
    assert 1 <= min(codes.shape[1:]) <= max(codes.shape[1:]) <= 64


def test_codes_do_not_depend_on_the_other_images_of_a_batch(tiny):
    torch.manual_seed(0)
    image, others = torch.rand(3, 32, 32) * 2 - 1, torch.rand(7, 3, 32, 32) * 2 - 1
    first = tiny.image.encode(torch.cat([others[:3], image[None]]))
    second = tiny.image.encode(torch.cat([others[4:], image[None]]))
    assert torch.equal(first[3], second[3])


def test_other_types_of_one_meaning_give_the_same_codes(tiny):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    images = pixels / 127.5 - 1
    codes = tiny.image.encode(images)
    for same in (images.numpy(), images.double(), pixels, pixels.numpy(), images.numpy()[..., ::-1].copy()[..., ::-1]):
        assert torch.equal(tiny.image.encode(same), codes)
    for same in (codes.int(), codes.numpy(), codes.numpy().astype(np.uint16)):
        assert torch.equal(tiny.image.decode(same), tiny.image.decode(codes))
    ints = torch.randint(-9000, 9000, (1, 1, 3000), dtype=torch.int16)
    samples = ints / 32768
    codes = tiny.audio.encode(samples)
    for same in (samples.numpy(), samples.double(), ints, ints.numpy().astype(">i2"), ints.int() * 65536):
        assert torch.equal(tiny.audio.encode(same), codes)
    assert torch.equal(tiny.audio.decode(codes.numpy()), tiny.audio.decode(codes))
    assert tiny.text.decode(np.array(tiny.text.encode("a text"))) == "a text"


GRID, FRAMES = torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 3, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("image.encode", torch.full((1, 3, 32, 32), 255.0), r"images are in \[-1, 1\], got up to 255"),
        ("image.encode", torch.full((1, 3, 8, 8), -1.5), r"images are in \[-1, 1\], got up to -1.5"),
        ("image.encode", torch.full((1, 3, 8, 8), torch.nan), "not finite"),
        ("image.encode", torch.full((1, 3, 8, 8), torch.inf), "not finite"),
        ("image.encode", torch.zeros(3, 8, 8), r"images are \[B, 3, H, W\], got \(3, 8, 8\)"),
        ("image.encode", torch.zeros(1, 8, 8, 3), r"images are \[B, 3, H, W\], got \(1, 8, 8, 3\)"),
        ("image.encode", torch.zeros(0, 3, 8, 8), r"images are \[B, 3, H, W\], got \(0, 3, 8, 8\)"),
        ("image.encode", torch.zeros(1, 3, 8, 8, dtype=torch.long), "images: int64; give float"),
        ("image.encode", Image.new("RGB", (8, 8)), r"images: an Image; .*prepare\(image\)"),
        ("image.encode", [[0.0]], "images: a list; "),
        ("image.encode", Path("a.png"), "images: a .*Path; .*encode_file"),
        ("image.decode", GRID - 1, r"codes are in \[0, 64\), got -1"),
        ("image.decode", GRID + 64, r"codes are in \[0, 64\), got 64"),
        ("image.decode", GRID.float(), r"codes are integers, int64 \[B, h, w\], got float32"),
        ("image.decode", GRID[0], r"codes are \[B, h, w\], got \(2, 2\)"),
        ("image.decode", GRID[:, :0], r"codes are \[B, h, w\], got \(1, 0, 2\)"),
        ("audio.encode", torch.randn(1, 1, 800) * 3000, r"samples are in \[-1, 1\], got up to"),
        ("audio.encode", torch.full((1, 1, 8), torch.nan), "not finite"),
        ("audio.encode", torch.zeros(1, 2, 8), r"samples are \[B, 1, T\], got \(1, 2, 8\)"),
        ("audio.encode", torch.zeros(1, 8), r"samples are \[B, 1, T\], got \(1, 8\)"),
        ("audio.encode", torch.zeros(1, 1, 0), r"samples are \[B, 1, T\], got \(1, 1, 0\)"),
        ("audio.encode", "a.wav", "samples: a str; .*encode_file"),
        ("audio.decode", FRAMES + 32, r"codes are in \[0, 32\), got 32"),
        ("audio.decode", torch.cat([FRAMES, FRAMES], 1), "num_codebooks 6: this tokenizer has 1 to 3 levels"),
        ("audio.decode", FRAMES[0], r"codes are \[B, k, N\], got \(3, 2\)"),
        ("audio.decode", FRAMES.double(), "got float64"),
        ("text.encode", ["a"], "text: a list; give one str"),
        ("text.encode", b"a", "text: a bytes; give one str"),
        ("text.encode", "a\ud800", "half of a surrogate pair at character 1"),
        ("text.decode", [3, 10_000], r"codes are in \[0, \d+\), got 10000"),
        ("text.decode", [-1], r"codes are in \[0, \d+\), got -1"),
        ("text.decode", [0.5], "codes are integers"),
        ("text.decode", [[1], [2, 3]], "codes are one list of integers"),
        ("text.decode", "abc", "codes: a str"),
    ],
)
def test_wrong_arguments_are_one_line_that_names_them(tiny, name, given, message):
    part, method = name.split(".")
    with pytest.raises(UserError, match=message) as error:
        getattr(getattr(tiny, part), method)(given)
    assert "\n" not in str(error.value)


def test_codes_are_those_of_float32_under_autocast(tiny):
    images, samples = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 1, 4000) - 0.5
    codes = tiny.image.encode(images), tiny.audio.encode(samples)
    pixels, waveform = tiny.image.decode(codes[0]), tiny.audio.decode(codes[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny.image.encode(images), codes[0])
        assert torch.equal(tiny.audio.encode(samples), codes[1])
        assert torch.equal(tiny.image.decode(codes[0]), pixels)
        assert torch.equal(tiny.audio.decode(codes[1]), waveform)


@pytest.mark.parametrize("given", ["a.png", Path("a.png"), None, np.zeros((8, 8, 3), np.uint8)])
def test_what_is_no_pil_image_is_not_prepared(tiny, given):
    with pytest.raises(UserError, match="^image: .*; give a PIL image"):
        tiny.image.prepare(given)


def test_codes_of_half_precision_are_refused(tiny):
    for part, given in (("image", torch.zeros(1, 3, 8, 8)), ("audio", torch.zeros(1, 1, 800))):
        half = copy.deepcopy(getattr(tiny, part)).bfloat16()
        with pytest.raises(UserError, match=r"weights are bfloat16, .*call \.float\(\)"):
            half.encode(given)


def test_waveforms_of_every_usual_form_are_one_audio(tiny):
    rng = np.random.default_rng(0)
    ints = rng.integers(-9000, 9000, 4000).astype(np.int16)
    samples = torch.from_numpy(ints / 32768.0).float()
    wanted = tiny.audio.prepare(samples[None], 8000)
    assert wanted.shape == (1, 4000)
    stereo = np.stack([ints, ints], 1)
    for given in (samples, samples.numpy(), samples.tolist(), samples[None].double(), samples[None].half().float() * 0 + samples,
                  ints, ints[None], stereo, stereo.T, stereo / 32768.0, stereo.astype(np.int32) * 65536):  # fmt: skip
        assert torch.equal(tiny.audio.prepare(given, 8000), wanted)
        assert torch.equal(tiny.audio.prepare(8000, given), wanted)
    over = samples[None] / samples.abs().max() * 1.2  # as a lossy codec gives it
    assert torch.equal(tiny.audio.prepare(over, 8000), over.clamp(-1, 1))
    clipped = torch.randn(1, 16_000).sign()  # swings out when it is resampled
    assert 1.5 < tiny.audio.prepare(clipped, 16_000).abs().max() < 4
    tiny.audio.encode(tiny.audio.prepare(clipped, 16_000)[None])
    eight = np.round(ints / 256 + 128).astype(np.uint8)
    torch.testing.assert_close(tiny.audio.prepare(eight, np.float64(8000)), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(1, 1, 800), 8000, r"a waveform is \[C, T\], channels first, got \(1, 1, 800\)"),
        (torch.zeros(100, 50), 8000, r"channels first, got \(100, 50\)"),
        (torch.zeros(1, 0), 8000, r"zero length, \(1, 0\)"),
        ([], 8000, "zero length"),
        (torch.ones(1, 800) * 16384, 8000, r"samples are in \[-1, 1\], got up to 16384"),
        (torch.ones(1, 800) * -2, 8000, "got up to -2"),
        (torch.full((1, 800), torch.nan), 8000, "not finite"),
        (torch.ones(1, 800), 0, "its rate is 0"),
        (torch.ones(1, 800), -8000, "its rate is -8000"),
        (torch.ones(1, 800), 8, "its rate is 8; give .* a rate from 100 to 1,000,000 Hz"),
        (torch.ones(1, 800), torch.nan, "its rate is nan"),
        (torch.ones(1, 800), "8000", "its rate is a str"),
        (torch.ones(1, 800), None, "its rate is None"),
        (torch.ones(1, 800, dtype=torch.long), 8000, "int64; give float"),
        (torch.ones(1, 800, dtype=torch.bool), 8000, "bool; give float"),
        ("a.wav", 8000, "a str; "),
        ([[1.0], [1.0, 2.0]], 8000, "unequal rows"),
        (torch.zeros(1, 800), 8000, "silence"),
        (torch.stack([torch.ones(800), -torch.ones(800)]) / 2, 8000, "opposite phase"),
    ],
)
def test_waveforms_without_one_meaning_are_one_line(tiny, samples, rate, message):
    with pytest.raises(UserError, match=message):
        tiny.audio.prepare(samples, rate)


def test_large_images_go_through_in_tiles_without_seams():
    """A network of random weights and a smooth image: at the borders of tiles nothing jumps more than elsewhere."""
    torch.manual_seed(0)
    model = ImageTokenizer(ImageTokenizerConfig(ch=32, ch_mult=(1, 2), patch=2, z_channels=8, codebook_size=64)).eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 150), torch.linspace(-1, 1, 210), indexing="ij")
    image = torch.stack([x, y, x * y])[None]
    model.quantizer.update(model(image, quantize=False).projected)
    whole = model.encode(image)
    model.tile = 96
    codes = model.encode(image)
    assert codes.shape == whole.shape
    model.tile = 1024
    corner = model.encode(image[..., :96, :96])  # a code is that of the tile in whose middle it is
    assert torch.equal(codes[:, :16, :16], corner[:, :16, :16])
    model.tile = 96
    tiled = model.decode(codes)
    assert tiled.shape == (1, 3, 152, 212)
    model.tile = 1024
    direct = model.decode(codes)
    for dim in (-1, -2):
        across = -2 if dim == -1 else -1
        jumps = tiled.diff(dim=dim).abs().mean(dim=(0, 1, across))
        usual = direct.diff(dim=dim).abs().mean(dim=(0, 1, across))
        assert (jumps <= 1.5 * usual.max()).all()


def test_memory_of_a_large_image_is_that_of_its_tiles(monkeypatch):
    model = ImageTokenizer(ImageTokenizerConfig(ch=32, ch_mult=(1, 2), patch=2, z_channels=8, codebook_size=64)).eval()
    model.quantizer.codebook.set(torch.randn(64, 8))
    sides = []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda x: (sides.append(x.shape), forward(x))[1])
    model.tile = 64
    model.encode(torch.zeros(1, 3, 300, 200))
    assert max(max(s[-2:]) for s in sides) <= 64
    sides.clear()
    model.encode(torch.zeros(9, 3, 32, 32))
    assert [s[0] for s in sides] == [4, 4, 1]  # no more pixels at once than a tile has
