"""Checkpoints of other projects, in their own layouts: equal codes and images, nothing executed, clear refusals."""

import argparse
import contextlib
import io
import pathlib
import re

import pytest
import torch
import yaml
from torch import nn

from unitok.checkpoints import load_checkpoint
from unitok.cli import main
from unitok.errors import UserError
from unitok.interop import import_checkpoint
from unitok.tokenizers import ImageTokenizer

taming_model = pytest.importorskip("taming.modules.diffusionmodules.model", reason="pip install --no-deps taming-transformers")


class TamingVQ(nn.Module):
    """taming's VQModel from its own modules (its class itself does not import any more)."""

    def __init__(self, attn_resolutions, dim, normalize=False, size=64):
        super().__init__()
        ddconfig = {
            "ch": 32,
            "out_ch": 3,
            "ch_mult": (1, 2, 2),
            "num_res_blocks": 1,
            "attn_resolutions": attn_resolutions,
            "in_channels": 3,
            "resolution": 32,
            "z_channels": 16,
            "double_z": False,
            "dropout": 0.0,
        }
        from taming.modules.vqvae.quantize import VectorQuantizer

        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = taming_model.Encoder(**ddconfig), taming_model.Decoder(**ddconfig)
        self.quantize = VectorQuantizer(size, dim, beta=0.25)
        nn.init.normal_(self.quantize.embedding.weight, std=0.5)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(16, dim, 1), nn.Conv2d(dim, 16, 1)
        self.normalize = normalize

    @torch.no_grad()
    def codes(self, x):
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        if not self.normalize:
            return self.quantize(z.permute(0, 3, 1, 2))[2][2].reshape(z.shape[:3])
        unit = nn.functional.normalize
        return (unit(z, dim=-1) @ unit(self.quantize.embedding.weight, dim=-1).T).argmax(-1)

    @torch.no_grad()
    def pixels(self, codes):
        book = self.quantize.embedding.weight
        book = nn.functional.normalize(book, dim=-1) if self.normalize else book
        return self.decoder(self.post_quant_conv(book[codes].permute(0, 3, 1, 2))).clamp(-1, 1)


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same_tokenizer(folder, theirs, images):
    ours = ImageTokenizer.from_pretrained(folder)
    codes = theirs.codes(images)
    assert codes.unique().numel() > 5
    assert torch.equal(ours.encode(images), codes)
    torch.testing.assert_close(ours.decode(codes), theirs.pixels(codes), atol=1e-5, rtol=1e-5)
    return ours


class ModelCheckpoint:
    """As old Lightning pickled them."""

    def __init__(self):
        self.best_model_path = "logs/best.ckpt"


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def save_taming(path, model, **more):
    import sys
    import types

    parts = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    kept = {name: sys.modules.get(name) for name in parts}
    for name in parts:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[parts[-1]].ModelCheckpoint = ModelCheckpoint
    try:
        state = model.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(1)}
        callbacks = {ModelCheckpoint: {"best": torch.tensor(1.0)}, "instance": ModelCheckpoint()}
        torch.save({"epoch": 3, "global_step": 9, "state_dict": state, "callbacks": callbacks} | more, path)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def test_a_taming_checkpoint_with_a_lightning_callback_inside(tmp_path, images, capsys):
    torch.manual_seed(0)
    theirs = TamingVQ(attn_resolutions=(8, 16), dim=24).eval()
    save_taming(tmp_path / "last.ckpt", theirs)
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": {"resolution": 32, "double_z": False}}}}
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(config))
    main(["import", "taming", str(tmp_path / "last.ckpt"), str(tmp_path / "out")])
    assert "64 codes of 24 dimensions, 4 pixels per code" in capsys.readouterr().out
    ours = same_tokenizer(tmp_path / "out", theirs, images)
    assert ours.config.resolution == 32
    assert set(ours.config.attn_resolutions) == {8, 16}


@pytest.mark.parametrize("layout", ["ema", "model"])
def test_llamagens_layouts(layout, tmp_path, images):
    torch.manual_seed(0)
    theirs = TamingVQ(attn_resolutions=(8,), dim=8, normalize=True).eval()
    state = {}
    for name, tensor in theirs.state_dict().items():  # to LlamaGen's names; its decoder goes from low to high resolution
        name = re.sub(r"^encoder\.down\.(\d)\.", r"encoder.conv_blocks.\1.", name)
        name = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.conv_blocks.{2 - int(m[1])}.", name)
        name = re.sub(r"(conv_blocks\.\d)\.block\.", r"\1.res.", name)
        for i, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f"mid.{part}.", f"mid.{i}.")
        state[name] = tensor
    state["quantize.codebook_used"] = torch.zeros(65536)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = {"ema": state, "model": other} if layout == "ema" else {"model": state}
    torch.save(checkpoint | {"optimizer": {}, "steps": 5, "args": argparse.Namespace(vq_model="VQ-16")}, tmp_path / "vq.pt")
    import_checkpoint("llamagen", tmp_path / "vq.pt").save_pretrained(tmp_path / "out")
    same_tokenizer(tmp_path / "out", theirs, images)


def test_chameleons_vqgan(tmp_path, images):
    torch.manual_seed(0)
    theirs = TamingVQ(attn_resolutions=(), dim=16).eval()
    save_taming(tmp_path / "vqgan.ckpt", theirs)
    params = {"ddconfig": {"resolution": 512, "attn_resolutions": []}, "embed_dim": 16, "n_embed": 64}
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    import_checkpoint("chameleon-vqgan", tmp_path / "vqgan.ckpt").save_pretrained(tmp_path / "out")
    assert same_tokenizer(tmp_path / "out", theirs, images).config.resolution == 512


