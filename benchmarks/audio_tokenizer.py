"""Encode and decode audio: unitok beside the encodec package and transformers' EncodecModel, with equal weights.

    python benchmarks/audio_tokenizer.py [--quick] [--device cuda] [--hour]

Measured on a CPU in fp32, with equal codes: 1.04 to 3.29 times encodec's seconds of audio per second and 1.38 to 3.42 times
transformers'; least for one second alone, most for 30 seconds in batches of 8.

The model is EnCodec's 24 kHz model with 8 levels and random weights and codebooks. Each peer is a process; the processes take turns,
and the numbers are medians. Memory is the peak over what the networks hold. With --hour: the peak memory of an hour of audio,
from a file to codes and back to a file.
"""

import argparse
import json
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from common import RESULTS, in_a_process, in_turns, peak_memory_gb, serve, write_results

from unitok.hardware import keep_large_blocks
from unitok.interop.audio import from_encodec, infer_config
from unitok.tokenizers import AudioTokenizer

RATE, LEVELS, BANDWIDTH = 24_000, 8, 6.0


def build_encodec() -> Any:
    """The package's own model; random codes as spread out as the latents, smaller at each level."""
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # imported by the package, not used here
    from encodec.model import EncodecModel

    del sys.modules["torchaudio"]  # transformers would ask what it is
    torch.manual_seed(0)
    model = EncodecModel._get_model([BANDWIDTH], RATE, 1, causal=True, model_norm="weight_norm").eval()
    with torch.no_grad():
        latents = model.encoder(noise(1, 1.0))[0].T
        for k, layer in enumerate(model.quantizer.vq.layers):
            codes = torch.randn_like(layer._codebook.embed) * latents.std(0) * 0.7**k
            layer._codebook.embed.copy_(codes + (latents.mean(0) if k == 0 else 0))
            layer._codebook.inited.fill_(1)
    model.set_target_bandwidth(BANDWIDTH)
    return model


