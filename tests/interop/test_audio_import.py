"""EnCodec's and transformers' audio tokenizers as ours: equal codes, waveforms within 1e-5, random weights and codebooks."""

import hashlib
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from unitok.bundle import Unitok, make_bundle
from unitok.cli import main
from unitok.errors import UserError
from unitok.interop import import_checkpoint
from unitok.tokenizers import AudioTokenizer


@pytest.fixture(scope="module")
def encodec_model():
    """encodec's model class; its import of torchaudio, which it does not use here, is met by an empty stand-in."""
    with pytest.MonkeyPatch.context() as patch:  # only while it is imported: transformers would ask what it is
        patch.setitem(sys.modules, "torchaudio", sys.modules.get("torchaudio") or types.ModuleType("torchaudio"))
        return pytest.importorskip("encodec.model", reason="pip install --no-deps encodec==0.1.1").EncodecModel


def sound(channels: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.cumsum(torch.randn(2, channels, length, generator=generator) * 0.1, -1) % 1.0 - 0.5


def fill(codebooks, latents: torch.Tensor) -> None:
    """Random codes spread out as the latents [B, D, N] are, smaller at each level: the packages leave zeros."""
    rows = latents.transpose(1, 2).flatten(0, 1)
    for k, codebook in enumerate(codebooks):
        centre = rows.mean(0) if k == 0 else 0
        codebook.embed.copy_(centre + torch.randn_like(codebook.embed) * rows.std(0) * 0.7**k)


def build_encodec(model_class, kind: str):
    torch.manual_seed(0)
    if kind == "24khz":
        model = model_class._get_model([1.5, 3.0], 24_000, 1, causal=True, model_norm="weight_norm")
    else:
        model = model_class._get_model(
            [3.0, 6.0], 48_000, 2, causal=False, model_norm="time_group_norm", audio_normalize=True, segment=1.0
        )
    with torch.no_grad():
        fill([layer._codebook for layer in model.quantizer.vq.layers], model.encoder(sound(model.channels, 4000)))
        for layer in model.quantizer.vq.layers:
            layer._codebook.inited.fill_(1)
    model.set_target_bandwidth(model.target_bandwidths[-1])
    return model.eval()


@pytest.mark.parametrize(("kind", "length"), [("24khz", 24_000), ("24khz", 1001), ("48khz", 60_001), ("48khz", 48_000)])
def test_encodecs_published_files(encodec_model, kind, length, tmp_path):
    theirs = build_encodec(encodec_model, kind)
    torch.save(theirs.state_dict(), tmp_path / "model.th")
    name = f"encodec_{kind}-{hashlib.sha256((tmp_path / 'model.th').read_bytes()).hexdigest()[:8]}.th"
    (tmp_path / "model.th").rename(tmp_path / name)
    main(["import", "encodec", str(tmp_path / name), str(tmp_path / "ours")])
    ours = AudioTokenizer.from_pretrained(tmp_path / "ours")
    assert (ours.sample_rate, ours.num_codebooks, ours.codebook_size) == (theirs.sample_rate, theirs.quantizer.n_q, 1024)
    x = sound(theirs.channels, length)
    with torch.no_grad():
        frames = theirs.encode(x)
        wanted = theirs.decode(frames)[..., :length]
    codes = torch.cat([codes for codes, _ in frames], -1)
    found = ours.encode(x)
    assert len(codes.unique()) > min(50, codes.numel() // 3)
    assert torch.equal(found, codes)
    scales = ours.scales(x)
    if kind == "48khz":
        torch.testing.assert_close(scales, torch.cat([scale for _, scale in frames], -1))
    torch.testing.assert_close(ours.decode(found, length, scales), wanted.clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.restore(found[0], ours.size(x[0])), wanted[0].clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stereo", [False, True])
@pytest.mark.parametrize("style", ["parametrizations", "weight_g"])
def test_a_folder_saved_by_transformers(stereo, style, tmp_path):
    transformers = pytest.importorskip("transformers")
    shared = {"sampling_rate": 8000, "num_filters": 8, "hidden_size": 32, "upsampling_ratios": [4, 2], "codebook_size": 64}
    shared |= {"target_bandwidths": [18.0, 36.0], "codebook_dim": 32, "num_residual_layers": 2}
    if stereo:
        shared |= {"audio_channels": 2, "normalize": True, "chunk_length_s": 0.25, "overlap": 0.1}
        shared |= {"norm_type": "time_group_norm", "use_causal_conv": False}
    torch.manual_seed(0)
    theirs = transformers.EncodecModel(transformers.EncodecConfig(**shared)).eval()
    x = sound(2 if stereo else 1, 3801)
    with torch.no_grad():
        fill([layer.codebook for layer in theirs.quantizer.layers], theirs.encoder(x))
    theirs.save_pretrained(tmp_path / "hf")
    if style == "weight_g":
        state = load_file(tmp_path / "hf" / "model.safetensors")
        renamed = {
            k.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for k, v in state.items()
        }
        assert (renamed.keys() != state.keys()) == (not stereo)
        save_file(renamed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    ours = import_checkpoint("hf-encodec", tmp_path / "hf")
    with torch.no_grad():
        out = theirs.encode(x, bandwidth=36.0)
        wanted = theirs.decode(out.audio_codes, out.audio_scales, last_frame_pad_length=out.last_frame_pad_length)[0]
    codes = torch.cat(list(out.audio_codes), -1)
    codes = codes[..., : codes.shape[-1] - out.last_frame_pad_length]
    found = ours.encode(x)
    assert len(codes.unique()) > 20
    assert torch.equal(found, codes)
    torch.testing.assert_close(ours.decode(found, 3801, ours.scales(x)), wanted[..., :3801].clamp(-1, 1), atol=1e-5, rtol=0)


def test_an_import_works_wherever_an_audio_tokenizer_does(encodec_model, tmp_path):
    torch.save(build_encodec(encodec_model, "24khz").state_dict(), tmp_path / "model.th")
    main(["import", "encodec", str(tmp_path / "model.th"), str(tmp_path / "audio")])
    bundle = make_bundle(tmp_path / "bundle", {"audio": tmp_path / "audio"})
    x = sound(1, 2500)[0]
    document = Unitok.from_pretrained(tmp_path / "bundle").read_prompt([(x, 24_000)])
    assert bundle.vocab.decode(bundle.vocab.encode(document)).segments[0].codes.shape == (4, 8)
    assert bundle.decode_segment(document.segments[0]).shape == (1, 2500)


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "encodec_24khz-d7cc33bc.th")
    with pytest.raises(UserError, match="damaged or another file"):
        import_checkpoint("encodec", tmp_path / "encodec_24khz-d7cc33bc.th")
    (tmp_path / "encodec_24khz-d7cc33bc.th").rename(tmp_path / "other.th")
    with pytest.raises(UserError, match="not an EnCodec model: its first keys are a"):
        import_checkpoint("encodec", tmp_path / "other.th")
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        import_checkpoint("hf-encodec", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mimi"}')
    with pytest.raises(UserError, match="'mimi', not encodec"):
        import_checkpoint("hf-encodec", tmp_path / "hf")
