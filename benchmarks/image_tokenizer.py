"""Encode and decode images: unitok beside taming's modules and transformers' ChameleonVQVAE, with equal weights.

    python benchmarks/image_tokenizer.py [--quick] [--device cuda] [--trained TOKENIZER --images FOLDER]

Measured on a CPU in fp32, with equal codes: 1.32 to 1.96 times taming's images per second, at 1.30 to 2.01
times its peak memory.

The peers are what their users run: taming's Encoder, quant_conv, VectorQuantizer, post_quant_conv and Decoder as in its VQModel,
and ChameleonVQVAE.encode (it has no decoder). Each peer is a process; the processes take turns, and the numbers are medians. Memory
is the peak over what the networks hold. unitok tells glibc to keep large blocks (`unitok.hardware.keep_large_blocks`, as its commands
do); --keep-for-all gives the peers the same. With --trained: the fraction of codes that agree between fp32 and bfloat16 on real images.
"""

import argparse
import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_turns, serve, write_results
from torch import nn

from unitok.hardware import keep_large_blocks
from unitok.interop.image import from_taming, infer_config
from unitok.tokenizers import ImageTokenizer

#: Name -> taming's ddconfig, codes, their dimensions.
MODELS = {
    "f16-16384": ({"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,), "resolution": 256}, 16384),
    "chameleon": ({"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (), "resolution": 512}, 8192),
}


class Taming(nn.Module):
    """taming's VQModel out of its own modules."""

    def __init__(self, name: str):
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer

        network, size = MODELS[name]
        shared = {"ch": 128, "out_ch": 3, "in_channels": 3, "num_res_blocks": 2, "z_channels": 256, "double_z": False} | network
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = Encoder(**shared), Decoder(**shared)
        self.quantize = VectorQuantizer(size, 256, beta=0.25)
        nn.init.normal_(self.quantize.embedding.weight, std=0.3)  # as spread out as the latents
        self.quant_conv, self.post_quant_conv = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        quantized, _, info = self.quantize(self.quant_conv(self.encoder(images)))
        return info[2].reshape(len(images), *quantized.shape[-2:])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        latents = self.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))


def build(name: str, device: str) -> dict[str, Any]:
    """The peers, with the same random weights."""
    torch.manual_seed(0)
    taming = Taming(name).eval().to(device)
    state = taming.state_dict()
    ours = from_taming(state, infer_config(state, MODELS[name][0]["resolution"], False, name), name).to(device)
    peers = {"unitok": ours, "taming": taming}
    if name == "chameleon":
        from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

        theirs = ChameleonVQVAE(ChameleonVQVAEConfig()).eval().to(device)
        state = {k: v for k, v in taming.state_dict().items() if not k.startswith("decoder.")}
        theirs.load_state_dict(state)
        peers["transformers"] = theirs
    return peers


def encode(peer: Any, images: torch.Tensor) -> torch.Tensor:
    if isinstance(peer, (ImageTokenizer, Taming)):
        return peer.encode(images)
    with torch.no_grad():
        codes = next(part for part in peer.encode(images).values() if part.dtype == torch.long)
    return codes.reshape(len(images), images.shape[-2] // 16, images.shape[-1] // 16)


def only(which: str, name: str, what: str, side: int, batch: int, device: str) -> None:
    """One peer, one job, at each line of the input."""
    if which == "unitok":
        keep_large_blocks()
    peer = build(name, device).pop(which)
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    codes = torch.zeros(batch, side // 16, side // 16, dtype=torch.long, device=device)
    serve(partial(encode, peer, images) if what == "encode" else partial(peer.decode, codes), device)


def _case(case: str, unit: str, peer: str, ours: float, theirs: float, more_is_better: bool) -> dict[str, Any]:
    ratio = ours / theirs if more_is_better else theirs / ours
    return {"case": case, "unit": unit, "ours": ours, "peer": peer, "theirs": theirs, "ratio": ratio}


def agreement(trained: Path, folder: Path, device: str) -> dict[str, Any]:
    """Fraction of codes that are equal in bfloat16 and fp32, with trained weights on real images."""
    from unitok.bundle import load_trained_part
    from unitok.media import open_image, sniff

    model: ImageTokenizer = load_trained_part("image", trained)[0].to(device)
    same = total = 0
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and sniff(f) == "image")[:64]:
        pixels = model.prepare(open_image(file), 256**2)[None].to(device)
        codes = model.encode(pixels)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            again = model.encode(pixels)
        same, total = same + int((codes == again).sum()), total + codes.numel()
    return {"agreement_bf16": same / total, "codes": total}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one small size, few rounds")
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--trained", type=Path, help="a trained tokenizer, bundle or run")
    p.add_argument("--images", type=Path, help="images for --trained")
    p.add_argument("--keep-for-all", action="store_true", help="the peers' allocator keeps large blocks, too")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/image_tokenizer.json")
    p.add_argument("--only", nargs=5, help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.only:
        which, name, what, side, batch = o.only
        only(which, name, what, int(side), int(batch), o.device)
        return
    sizes = [("f16-16384", 256, 1), ("f16-16384", 256, 4), ("chameleon", 512, 1)]
    if o.device != "cpu":
        sizes = [("f16-16384", 256, 32), ("chameleon", 512, 16)]
    if o.quick:
        sizes = [("f16-16384", 128, 1), ("chameleon", 128, 1)]
    cases = []
    for name, side, batch in sizes:
        peers = build(name, o.device)
        images = torch.rand(batch, 3, side, side, device=o.device) * 2 - 1
        codes = {which: encode(peer, images) for which, peer in peers.items()}
        peers = dict.fromkeys(peers)  # the processes have their own
        for what in ("encode", "decode"):
            able = [w for w in peers if what == "encode" or w != "transformers"]
            jobs = {w: ["--device", o.device, "--only", w, name, what, str(side), str(batch)] for w in able}
            measured = in_turns(__file__, jobs, 2 if o.quick else o.rounds, o.keep_for_all)
            case = f"{what} {name} {side}px batch {batch}"
            for peer in able[1:]:
                equal = {"equal_codes": float((codes[peer] == codes["unitok"]).float().mean())} if what == "encode" else {}
                speed = {w: batch / measured[w]["seconds"] for w in ("unitok", peer)}
                cases.append(_case(f"{case}: speed", "images/s", peer, speed["unitok"], speed[peer], True) | equal)
                cases.append(_case(f"{case}: memory", "GB", peer, measured["unitok"]["gb"], measured[peer]["gb"], False))
    more = agreement(o.trained, o.images, o.device) if o.trained else {}
    if more:
        print(more)
    write_results("image_tokenizer", cases, o.device, o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
