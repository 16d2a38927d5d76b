"""Our networks give exactly what the reference implementations give for the same weights (CPU, fp32)."""

import contextlib
import io
import sys
import types

import pytest
import torch

from unitok.tokenizers import AudioTokenizerConfig, ImageTokenizerConfig
from unitok.tokenizers.codebook import Codebook
from unitok.tokenizers.seanet import SEANetDecoder, SEANetEncoder, fold_weights
from unitok.tokenizers.vqgan import Decoder, Encoder
from unitok.training.discriminators import PatchDiscriminator, STFTDiscriminator
from unitok.training.tokenizer import adamw

taming_model = pytest.importorskip("taming.modules.diffusionmodules.model", reason="pip install --no-deps taming-transformers")


@pytest.fixture(scope="module")
def encodec_seanet():
    """encodec's networks; its import of torchaudio, which they do not use, is met by an empty stand-in."""
    with pytest.MonkeyPatch.context() as patch:  # only while it is imported: transformers would ask what it is
        patch.setitem(sys.modules, "torchaudio", sys.modules.get("torchaudio") or types.ModuleType("torchaudio"))
        return pytest.importorskip("encodec.modules.seanet", reason="pip install --no-deps encodec==0.1.1")


TAMING = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "z_channels": 8, "resolution": 16}


def build_taming(name):
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(taming_model, name)(out_ch=3, in_channels=3, dropout=0.0, double_z=False, **TAMING)


@pytest.mark.parametrize("shape", [(16, 16), (24, 32)])
def test_encoder_and_decoder_equal_tamings(shape):
    torch.manual_seed(0)
    theirs, ours = build_taming("Encoder").eval(), Encoder(ImageTokenizerConfig(**TAMING, patch=1)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *shape)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs, ours = build_taming("Decoder").eval(), Decoder(ImageTokenizerConfig(**TAMING, patch=1)).eval()
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


def encodec_config(**shared) -> AudioTokenizerConfig:
    """The configuration of a network as encodec's classes have it by default."""
    theirs = {"n_filters": 32, "ratios": (8, 5, 4, 2), "patch": 1, "kernel_size": 7, "last_kernel_size": 7}
    theirs |= {"true_skip": False, "lstm": 2, "norm": "weight_norm", "pad_mode": "reflect"}
    return AudioTokenizerConfig(**(theirs | shared))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("true_skip", [True, False])
@pytest.mark.parametrize("length", [320, 333, 7])
@pytest.mark.parametrize(("gradients", "folded"), [(True, False), (False, False), (False, True)])  # each by other kernels
def test_seanet_equals_encodecs(encodec_seanet, causal, true_skip, length, gradients, folded):
    shared = {"dimension": 8, "n_filters": 4, "ratios": (4, 2), "causal": causal, "true_skip": true_skip, "norm": "none"}
    torch.manual_seed(0)
    theirs = encodec_seanet.SEANetEncoder(**(shared | {"ratios": [4, 2]})).eval()
    ours = SEANetEncoder(encodec_config(**shared)).eval()
    ours.load_state_dict(theirs.state_dict())
    if folded:
        fold_weights(ours)
    x = torch.randn(2, 1, length)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs = encodec_seanet.SEANetDecoder(**(shared | {"ratios": [4, 2]})).eval()
    ours = SEANetDecoder(encodec_config(**shared)).eval()
    ours.load_state_dict(theirs.state_dict())
    if folded:
        fold_weights(ours)
    z = torch.randn(2, 8, 11)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ours(z), theirs(z), atol=1e-5, rtol=1e-5)


class Spectrogram(torch.nn.Module):
    """torchaudio's class of this name as encodec's discriminator calls it: complex, over the root of the window's power."""

    def __init__(self, n_fft, hop_length, win_length, window_fn, normalized, center, pad_mode, power):
        super().__init__()
        assert (n_fft, normalized, center, power) == (win_length, True, False, None)
        self.n_fft, self.hop = n_fft, hop_length
        self.hann = window_fn(n_fft)

    def forward(self, x):
        z = torch.stft(x.flatten(0, 1), self.n_fft, self.hop, window=self.hann, center=False, return_complex=True)
        return z.unflatten(0, x.shape[:2]) / self.hann.square().sum().sqrt()


