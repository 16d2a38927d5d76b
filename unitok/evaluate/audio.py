"""`unitok eval audio-tokenizer`: how well sounds come back, by number of levels, and what the codebooks do.

Definitions, because published numbers differ by theirs: everything is measured at the tokenizer's rate, against the sound
as the tokenizer got it (mixed and resampled), over its whole length; a number is the mean over sounds. SI-SDR is in dB
with the mean removed, positive is better (audiocraft and DAC print its negative). The log-mel distance is `mel_loss` and
the STFT distance `spectral_loss` with their default windows. STOI (Taal et al. 2011, not extended) is of the package
pystoi, for sounds of at least `STOI_SECONDS`. Codebook use is the share of a level's codes that occurs at all in the sounds
measured. The real-time factor is seconds of sound a second of work.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
from tqdm import tqdm

from unitok import page
from unitok.bundle import load_trained_part
from unitok.errors import UserError
from unitok.evaluate.image import format_number, timed
from unitok.files import check_replaceable, whole_folder, write_json, write_json_lines
from unitok.media import draw_spectrogram, encode_png, encode_wav, find_media, load_audio
from unitok.storage import printable
from unitok.tokenizers.audio import AudioTokenizer
from unitok.training.losses import mel_loss, spectral_loss
from unitok.training.monitor import codebook_statistics

SHOWN = 20  # sounds on the page
SHOWN_SECONDS = 10.0
STOI_SECONDS = 0.5
SI_SDR_RANGE = (-50.0, 100.0)  # dB; what is beyond, such as of an exact copy, counts as the limit


def sound_scores(out: Tensor, target: Tensor, rate: int) -> dict[str, float | None]:
    """Scores of one sound against another, [C, T] in [-1, 1]; STOI is None where it cannot be had."""
    si_sdr = scale_invariant_signal_distortion_ratio(out, target, zero_mean=True).clamp(*SI_SDR_RANGE).mean()
    return {
        "si_sdr_db": float(si_sdr),
        "mel_distance": float(mel_loss(out[None], target[None], rate)),
        "stft_distance": float(spectral_loss(out[None], target[None])),
        "stoi": _stoi(out, target, rate),
    }


def _stoi(out: Tensor, target: Tensor, rate: int) -> float | None:
    try:
        from pystoi import stoi
    except ImportError:
        return None
    if target.shape[-1] < STOI_SECONDS * rate:
        return None
    return float(stoi(target.mean(0).numpy(), out.mean(0).numpy(), rate, extended=False))


def evaluate_audio_tokenizer(
    tokenizer: Path, sounds: Path, out: Path, seconds: float = 0.0, limit: int = 0, device: str = "cpu", overwrite: bool = False
) -> dict[str, Any]:
    """Measure; writes `scores.json`, `sounds.jsonl` (a line a sound) and `index.html`; -> the scores.

    Errors: `UserError` where something else lies in `out`, unless `overwrite` is set.
    """
    check_replaceable(out, "audio evaluation", overwrite)
    part, _ = load_trained_part("audio", tokenizer)
    model: AudioTokenizer = part.to(device)
    if not sounds.is_dir():
        raise UserError(f"{sounds}: no such folder")
    everything, empty = find_media(sounds, "audio")
    files = everything[: limit or None]
    if not files:
        raise UserError(f"{sounds}: no sounds in it")
    spent = {"encode": 0.0, "decode": 0.0}
    heard = 0.0
    rows: list[dict[str, Any]] = []
    skipped = [{"file": printable(str(path)), "error": printable(f"{path}: an empty file")} for path in empty]
    codes: list[Tensor] = []
    for path in tqdm(files, desc="reconstruct", unit="sound"):
        try:
            samples = model.prepare(*load_audio(path), str(path))
        except UserError as error:
            skipped.append({"file": printable(str(path)), "error": printable(str(error))})
            continue
        samples = samples[:, : round(seconds * model.sample_rate) or None]
        length = samples.shape[-1]
        found = timed(spent, "encode", lambda: model.encode(samples[None]))  # noqa: B023 (called at once)
        size = model.size(samples)
        codes.append(found[0].cpu())
        heard += length / model.sample_rate
        again = timed(spent, "decode", lambda: model.restore(found[0], size)).cpu()  # noqa: B023
        levels = [model.restore(found[0, :k], size).cpu() for k in range(1, model.num_codebooks)] + [again]
        row: dict[str, Any] = {"file": printable(path.relative_to(sounds).as_posix()), "seconds": length / model.sample_rate}
        row["levels"] = [sound_scores(level, samples, model.sample_rate) for level in levels]
        rows.append(row | {"_sounds": [samples, *levels]})
        if len(rows) > 2 * SHOWN:  # only the worst are kept to be heard
            for best in sorted((r for r in rows if "_sounds" in r), key=_worst_first)[SHOWN:]:
                del best["_sounds"]
    if not rows:
        raise UserError(f"{sounds}: none of its {len(files)} sounds can be read; the first: {skipped[0]['error']}")

    all_codes = torch.cat(codes, -1)
    by_level = []
    for k in range(model.num_codebooks):
        row = {"levels": k + 1, "bits_per_second": model.bitrate / model.num_codebooks * (k + 1)}
        for name in rows[0]["levels"][0]:
            values = [r["levels"][k][name] for r in rows if r["levels"][k][name] is not None]
            row |= {name: float(np.mean(values))} if values else {}
        row |= {f"codebook_{n}": v for n, v in codebook_statistics(all_codes[k], model.codebook_size).items()}
        by_level.append(row)
    scores: dict[str, Any] = {
        "sounds": len(rows),
        "skipped": len(skipped),
        "seconds": heard,
        "sample_rate": model.sample_rate,
        "frame_rate": model.frame_rate,
        "codebook_size": model.codebook_size,
        "ids_per_second": model.frame_rate * model.num_codebooks,
        "bits_per_second": model.bitrate,
        "real_time_factor_encode": heard / spent["encode"],
        "real_time_factor_decode": heard / spent["decode"],
        "by_levels": by_level,
    }
    _write(out, scores, sorted(rows, key=_worst_first), skipped, model.sample_rate)
    return scores


def _worst_first(row: dict[str, Any]) -> float:
    return row["levels"][-1]["si_sdr_db"]


def _write(out: Path, scores: dict[str, Any], rows: list[dict[str, Any]], skipped: list[dict[str, str]], rate: int) -> None:
    shown = [row for row in rows if "_sounds" in row][:SHOWN]
    kept = [{k: v for k, v in row.items() if k != "_sounds"} for row in rows]
    with whole_folder(out, "audio evaluation", overwrite=True) as new:
        write_json_lines(new / "sounds.jsonl", [*kept, *skipped])
        page.write_page(new / "index.html", "Audio tokenizer", _STYLE, _body(scores, shown, rate))
        write_json(new / "scores.json", scores)


_STYLE = (
    "body{font:15px sans-serif;margin:2em}figure{display:inline-block;margin:8px}td,th{padding:2px 12px 2px 0;text-align:left}"
)


def _body(scores: dict[str, Any], rows: list[dict[str, Any]], rate: int) -> str:
    def player(samples: Tensor, title: str) -> str:
        samples = samples[:, : round(SHOWN_SECONDS * rate)]
        picture = page.image(encode_png(draw_spectrogram(samples, rate)), 'height="96" alt="spectrogram"')
        sound = page.audio(encode_wav(samples, rate))
        return f"<figure>{picture}<br>{sound}<figcaption>{page.text(title)}</figcaption></figure>"

    def section(row: dict[str, Any]) -> str:
        last = len(row["levels"])
        levels = sorted({1, math.ceil(last / 2), last})
        figures = [player(row["_sounds"][0], "original")]
        for k in levels:
            title = f"{k} level{'s' if k > 1 else ''}: {row['levels'][k - 1]['si_sdr_db']:.1f} dB"
            figures.append(player(row["_sounds"][k], title))
        return f"<h3>{page.text(row['file'])}</h3>{''.join(figures)}"

    plain = "".join(f"<tr><td>{name}<td>{format_number(value)}" for name, value in scores.items() if name != "by_levels")
    columns = list(scores["by_levels"][0])
    head = "".join(f"<th>{name.replace('_', ' ')}" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{format_number(row.get(name))}" for name in columns) for row in scores["by_levels"])
    return (
        f"<table>{plain}</table><h2>By number of levels</h2><table><tr>{head}{body}</table>"
        f"<h2>Originals and reconstructions, the worst first</h2>\n" + "\n".join(section(row) for row in rows)
    )


def print_table(scores: dict[str, Any]) -> None:
    """A table for people."""
    for name, value in scores.items():
        if name != "by_levels":
            print(f"{name:<28}{format_number(value):>12}")
    columns = list(scores["by_levels"][0])
    widths = [max(len(name), 8) + 2 for name in columns]
    print("".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    for row in scores["by_levels"]:
        print("".join(f"{format_number(row.get(name)):>{width}}" for name, width in zip(columns, widths, strict=True)))
