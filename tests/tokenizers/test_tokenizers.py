"""Promises of the tokenizers: exact text, codes that decode to what was quantized, any size and length."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.data.media import load_audio, load_image, save_audio
from unitok.errors import UserError
from unitok.tokenizers import AudioTokenizer, ImageTokenizer, ImageTokenizerConfig, TextTokenizer
from unitok.tokenizers.quantize import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer


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


def trained(quantizer, channels, vectors=512):
    """A few training steps, so that the codebook is started and has moved."""
    torch.manual_seed(0)
    for _ in range(4):
        quantizer.train()(torch.randn(8, vectors // 8, channels))
    return quantizer.eval()


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(12, size=32, dim=4, vectors=512),
        FiniteScalarQuantizer(12, scales=(5, 4, 3)),
        ResidualQuantizer(12, levels=3, size=16, dim=6, vectors=512),
    ],
    ids=["vq", "fsq", "rvq"],
)
def test_looking_codes_up_gives_exactly_what_quantizing_gave(quantizer):
    trained(quantizer, 12)
    out = quantizer(torch.randn(2, 9, 12))
    assert out.codes.min() >= 0
    assert out.codes.max() < quantizer.size
    torch.testing.assert_close(quantizer.lookup(out.codes), out.latents, atol=1e-5, rtol=1e-5)


def test_dead_codes_are_revived_relative_to_the_batch_and_survive_the_next_step():
    torch.manual_seed(0)
    vq = VectorQuantizer(8, size=16, dim=4, vectors=256, decay=0.5)
    vq.train()(torch.randn(8, 32, 8))
    codebook = vq.quantize._codebook
    with torch.no_grad():  # kill half of the codes
        codebook.cluster_size[:, 8:] = 0
        codebook.embed[:, 8:] = torch.nn.functional.normalize(-10 * torch.ones(8, 4) + torch.randn(8, 4) * 0.01, dim=-1)
        codebook.embed_avg[:, 8:] = 0
    for _ in range(10):
        codes = vq(torch.randn(8, 32, 8)).codes
    assert len(codes.unique()) >= 14


def test_fewer_levels_of_a_residual_quantizer_are_a_coarser_reading_of_the_same():
    rvq = trained(ResidualQuantizer(8, levels=4, size=64, dim=8, vectors=512), 8)
    z = torch.randn(4, 64, 8)
    target = rvq.project_out(rvq.project_in(z))
    codes = rvq(z).codes
    errors = [(rvq.lookup(codes[..., :k]) - target).square().mean().item() for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_commitment_reaches_the_latents_from_every_level():
    rvq = trained(ResidualQuantizer(8, levels=3, size=16, dim=8, vectors=512), 8).train()
    z = torch.randn(4, 32, 8, requires_grad=True)
    low = rvq.project_in(z)
    _, _, losses = rvq.quantize(low)
    gradients = [torch.autograd.grad(loss, low, retain_graph=True)[0].abs().sum().item() for loss in losses.flatten()]
    assert len(gradients) == 3
    assert min(gradients) > 0


@pytest.mark.parametrize("size", [(32, 32), (7, 45), (1, 1), (33, 20)])
def test_pictures_of_any_size_encode_and_come_back_in_that_size(tiny, tmp_path, size):
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
def test_sounds_of_any_rate_channels_and_length_come_back_at_their_length(tiny, tmp_path, rate, channels, seconds):
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
    assert torch.equal(tiny.image.encode(images), torch.cat([tiny.image.encode(i[None]) for i in images]))


def test_the_decoder_of_a_patched_vqgan_is_exact_about_shape():
    model = ImageTokenizer(
        ImageTokenizerConfig(ch=32, ch_mult=(1, 1, 2), patch=3, z_channels=8, resolution=24, codebook_size=8)
    )
    assert model.stride == 12
    assert model(torch.zeros(1, 3, 25, 13), quantize=False).pixels.shape == (1, 3, 25, 13)


def test_audio_properties_say_the_rates(tiny):
    audio: AudioTokenizer = tiny.audio
    assert audio.hop_length * audio.frame_rate == audio.sample_rate == 8000


def test_the_longest_side_of_a_picture_has_a_grid_size():
    from unitok.tokenizers.image import LONGEST_SIDE
    from unitok.vocab import GRID_SIZES

    assert LONGEST_SIDE == GRID_SIZES
