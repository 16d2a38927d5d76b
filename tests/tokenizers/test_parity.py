"""Our networks give exactly what the reference implementations give for the same weights (CPU, fp32)."""

import contextlib
import io
import sys
import types

import pytest
import torch

from unitok.tokenizers.discriminators import PatchDiscriminator
from unitok.tokenizers.seanet import SEANetDecoder, SEANetEncoder
from unitok.tokenizers.vqgan import Decoder, Encoder

taming_model = pytest.importorskip("taming.modules.diffusionmodules.model", reason="pip install --no-deps taming-transformers")


@pytest.fixture(scope="module")
def encodec_seanet():
    """encodec's networks; its import of torchaudio, which they do not use, is met by an empty stand-in."""
    if "torchaudio" not in sys.modules:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    return pytest.importorskip("encodec.modules.seanet", reason="pip install --no-deps encodec==0.1.1")


TAMING = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "z_channels": 8, "resolution": 16}


def build_taming(name):
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(taming_model, name)(out_ch=3, in_channels=3, dropout=0.0, double_z=False, **TAMING)


@pytest.mark.parametrize("shape", [(16, 16), (24, 32)])
def test_encoder_and_decoder_equal_tamings(shape):
    torch.manual_seed(0)
    theirs, ours = build_taming("Encoder").eval(), Encoder(**TAMING).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *shape)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs, ours = build_taming("Decoder").eval(), Decoder(**TAMING).eval()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 8, shape[0] // 2, shape[1] // 2)
    torch.testing.assert_close(ours(z), theirs(z), atol=1e-5, rtol=1e-5)


def test_discriminator_equals_tamings():
    from taming.modules.discriminator.model import NLayerDiscriminator

    torch.manual_seed(0)
    theirs, ours = NLayerDiscriminator(ndf=16, n_layers=2).eval(), PatchDiscriminator(16, 2, norm="batch").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("true_skip", [True, False])
@pytest.mark.parametrize("length", [320, 333, 7])
def test_seanet_equals_encodecs(encodec_seanet, causal, true_skip, length):
    shared = {"dimension": 8, "n_filters": 4, "ratios": (4, 2), "causal": causal, "true_skip": true_skip, "norm": "none"}
    torch.manual_seed(0)
    theirs = encodec_seanet.SEANetEncoder(**(shared | {"ratios": [4, 2]})).eval()
    ours = SEANetEncoder(**shared).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 1, length)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs = encodec_seanet.SEANetDecoder(**(shared | {"ratios": [4, 2]})).eval()
    ours = SEANetDecoder(**shared).eval()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 8, 11)
    torch.testing.assert_close(ours(z), theirs(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_inference_and_training_paths_agree(patch):
    """Without gradients doubling is merged with its convolution, and activations are overwritten."""
    torch.manual_seed(0)
    network = {"ch": 64, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8, "resolution": 64, "patch": patch}
    x, z = torch.randn(2, 3, 64, 48), torch.randn(2, 8, 32 // patch, 24 // patch)
    for model, given in ((Encoder(**network), x), (Decoder(**network), z)):
        kept = given.clone()
        with torch.no_grad():
            fast = model(given)
        torch.testing.assert_close(fast, model(given), atol=1e-5, rtol=1e-5)
        assert torch.equal(given, kept)
