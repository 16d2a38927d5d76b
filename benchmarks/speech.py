"""Speech on a laptop: unitok's audio tokenizer beside the encodec package's modules, trained on the same clips for as long.

    python benchmarks/speech.py [--minutes 20] [--quick]

Measured after 20 minutes on 2 cores, with 50 frames per second of 8 x 256 codes: SI-SDR is 1.6 dB higher with one level and
5.2 dB higher with all; all levels are alive in both, with 98.8 to 100 % of the codes in use here and 99.6 to 100 % there.

The speech is espeak-ng's, six voices; no sentence of the test is in the training clips. unitok is `unitok fit --config
audio/laptop-speech-16khz.yaml`. The peer is SEANetEncoder, SEANetDecoder and ResidualVectorQuantizer of the package with
their defaults (k-means start, EMA 0.99, dead codes replaced), at the same frame rate and codes, with the same reconstruction losses
at the same times and the commitment loss that its quantizer returns. Its width and learning rate are the best of four in short runs,
because its defaults are made for GPUs and days. Batches, clips and their order are the same.
"""

import argparse
import itertools
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results
from torch import nn

from unitok.bundle import load_trained_part
from unitok.configs import CONFIGS
from unitok.data.folders import AudioDataset
from unitok.data.loading import EndlessBatches
from unitok.evaluate.audio import audio_scores
from unitok.media import convert_audio, load_audio, save_audio
from unitok.training.losses import spectral_loss
from unitok.training.monitor import codebook_statistics
from unitok.training.shell import warmup_linear

CONFIG = CONFIGS / "audio" / "laptop-speech-16khz.yaml"
RATE, LEVELS, CODES, BATCH = 16_000, 8, 256, 16
VOICES = ("en-us", "en-gb+f3", "en-gb-scotland+m3", "en-us+f2", "en-029+m5", "en-gb-x-rp+f4")
PARTS = (
    ("the old captain", "my sister", "a quiet student", "the new teacher", "nobody", "our neighbor", "the tall driver"),
    ("often", "never", "sometimes", "quickly", "almost", "carefully", "happily"),
    ("paints", "repairs", "finds", "sells", "describes", "forgets", "carries"),
    ("seven green boats", "the broken clock", "a bowl of soup", "three letters", "the morning paper", "his favourite song"),
    ("near the river", "before breakfast", "in the dark garden", "under a bridge", "without a word", "on Thursday"),
)


def make_speech(folder: Path, train: int = 600, test: int = 48) -> None:
    """`train` and `test` under `folder`: WAV files of `RATE` Hz."""
    rng = np.random.default_rng(0)
    everything = list(itertools.product(*PARTS))
    chosen = rng.permutation(len(everything))[: train + test]
    jobs = []
    for number, index in enumerate(chosen):
        path = folder / ("train" if number < train else "test") / f"{number:04d}.wav"
        if not path.exists():
            jobs.append((path, VOICES[number % len(VOICES)], " ".join(everything[index]), int(rng.integers(130, 190))))

    def speak(job: tuple[Path, str, str, int]) -> None:
        path, voice, text, words_a_minute = job
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.with_suffix(".tmp")
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(words_a_minute), "-w", str(raw), text], check=True)
        samples = convert_audio(*load_audio(raw), RATE, 1)
        raw.unlink()
        save_audio(path, samples, RATE)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(speak, jobs))


