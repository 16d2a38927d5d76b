"""EnCodec's and transformers' audio tokenizers as ours: equal codes, waveforms within 1e-5, random weights and codebooks."""

import hashlib
import json
import sys
import types

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from unitok.api import Unitok
from unitok.bundle import make_bundle
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
        center = rows.mean(0) if k == 0 else 0
        codebook.embed.copy_(center + torch.randn_like(codebook.embed) * rows.std(0) * 0.7**k)


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
    state = load_file(tmp_path / "hf" / "model.safetensors")  # the same inside a MusicGen
    inside = {f"audio_encoder.{name}": tensor for name, tensor in state.items()} | {"decoder.lm_heads.0.weight": torch.ones(2)}
    save_file(inside, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "musicgen", "audio_encoder": config}))
    assert torch.equal(import_checkpoint("hf-encodec", tmp_path / "hf").encode(x), codes)


# ---- Others than the published two ------------------------------------------------------------------------------------


def codec(encodec_model, **how):
    """A codec of encodec's own modules, its output for audio, and its weights as people save them."""
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    torch.manual_seed(0)
    how = {"channels": 1, "dimension": 32, "n_filters": 8, "ratios": [4, 2], "causal": False} | how
    model = torch.nn.Module()
    model.encoder, model.decoder = SEANetEncoder(**how), SEANetDecoder(**how)
    model.quantizer = ResidualVectorQuantizer(dimension=how["dimension"], n_q=3, bins=64)
    x = sound(how["channels"], 3001)
    with torch.no_grad():
        z = model.eval().encoder(x)
        fill([layer._codebook for layer in model.quantizer.vq.layers], z)
        for layer in model.quantizer.vq.layers:
            layer._codebook.inited.fill_(1)
        codes = model.quantizer.vq.encode(z).transpose(0, 1)
    assert len(codes.unique()) > 20
    return model.state_dict(), x, codes


def xp_cfg(rate: int, causal: bool, **seanet) -> dict:
    """As audiocraft's `OmegaConf.to_yaml` leaves it: values that stand for others' are not resolved."""
    return {
        "sample_rate": rate, "channels": 1, "device": "cuda", "compression_model": "encodec",
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": "${sample_rate}", "channels": "${channels}",
                    "causal": causal, "renormalize": False},
        "seanet": {"dimension": 32, "channels": "${channels}", "causal": "${encodec.causal}", "n_filters": 8, "n_residual_layers": 1,
                   "ratios": [4, 2], "activation": "ELU", "activation_params": {"alpha": 1.0}, "norm": "weight_norm", "norm_params": {},
                   "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 7, "dilation_base": 2, "pad_mode": "constant",
                   "true_skip": True, "compress": 2, "lstm": 2, "disable_norm_outer_blocks": 0,
                   "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None}, "encoder": {}}
        | seanet,
        "rvq": {"n_q": 3, "q_dropout": False, "bins": 64, "decay": 0.99},
    }  # fmt: skip


def pickled_config(node):
    """The same as audiocraft's training checkpoints hold it: an object of OmegaConf's, which is not installed here."""

    def make(name, state):
        module = sys.modules["omegaconf.dictconfig"]
        if not hasattr(module, name):
            setattr(module, name, type(name, (), {"__module__": "omegaconf.dictconfig"}))
        out = getattr(module, name)()
        out.__dict__ |= {"_metadata": None, "_parent": None} | state
        return out

    if isinstance(node, dict):
        return make("DictConfig", {"_content": {key: pickled_config(value) for key, value in node.items()}})
    if isinstance(node, list):
        return make("ListConfig", {"_content": [pickled_config(value) for value in node]})
    return make("AnyNode", {"_val": node})


