"""Promises of the audio tokenizer in use: pieces like the whole, streams, exact lengths, files of every kind."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange

from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.media import convert_audio, load_audio, read_audio_blocks
from unitok.pretrained import make_config
from unitok.tokenizers import AudioTokenizer, AudioTokenizerConfig
from unitok.tokenizers import audio as module
from unitok.tokenizers.stems import SpectrumHead, SpectrumStem

SMALL = {"sample_rate": 8000, "n_filters": 8, "dimension": 16, "ratios": (4, 3, 2), "num_codebooks": 3, "codebook_size": 32}
KINDS = {
    "causal": {"causal": True, "lstm": 1, "pad_mode": "reflect", "patch": 1, "kernel_size": 7, "last_kernel_size": 7},
    "causal-patch": {"causal": True, "patch": 4, "n_residual_layers": 2, "true_skip": False},
    "frames": {"causal": True, "encoder": "patch", "patch": 4},
    "causal-spectrum": {"causal": True, "lstm": 1, "patch": 4, "domain": "spectrum"},
    "centered": {"causal": False, "patch": 2, "n_residual_layers": 2, "pad_mode": "reflect"},
    "centered-spectrum": {"causal": False, "patch": 4, "domain": "spectrum"},
    "finite": {"causal": True, "patch": 4, "quantizer": "fsq", "scales": (8, 4)},
    "segments": {"segment": 0.25, "overlap": 0.1, "normalize": True, "norm": "time_group_norm", "patch": 1, "channels": 2},
    "segments-spectrum": {"segment": 0.25, "overlap": 0.1, "normalize": True, "patch": 4, "channels": 2, "domain": "spectrum"},
}


def build(kind: str, **options) -> AudioTokenizer:
    torch.manual_seed(0)
    model = AudioTokenizer(AudioTokenizerConfig(**(SMALL | {"codebook_dim": 8} | KINDS[kind] | options)))
    with torch.no_grad():
        waveform = torch.randn(4, model.config.channels, 4000) * 0.3
        model.quantizer.init_codebook(model(waveform, quantize=False).projected)
    return model.prepare_for_inference()


@pytest.fixture
def latents(monkeypatch):
    """What the encoder gives instead of codes: in float32 a near tie of two codes may round the other way in pieces."""
    monkeypatch.setattr(AudioTokenizer, "_search", lambda self, z, levels=None: z)


def noise(seconds: float, channels: int = 1, rate: int = 8000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(2, channels, round(seconds * rate), generator=generator) * 0.2
    return torch.cumsum(steps, -1) % 1.0 - 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("segments")])
@pytest.mark.parametrize("seconds", [0.013, 1.0, 2.2503])
def test_long_audio_in_pieces_is_encoded_and_decoded_as_in_one_piece(kind, seconds, monkeypatch, latents):
    model, waveform = build(kind), noise(seconds)
    whole, codes = (
        model.encode(waveform),
        torch.randint(32, (2, model.num_codebooks, -(-waveform.shape[-1] // model.hop_length))),
    )
    again = model.decode(codes, waveform.shape[-1])
    assert whole.shape[-1] == codes.shape[-1]
    assert again.shape == waveform.shape
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0.3)
    torch.testing.assert_close(model.encode(waveform), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(codes, waveform.shape[-1]), again, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("segments")])
@pytest.mark.parametrize("length", [1, 1601, 8104])
def test_audio_is_padded_to_padded_length_without_another_code(kind, length, latents):
    model, waveform = build(kind), noise(1.1)[..., :length]
    whole = model.padded_length(length)
    assert 0 <= whole - length < model.hop_length
    padded = torch.nn.functional.pad(waveform, (0, whole - length))
    torch.testing.assert_close(model.encode(padded), model.encode(waveform), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("segments")])
def test_audio_is_encoded_after_parts_of_a_frame_of_silence(kind, latents):
    model, waveform = build(kind), noise(1.013)[:1]
    delays, length = [0, model.hop_length // 3, model.hop_length * 2 // 3], waveform.shape[-1]
    wanted = [model.encode(torch.nn.functional.pad(waveform, (delay, 0))[..., :length]) for delay in delays]
    found = model.encode_shifted(waveform[0].split(1000, -1), 3)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=0)


def test_a_patch_encoder_reads_each_frame_alone(latents):
    model, waveform = build("frames"), noise(0.2)
    hop = model.hop_length
    whole = model.encode(waveform)
    frames = [model.encode(waveform[..., i : i + hop]) for i in range(0, waveform.shape[-1], hop)]
    torch.testing.assert_close(torch.cat(frames, -1), whole, atol=1e-5, rtol=0)


def test_configs_that_cannot_be_are_refused():
    for options, problem in (
        ({"encoder": "frame"}, "encoder is frame: choose seanet or patch"),
        ({"domain": "time"}, "domain is time: choose samples or spectrum"),
        ({"quantizer": "vq"}, "quantizer is vq: choose rvq or fsq"),
        ({"scales": ()}, "give at least one dimension"),
        ({"scales": (8, 2)}, "of 3 values or more"),
        ({"quantizer": "fsq", "quantizer_dropout": 0.5}, "are of quantizer rvq"),
    ):
        with pytest.raises(UserError, match=problem):
            AudioTokenizerConfig(**options)
    made = AudioTokenizerConfig(quantizer="fsq", scales=[4, 4], num_codebooks=3)
    assert (made.num_codebooks, made.codebook_size, made.scales) == (1, 16, (4, 4))


def test_a_later_field_of_the_config_leaves_the_fingerprints_of_before():
    """Written down before `domain` was a field: else bundles that exist would refuse their own tokenizers."""
    model = AudioTokenizer(
        AudioTokenizerConfig(n_filters=4, dimension=4, ratios=(2,), patch=4, num_codebooks=1, codebook_size=4)
    )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1)
    found = model.fingerprint()
    model.config = replace(model.config, domain="spectrum")
    assert found.startswith("b6e4af0befa79cad")
    assert model.fingerprint() != found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("patch", [5, 8])
def test_spectra_become_the_audio_that_they_are_of(causal, patch):
    config = AudioTokenizerConfig(channels=2, domain="spectrum", patch=patch, causal=causal)
    stem, head, waveform = SpectrumStem(config), SpectrumHead(config), noise(0.1, channels=2)[..., : 90 * patch]
    right = 0 if causal else stem.reach // 2
    padded = F.pad(waveform, (stem.reach - right, right)).unfold(-1, stem.window, patch)
    spectrum = rearrange(torch.fft.rfft(padded * stem.hann, norm="ortho"), "b c n f -> b (c f) n")
    log_magnitudes = spectrum.abs().clamp_min(1e-9).log()
    torch.testing.assert_close((stem(waveform) - 1) * 2, (spectrum.abs().square() + 1e-6).log() / 2, atol=1e-3, rtol=0)
    again = head(torch.cat([log_magnitudes + 3, spectrum.angle()], 1))
    inside = slice(stem.reach, -stem.reach)
    torch.testing.assert_close(again[..., inside], waveform[..., inside], atol=1e-5, rtol=0)


def test_codes_of_audio_differ():
    assert len(build("causal").encode(noise(1.0)).unique()) > 8


@pytest.mark.parametrize("kind", ["causal", "causal-patch", "causal-spectrum", "frames", "finite"])
@pytest.mark.parametrize("piece", [1, 17, 96, 4000])
def test_streams_give_the_latents_and_samples_of_the_whole(kind, piece, latents):
    model, waveform = build(kind), noise(0.27)
    whole, stream = model.encode(waveform), model.encode_stream()
    found = torch.cat([*(stream.push(part) for part in waveform.split(piece, -1)), stream.finish()], -1)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    codes, back = torch.randint(32, (2, model.num_codebooks, whole.shape[-1])), model.decode_stream()
    samples = torch.cat([*(back.push(part) for part in codes.split(max(1, piece // 96), -1)), back.finish()], -1)
    torch.testing.assert_close(samples, model.decode(codes), atol=1e-5, rtol=0)


def test_a_stream_gives_each_code_as_soon_as_its_frame_is_complete():
    model = build("causal-patch")
    stream, waveform = model.encode_stream(num_codebooks=2), noise(0.2)
    for _ in range(3):
        part, waveform = waveform[..., : model.hop_length], waveform[..., model.hop_length :]
        assert stream.push(part).shape == (2, 2, 1)
    with pytest.raises(UserError, match="causal"):
        build("centered").encode_stream()


@pytest.mark.parametrize("kind", ["causal-patch", "causal-spectrum"])
def test_what_two_streams_give_back_is_late_by_the_latency(kind):
    model, waveform = build(kind), noise(0.06)
    encoding, decoding = model.encode_stream(), model.decode_stream()
    given = behind = 0
    for count in range(waveform.shape[-1]):  # sample by sample
        behind = max(behind, count + 1 - given)
        given += decoding.push(encoding.push(waveform[..., count : count + 1])).shape[-1]
    assert behind == round(model.latency * model.sample_rate)


@pytest.mark.parametrize("kind", ["causal-patch", "causal-spectrum"])
def test_codes_of_a_causal_model_do_not_depend_on_later_audio(kind):
    model, waveform = build(kind), noise(1.0)
    other = waveform.clone()
    other[..., 4000:] = 0.3
    frames = 4000 // model.hop_length
    assert torch.equal(model.encode(waveform)[..., :frames], model.encode(other)[..., :frames])


@pytest.mark.parametrize("kind", ["segments", "segments-spectrum"])
@pytest.mark.parametrize("seconds", [0.05, 0.2375, 0.25, 0.26, 0.9])
def test_segments_fade_into_one_another_and_keep_their_loudness(seconds, kind):
    model = build(kind)
    waveform = torch.cat([noise(seconds), noise(seconds) * 0.5], 1) * torch.linspace(0.01, 1, round(seconds * 8000))
    codes, scales = model.encode(waveform), model.scales(waveform)
    length, stride = 2000, 1800
    count = max(1, -(-waveform.shape[-1] // stride))
    assert scales.shape == (2, count)
    lengths = [min(length, waveform.shape[-1] - i * stride) for i in range(count)]
    assert codes.shape[-1] == sum(-(-n // model.hop_length) for n in lengths)
    again = model.decode(codes, waveform.shape[-1], scales)
    assert again.shape == waveform.shape
    assert again.isfinite().all()
    with torch.no_grad():
        first = model(waveform[..., :length]).signal.clamp(-1, 1)
    alone = min(stride, waveform.shape[-1]) if count == 1 else stride
    torch.testing.assert_close(again[..., :alone], first[..., :alone], atol=1e-5, rtol=0)
    size = model.size(waveform[0])
    torch.testing.assert_close(model.restore(codes[0], size), again[0], atol=1e-3, rtol=0)


def test_fewer_levels_encode_and_decode(monkeypatch):
    model, waveform = build("causal"), noise(0.5)
    codes = model.encode(waveform)
    assert torch.equal(model.encode(waveform, num_codebooks=2), codes[:, :2])
    assert model.decode(codes[:, :1], 4000).shape == waveform.shape
    assert model.bitrate == 3 * 5 * model.frame_rate
    with pytest.raises(ValueError, match="1 to 3 levels"):
        model.encode(waveform, num_codebooks=4)


def test_a_copy_that_is_folded_leaves_the_original():
    torch.manual_seed(0)
    whole = AudioTokenizer(AudioTokenizerConfig(**SMALL, patch=4, norm="weight_norm"))
    samples = torch.randn(1, 1, 2000).clamp(-1, 1) * 0.5
    expected = whole.encode(samples)
    assert torch.equal(whole.first_levels(2).prepare_for_inference().encode(samples), expected[:, :2])
    assert torch.equal(whole.encode(samples), expected)


def test_weight_norm_is_folded_without_a_change(tmp_path):
    torch.manual_seed(0)
    model = AudioTokenizer(AudioTokenizerConfig(**SMALL, norm="weight_norm", causal=True)).eval()
    waveform = noise(0.4)
    with torch.no_grad():
        model.quantizer.init_codebook(model(waveform, quantize=False).projected)
        before = model(waveform, quantize=False)
        model.prepare_for_inference()
        after = model(waveform, quantize=False)
    assert model.config.norm == "none"
    torch.testing.assert_close(before.projected, after.projected, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.signal, after.signal, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path / "audio")
    again = AudioTokenizer.from_pretrained(tmp_path / "audio")
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.encode(waveform), model.encode(waveform))


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44_100, 2), (11_025, 1), (96_000, 8)])
@pytest.mark.parametrize("seconds", [0.004, 1.234])
def test_a_file_in_blocks_is_the_file_at_once(tmp_path, rate, channels, seconds):
    path = tmp_path / "a.wav"
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.uniform(-0.5, 0.5, (max(1, round(seconds * rate)), channels)), rate)
    blocks = list(read_audio_blocks(path, 8000, 1, 0.1))
    found, wanted = torch.cat(blocks, -1), convert_audio(*load_audio(path), 8000, 1)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_files_of_every_format_come_back_at_their_length(kind, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0.2)
    model, path = build(kind), tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(0.7, 1, 16_000)[0].T.numpy(), 16_000)
    codes, size = model.encode_file(path)
    seconds = soundfile.info(path).frames / 16_000
    assert size[0] == round(seconds * 8000)
    model.decode_file(codes, tmp_path / "b.wav", size)
    again, rate = load_audio(tmp_path / "b.wav")
    assert rate == 8000
    assert again.shape == (model.config.channels, size[0])


def test_odd_audio_are_handled_or_refused_in_one_line(tmp_path):
    model, stereo = build("causal"), build("segments")
    soundfile.write(tmp_path / "one.wav", np.full((1, 1), 0.5), 8000)
    soundfile.write(tmp_path / "octophonic.wav", np.random.default_rng(0).uniform(-1, 1, (9600, 8)), 96_000)
    for name, length in (("one", 1), ("octophonic", 800)):
        for tokenizer in (model, stereo):  # mono is given to both channels
            codes, size = tokenizer.encode_file(tmp_path / f"{name}.wav")
            assert size[0] == length
            assert tokenizer.restore(codes, size).isfinite().all()
    soundfile.write(tmp_path / "whole.mp3", noise(2.0, 1, 16_000)[0].T.numpy(), 16_000)
    data = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    tone = 0.3 * np.sin(np.arange(800) / 9)
    soundfile.write(tmp_path / "opposite.wav", np.stack([tone, -tone], -1), 8000)
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros((800, 1)), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full((800, 1), np.nan), 8000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    refusals = {"empty.wav": "zero length", "silent.wav": "silence", "nan.wav": "not finite", "text.wav": "not readable"}
    refusals |= {"cut.mp3": "cut off: its header says 2.* s, 0.9", "opposite.wav": "opposite phase and cancel to silence"}
    for name, why in (refusals | {"gone.wav": "no such file"}).items():
        with pytest.raises(UserError, match=why):
            model.encode_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "frame_rate", "levels", "codes", "millions"),
    [
        ("encodec-24khz", 75, 8, 1024, 14.9),
        ("musicgen-32khz", 50, 4, 2048, 56.8),
        ("speech-16khz", 50, 8, 1024, 34.1),
        ("codec-48khz-stereo", 150, 8, 1024, 14.9),
        ("laptop-speech-16khz", 50, 8, 256, 6.69),
        ("laptop-8khz", 25, 4, 256, 1.23),
    ],
)
def test_the_presets_are_the_networks_that_they_say(name, frame_rate, levels, codes, millions):
    path = CONFIGS / "audio" / f"{name}.yaml"
    asked = yaml.safe_load(path.read_text())["model"]["init_args"]["tokenizer"]
    with torch.device("meta"):
        model = AudioTokenizer(make_config(AudioTokenizerConfig, asked, name))
    assert (model.frame_rate, model.num_codebooks, model.codebook_size) == (frame_rate, levels, codes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