class Encodec(nn.Module):
    """The package's own modules around its own quantizer."""

    def __init__(self, n_filters: int):
        super().__init__()
        sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))  # imported by the package, not used here
        from encodec.modules import SEANetDecoder, SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer

        network = {"channels": 1, "dimension": 128, "n_filters": n_filters, "ratios": [8, 5, 4, 2]}
        self.encoder, self.decoder = SEANetEncoder(**network), SEANetDecoder(**network)
        self.quantizer = ResidualVectorQuantizer(dimension=128, n_q=LEVELS, bins=CODES)

    def forward(self, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.quantizer(self.encoder(samples), RATE // 320)
        return self.decoder(q.quantized)[..., : samples.shape[-1]], q.penalty

    @torch.no_grad()
    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        return self.quantizer.encode(self.encoder(samples), RATE // 320).transpose(0, 1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        return self.decoder(self.quantizer.decode(codes.transpose(0, 1)))[..., :length].clamp(-1, 1)


def train_encodec(folder: Path, seconds: float, n_filters: int, rate: float, seed: int = 0) -> tuple[Encodec, int]:
    """The same losses at the same fractions of the time: 50 MSE, from half on 0.5 spectral; and the quantizer's penalty."""
    torch.manual_seed(seed)
    model = Encodec(n_filters).train()
    data = AudioDataset(folder, RATE, 1, RATE, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    began, steps, batches = time.monotonic(), 0, iter(EndlessBatches(data, BATCH))
    while (share := (time.monotonic() - began) / seconds) < 1:
        batch = torch.stack([data[place] for place in next(batches)])
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_linear(steps, share, 30)
        out, penalty = model(batch)
        loss = 50 * (out - batch).square().mean() + penalty.mean()
        if share >= 0.5:
            loss = loss + 0.5 * spectral_loss(out, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return model.eval(), steps


def measure(model: Any, folder: Path, levels: Sequence[int] = range(1, LEVELS + 1)) -> list[dict[str, float]]:
    """Means over the test clips, for the first k levels, for each k of `levels`; and the use of level k."""
    rows: list[list[dict[str, float | None]]] = []
    codes = []
    for path in sorted(folder.glob("*.wav")):
        samples, _ = load_audio(path)
        encoded = model.encode(samples[None])
        codes.append(encoded[0])
        decoded = [model.decode(encoded[:, :k], samples.shape[-1])[0] for k in levels]
        rows.append([audio_scores(waveform, samples, RATE) for waveform in decoded])
    out = []
    for place, k in enumerate(levels):
        means = {name: float(np.mean([row[place][name] for row in rows])) for name in rows[0][place]}  # type: ignore[arg-type]
        out.append(means | {"usage": codebook_statistics(torch.cat(codes, -1)[k - 1], CODES)["usage"]})
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="half a minute of training each")
    p.add_argument("--minutes", type=float, default=20.0, help="of training, each")
    p.add_argument("--work", type=Path, default=Path("runs/speech"), help="folder for speech and runs")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/speech.json")
    o = p.parse_args()
    minutes, probe = (0.5, 8) if o.quick else (o.minutes, 60)
    make_speech(o.work)
    train, test = o.work / "train", o.work / "test"
    run = o.work / f"ours-{minutes:g}"
    command = ["fit", "--config", str(CONFIG), "--out", str(run), "--data.init_args.path", str(train)]
    command += ["--model.init_args.minutes", str(minutes), "--resume", "auto"]
    subprocess.run([sys.executable, "-m", "unitok", *command], check=True)
    ours = measure(load_trained_part("audio", run)[0], test)
    tried = {}
    for n_filters, rate in itertools.product((8, 16), (5e-4, 1.5e-3)):
        probed, steps = train_encodec(train, probe, n_filters, rate)
        tried[n_filters, rate] = measure(probed, test, [LEVELS])[0]["si_sdr_db"]
        print(f"encodec with n_filters {n_filters}, rate {rate:g}: {steps} steps, {tried[n_filters, rate]:.2f} dB", flush=True)
    n_filters, rate = max(tried, key=lambda key: tried[key])
    encodec, steps = train_encodec(train, minutes * 60, n_filters, rate)
    theirs = measure(encodec, test)
    cases = []
    for k in range(LEVELS):
        for name in ("si_sdr_db", "mel_distance", "stoi", "usage"):
            row = {"case": f"{minutes:g} minutes, {k + 1} levels: {name}", "unit": "dB" if "_db" in name else ""}
            values = {"ours": ours[k][name], "peer": "encodec", "theirs": theirs[k][name]}
            cases.append(row | values | {"difference": ours[k][name] - theirs[k][name]})
    more = {"encodec": {"n_filters": n_filters, "lr": rate, "steps": steps}}
    more["encodec"]["probes_si_sdr_db"] = {f"{n} filters, {r:g}": value for (n, r), value in tried.items()}
    write_results("speech", cases, out=o.out, **more)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