@pytest.mark.parametrize("kind", ["exported", "training", "folder"])
def test_audiocrafts_files_are_read_by_their_own_configuration(encodec_model, kind, tmp_path, monkeypatch):
    causal = kind == "folder"
    state, x, codes = codec(
        encodec_model, causal=causal, true_skip=True, pad_mode="constant", n_residual_layers=2, dilation_base=3
    )
    config = xp_cfg(16_000, causal, n_residual_layers=2, dilation_base=3)
    source = tmp_path / "compression_state_dict.bin"
    if kind == "training":
        for name in ("omegaconf", "omegaconf.dictconfig"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        torch.save({"best_state": {"model": state}, "model": zeros, "xp.cfg": pickled_config(config), "epoch": 3}, source)
    else:
        torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(config), "version": "1", "exported": True}, source)
    ours = import_checkpoint("encodec", tmp_path if kind == "folder" else source)
    assert (ours.sample_rate, ours.config.causal, ours.config.pad_mode) == (16_000, causal, "constant")
    assert torch.equal(ours.encode(x), codes)


def test_what_an_encodec_does_not_say_is_asked_for(encodec_model, tmp_path, capsys, caplog):
    state, x, codes = codec(encodec_model)
    source, out = tmp_path / "mine.th", tmp_path / "out"
    torch.save({"best_state": state, "xp.cfg": "sample_rate: 32000\nchannels: 1\n"}, source)

    def refusal(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["import", "encodec", str(source), str(out), *flags])
        assert stopped.value.code == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "neither its weights nor its xp.cfg say causal: give causal, or " in refusal()
    assert "--sample-rate 24000 was given, but its xp.cfg says 32000" in refusal("--sample-rate", "24000", "--causal")
    assert "encodec_16khz: no such file, nor a published model (encodec_24khz" in refusal("--config", "facebook/encodec_16khz")
    assert "n_filters 64" in refusal("--config", "facebook/encodec_32khz")
    main(["import", "encodec", str(source), str(out), "--no-causal"])
    assert "32000 Hz, not causal" in capsys.readouterr().out
    assert "no configuration says pad_mode reflect" in caplog.text
    assert torch.equal(AudioTokenizer.from_pretrained(out).encode(x), codes)
    torch.save(state, source)
    (tmp_path / "mine.yaml").write_text("sample_rate: 16000\ncausal: false\npad_mode: reflect\n")
    assert import_checkpoint("encodec", source).sample_rate == 16_000
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(xp_cfg(16_000, False, activation="SiLU")))
    with pytest.raises(UserError, match="activation 'SiLU'; only 'ELU'"):
        import_checkpoint("encodec", source)
    torch.save({"pretrained": "facebook/encodec_32khz", "exported": True}, source)
    with pytest.raises(UserError, match="no weights, only the name 'facebook/encodec_32khz' of others"):
        import_checkpoint("encodec", source)


def test_an_import_works_wherever_an_audio_tokenizer_does(encodec_model, tmp_path):
    torch.save(build_encodec(encodec_model, "24khz").state_dict(), tmp_path / "model.th")
    main(["import", "encodec", str(tmp_path / "model.th"), str(tmp_path / "audio"), "--sample-rate", "24000", "--causal"])
    bundle = make_bundle(tmp_path / "bundle", {"audio": tmp_path / "audio"})
    x = sound(1, 2500)[0]
    document = Unitok.from_pretrained(tmp_path / "bundle").read_prompt([(x, 24_000)])
    assert bundle.vocab.decode(bundle.vocab.encode(document)).segments[0].codes.shape == (4, 8)
    assert bundle.decode(document.segments[0]).shape == (1, 2500)


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "encodec_24khz-d7cc33bc.th")
    with pytest.raises(UserError, match="damaged, or another file"):
        import_checkpoint("encodec", tmp_path / "encodec_24khz-d7cc33bc.th")
    (tmp_path / "encodec_24khz-d7cc33bc.th").rename(tmp_path / "other.th")
    with pytest.raises(UserError, match="not an EnCodec model: it has no .*; its first keys are a"):
        import_checkpoint("encodec", tmp_path / "other.th")
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        import_checkpoint("hf-encodec", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mimi"}')
    with pytest.raises(UserError, match="'mimi', not encodec"):
        import_checkpoint("hf-encodec", tmp_path / "hf")