@pytest.mark.parametrize("channels", [1, 2])
def test_stft_discriminator_equals_encodecs(encodec_seanet, channels, monkeypatch):
    transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    monkeypatch.setitem(sys.modules, "torchaudio", types.SimpleNamespace(transforms=transforms))
    from encodec.msstftd import MultiScaleSTFTDiscriminator

    torch.manual_seed(0)
    sizes = {"n_ffts": [256, 128], "hop_lengths": [64, 32], "win_lengths": [256, 128]}
    theirs = MultiScaleSTFTDiscriminator(filters=4, in_channels=channels, **sizes).eval()
    ours = STFTDiscriminator(channels, 4, (256, 128)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 3000)
    logits, features = theirs(x)
    found, seen = ours.with_features(x)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen, [f for scale in features for f in scale], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["weight_norm", "none"])
@pytest.mark.parametrize("folded", [False, True])
def test_inference_follows_weights_that_change(norm, folded):
    """With the optimizer that trains tokenizers, which leaves parameters' versions as they were; validated again and again."""
    torch.manual_seed(0)
    model = SEANetDecoder(encodec_config(dimension=8, n_filters=4, ratios=(4, 2), norm=norm, causal=True, lstm=0))
    if folded:
        fold_weights(model)
    optimizer, z, seen = adamw(model.parameters(), 0.1, (0.9, 0.95), 0.0), torch.randn(2, 8, 11), []
    for _ in range(3):
        with torch.no_grad():
            seen.append(model(z))
            state = {}
            pieces = [model.stream(z[..., :5], state), model.stream(z[..., 5:], state, last=True)]
        slow = model(z)
        torch.testing.assert_close(seen[-1], slow, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(pieces, -1), slow, atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
        slow.square().mean().backward()
        with torch.no_grad():
            model(z)  # between the gradients and the step
        optimizer.step()
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(seen, seen[1:], strict=False))


def test_folded_weights_are_saved_and_read_as_they_were():
    torch.manual_seed(0)
    network = encodec_config(dimension=8, n_filters=4, ratios=(4, 2), norm="none", lstm=0)
    model, other, z = SEANetDecoder(network), SEANetDecoder(network), torch.randn(2, 8, 11)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_weights(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    fold_weights(other)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(z), model(z))
        for parameter in model.parameters():
            parameter.data.mul_(1.1)  # written behind PyTorch's back
        assert not torch.allclose(other(z), model(z), atol=1e-4)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"model.0.conv.conv.kernel": state["model.0.conv.conv.weight"]})


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("norm", ["weight_norm", "time_group_norm"])
def test_normed_seanet_equals_encodecs(encodec_seanet, norm, gradients):
    shared = {"dimension": 8, "n_filters": 4, "norm": norm, "channels": 2, "n_residual_layers": 2, "lstm": 1}
    torch.manual_seed(0)
    for name, given in (("SEANetEncoder", torch.randn(2, 2, 640)), ("SEANetDecoder", torch.randn(2, 8, 5))):
        theirs = getattr(encodec_seanet, name)(**shared, ratios=[4, 2]).eval()
        ours = {"SEANetEncoder": SEANetEncoder, "SEANetDecoder": SEANetDecoder}[name](
            encodec_config(**shared, ratios=(4, 2))
        ).eval()
        ours.load_state_dict(theirs.state_dict())  # weight norm's older keys are understood
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(given), theirs(given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_inference_and_training_paths_agree(patch):
    """Without gradients doubling is merged with its convolution, and activations are overwritten."""
    torch.manual_seed(0)
    network = ImageTokenizerConfig(ch=64, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, resolution=64, patch=patch)
    x, z = torch.randn(2, 3, 64, 48), torch.randn(2, 8, 32 // patch, 24 // patch)
    for model, given in ((Encoder(network), x), (Decoder(network), z)):
        kept = given.clone()
        with torch.no_grad():
            fast = model(given)
        torch.testing.assert_close(fast, model(given), atol=1e-5, rtol=1e-5)
        assert torch.equal(given, kept)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_codebook_learns_what_the_librarys_learns(normalize, monkeypatch):
    """Three batches of moving averages, from the same codes, without revival."""
    monkeypatch.setattr("unitok.tokenizers.codebook.DEAD_BELOW", 0.0)
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    theirs = VectorQuantize(4, codebook_size=16, use_cosine_sim=normalize, decay=0.7, rotation_trick=False).train()
    ours, codes = Codebook(16, 4, normalize), torch.randn(16, 4)
    ours.set(codes)
    book = theirs._codebook
    for name in ("embed", "cluster_size", "embed_avg"):
        getattr(book, name).copy_(getattr(ours, name)[None])
    for _ in range(3):
        vectors = torch.randn(1, 200, 4)
        vectors = torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
        assert torch.equal(ours.nearest(vectors), theirs(vectors)[1])
        ours.update(vectors[0], decay=0.7)
        torch.testing.assert_close(ours.embed, book.embed[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.cluster_size, book.cluster_size[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours.embed, codes, atol=0.1)