@pytest.fixture
def chameleon(tmp_path):
    transformers = pytest.importorskip("transformers", reason="an extra")
    torch.manual_seed(0)
    config = transformers.ChameleonVQVAEConfig(
        embed_dim=12,
        num_embeddings=64,
        latent_channels=16,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        attn_resolutions=None,
        double_latent=False,
    )
    model = transformers.ChameleonVQVAE(config).eval()
    for module in model.modules():  # transformers starts so small that one code would take all
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    model.save_pretrained(tmp_path / "hf")
    return model


def test_transformers_chameleon_gives_equal_codes_and_decoding_says_why_not(tmp_path, chameleon, images, capsys):
    main(["import", "hf-chameleon-vqvae", str(tmp_path / "hf"), str(tmp_path / "out")])
    assert "encodes only" in capsys.readouterr().out
    ours = ImageTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        encoded = chameleon.encode(images)
        theirs = next(part for part in encoded.values() if part.dtype == torch.long).reshape(3, 8, 8)
    assert theirs.unique().numel() > 5
    assert torch.equal(ours.encode(images), theirs)
    with pytest.raises(UserError, match="only encodes"):
        ours.decode(theirs)


def test_weights_are_found_in_whatever_they_were_saved(tmp_path, images, caplog):
    """Wrappers, enclosing models, nested dictionaries, a whole module; of two sets the averaged one; the rest is named."""
    torch.manual_seed(0)
    theirs = TamingVQ((), dim=8).eval()
    plain = theirs.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}

    def under(prefix: str, state: dict = plain) -> dict:
        return {prefix + name: tensor for name, tensor in state.items()}

    saved = {
        "ddp": {"state_dict": under("module.")},
        "compiled": {"model": under("_orig_mod.")},
        "both": {"state_dict": under("module._orig_mod.")},
        "half compiled": {k.replace("encoder.", "encoder._orig_mod.", 1): v for k, v in plain.items()},
        "ldm": {"state_dict": under("first_stage_model.") | {"model.diffusion_model.out.weight": torch.ones(1)}},
        "nested": {"best_state": {"model": plain}, "model": zeros, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
        "ema": {"model": zeros, "model_ema": plain},
        "ema inside": {"state_dict": under("vqgan.", zeros) | under("ema.vqgan.")},
        "half": {"state_dict": {k: v.bfloat16() for k, v in plain.items()}},
        "module": theirs,
    }
    for name, checkpoint in saved.items():
        caplog.clear()
        torch.save(checkpoint, tmp_path / "vq.ckpt")
        ours = import_checkpoint("taming", tmp_path / "vq.ckpt")
        same = (ours.encode(images) == theirs.codes(images)).float().mean()
        assert same == 1 or (name == "half" and same > 0.8), name
        assert ("are not used" in caplog.text) == (name in ("ldm", "nested", "ema", "ema inside")), name
        assert ("read the weights under" in caplog.text) == (name in ("nested", "ema", "ema inside")), name
    (tmp_path / "vq.yaml").write_text("model: {params: {ddconfig: {ch: 64, resolution: 32}}}")
    with pytest.raises(UserError, match="its YAML says ch 64, its weights have 32: they do not belong together"):
        import_checkpoint("taming", tmp_path / "vq.ckpt")


# ---- What cannot be read --------------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.write_text, (self.path, "executed")


class Worse(Evil):
    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [Evil, Worse])
def test_nothing_in_a_checkpoint_is_executed(kind, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "callback": kind(tmp_path / "trace")}, tmp_path / "evil.ckpt")
    with contextlib.suppress(UserError):  # read without the object, or refused: either is fine
        assert torch.equal(load_checkpoint(tmp_path / "evil.ckpt")["state_dict"]["w"], torch.ones(2))
    assert not (tmp_path / "trace").exists()
    load_checkpoint(tmp_path / "evil.ckpt", trust=True)  # the file does what the test thinks it does
    assert (tmp_path / "trace").exists()


def test_checkpoints_that_do_not_fit_say_so_with_the_first_keys_that_differ(tmp_path, capsys):
    torch.manual_seed(0)
    state = TamingVQ((), dim=8).state_dict()
    lacking = {k: v for k, v in state.items() if k != "decoder.mid.block_1.conv1.weight"}
    torch.save({"state_dict": lacking | {"encoder.extra.weight": torch.ones(1)}}, tmp_path / "a.ckpt")
    caught = r"a\.ckpt.*it lacks decoder\.mid\.block_1\.conv1\.weight; it has encoder\.extra\.weight"
    with pytest.raises(UserError, match=caught):
        import_checkpoint("taming", tmp_path / "a.ckpt")
    torch.save({"state_dict": {"transformer.wte.weight": torch.ones(2, 2)}}, tmp_path / "gpt.ckpt")
    with pytest.raises(
        UserError, match=r"it has no encoder\.conv_in\.weight; its first keys are state_dict\.transformer\.wte\.weight"
    ):
        import_checkpoint("taming", tmp_path / "gpt.ckpt")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:5000])
    with pytest.raises(SystemExit) as stop:
        main(["import", "taming", str(tmp_path / "torn.ckpt"), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "torn.ckpt: not a checkpoint that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no such file or folder"):
        import_checkpoint("llamagen", tmp_path / "nothing.pt")