def noise(batch: int, seconds: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cumsum(torch.randn(batch, 1, round(seconds * RATE), generator=generator) * 0.1, -1) % 1.0 - 0.5


def build(device: str) -> dict[str, Any]:
    """The peers, with the same random weights."""
    return {which: build_one(which).to(device) for which in ("unitok", "encodec", "transformers")}


def build_one(which: str) -> Any:
    encodec = build_encodec()
    state = encodec.state_dict()
    if which == "encodec":
        return encodec
    if which == "unitok":
        return from_encodec(state, infer_config(state, "encodec"), "encodec")
    from transformers import EncodecConfig, EncodecModel

    theirs = EncodecModel(EncodecConfig(target_bandwidths=[BANDWIDTH])).eval()
    renamed = {}
    for name, tensor in state.items():
        name = name.replace(".model.", ".layers.").replace("quantizer.vq.", "quantizer.").replace("._codebook.", ".codebook.")
        name = name.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
        name = name.replace("weight_g", "parametrizations.weight.original0")
        renamed[name.replace("weight_v", "parametrizations.weight.original1")] = tensor
    theirs.load_state_dict(renamed)
    return theirs


@torch.no_grad()
def encode(peer: Any, samples: torch.Tensor) -> torch.Tensor:
    """-> codes [B, K, N]."""
    if isinstance(peer, AudioTokenizer):
        return peer.encode(samples)
    if hasattr(peer, "segment_length"):
        return peer.encode(samples)[0][0]
    return peer.encode(samples, bandwidth=BANDWIDTH).audio_codes[0]


@torch.no_grad()
def decode(peer: Any, codes: torch.Tensor) -> torch.Tensor:
    if isinstance(peer, AudioTokenizer):
        return peer.decode(codes)
    if hasattr(peer, "segment_length"):
        return peer.decode([(codes, None)])
    return peer.decode(codes[None], [None])[0]


def only(which: str, what: str, seconds: float, batch: int, device: str) -> None:
    """One peer, one job, at each line of the input."""
    if which == "unitok":
        keep_large_blocks()
    peer = build_one(which).to(device)
    samples = noise(batch, seconds).to(device)
    codes = torch.zeros(batch, LEVELS, round(seconds * RATE / 320), dtype=torch.long, device=device)
    serve(partial(encode, peer, samples) if what == "encode" else partial(decode, peer, codes), device)


def one_hour(device: str) -> None:
    """From a file of an hour to codes and to a file again; prints peak memory and seconds."""
    keep_large_blocks()
    model = build_one("unitok").to(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hour.wav"
        minute = noise(1, 60.0)[0, 0].numpy().astype(np.float32)
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(60):
                file.write(minute)
        before, began = peak_memory_gb(), time.perf_counter()
        codes, size = model.encode_file(path)
        encoded = time.perf_counter() - began
        model.decode_file(codes, Path(folder) / "again.wav", size)
        assert soundfile.info(Path(folder) / "again.wav").frames == size[0] == 3600 * RATE
    measured = {"encode_seconds": encoded, "decode_seconds": time.perf_counter() - began - encoded}
    print(json.dumps({"peak_gb": peak_memory_gb(), "models_gb": before} | measured))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one second, batch 1, few rounds")
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--max-seconds", type=float, default=240.0, help="leave out batches with more seconds of audio")
    p.add_argument("--min-seconds", type=float, default=0.0, help="leave out batches with fewer seconds of audio")
    p.add_argument("--keep-for-all", action="store_true", help="the peers' allocator keeps large blocks, too")
    p.add_argument("--hour", action="store_true", help="an hour of audio instead; added to the results that are there")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/audio_tokenizer.json")
    p.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.only:
        which, what, seconds, batch = o.only
        one_hour(o.device) if which == "hour" else only(which, what, float(seconds), int(batch), o.device)
        return
    if o.hour:
        measured = in_a_process(__file__, "--device", o.device, "--only", "hour", "-", "0", "0")
        path = o.out or RESULTS / f"audio_tokenizer{'' if o.device == 'cpu' else '.gpu'}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {"hour": measured}, indent=1) + "\n")
        print(measured)
        return
    sizes = [(1.0, 1)] if o.quick else [(1.0, 1), (1.0, 8), (30.0, 1), (30.0, 8)]
    sizes = [(seconds, batch) for seconds, batch in sizes if o.min_seconds <= seconds * batch <= o.max_seconds]
    peers = build(o.device)
    cases = []
    for seconds, batch in sizes:
        samples = noise(batch, seconds).to(o.device)
        codes = {which: encode(peer, samples) for which, peer in peers.items()}
        rounds = 2 if o.quick else o.rounds if seconds * batch <= 30 else 2
        for what in ("encode", "decode"):
            jobs = {w: ["--device", o.device, "--only", w, what, str(seconds), str(batch)] for w in peers}
            measured = in_turns(__file__, jobs, rounds, o.keep_for_all)
            case = f"{what} {seconds:g} s batch {batch}"
            for peer in ("encodec", "transformers"):
                equal = {"equal_codes": float((codes[peer] == codes["unitok"]).float().mean())} if what == "encode" else {}
                speed = {w: batch * seconds / measured[w]["seconds"] for w in ("unitok", peer)}
                row = {"unit": "s of audio/s", "ours": speed["unitok"], "peer": peer, "theirs": speed[peer]}
                cases.append({"case": f"{case}: speed"} | row | {"ratio": speed["unitok"] / speed[peer]} | equal)
                row = {"unit": "GB", "ours": measured["unitok"]["gb"], "peer": peer, "theirs": measured[peer]["gb"]}
                cases.append(
                    {"case": f"{case}: memory"} | row | {"ratio": measured[peer]["gb"] / max(measured["unitok"]["gb"], 1e-3)}
                )
    more: dict[str, Any] = {"codes_that_occur": int(codes["unitok"].unique().numel())}
    write_results("audio_tokenizer", cases, o.device, o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
