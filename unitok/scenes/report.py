"""The demo's report: one self-contained HTML file. Pictures and sounds are inside it; nothing is fetched."""

import csv
import json
from pathlib import Path
from typing import Any

from unitok import page
from unitok.files import read_json_lines

_STYLE = """
:root{--ink:#1c2126;--soft:#667;--line:#dde1e6;--good:#1a7f4b;--bad:#b3412e;--wash:#f6f7f9}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);max-width:68rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:2rem;margin:0 0 .2rem}h2{margin:2.6rem 0 .6rem;font-size:1.35rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
h3{margin:1.6rem 0 .5rem;font-size:1.05rem}p{max-width:48rem}.soft{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}.bar{display:inline-block;height:.65rem;background:var(--good);border-radius:2px;vertical-align:middle}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.8rem}
.card{border:1px solid var(--line);border-radius:8px;padding:.7rem;background:#fff}
.card.right{border-left:5px solid var(--good)}.card.wrong{border-left:5px solid var(--bad)}
.given{background:var(--wash);border-radius:6px;padding:.45rem .6rem;margin-bottom:.5rem;color:#445;font-size:.93rem}
.new{padding:.1rem .6rem}img{width:112px;height:auto;border-radius:4px;display:block;margin:.25rem 0}
audio{width:100%;height:2.1rem;margin:.2rem 0}.pairs{display:flex;flex-wrap:wrap;gap:.7rem}.pairs div{text-align:center;font-size:.8rem;color:var(--soft)}
.pairs img{width:88px}svg{background:var(--wash);border-radius:6px}
"""

_TITLES = {
    "text_to_image": "Caption to picture",
    "image_to_text": "Picture to caption",
    "text_to_audio": "Caption to sound",
    "audio_to_text": "Sound to caption",
    "image_to_audio": "Picture to sound",
    "questions": "Questions about a picture",
    "interleaved": "Text, picture, text, picture",
}


def _media(path: Path) -> str:
    return page.image(path.read_bytes()) if path.suffix == ".png" else page.audio(path.read_bytes(), 'preload="none"')


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _score_table(scores: dict[str, Any]) -> str:
    rows = []
    for name, value in scores.items():
        if name.endswith(".held_out") or not isinstance(value, int | float | list) or name in ("seconds", "peak_memory_gb"):
            continue
        held = scores.get(f"{name}.held_out")
        if isinstance(value, list):
            shown = ", ".join(_percent(v) for v in value)
            bar = ""
        elif name.endswith("_db"):
            shown, bar = f"{value:.1f} dB", ""
        elif name == "malformed":
            shown, bar = str(value), ""
        else:
            shown, bar = _percent(value), f'<span class="bar" style="width:{100 * value:.0f}px"></span>'
        other = _percent(held) if held is not None else ""
        rows.append(f'<tr><td>{page.text(name)}</td><td class="n">{shown}</td><td>{bar}</td><td class="n">{other}</td></tr>')
    return (
        '<table><tr><th>measure</th><th class="n">score</th><th></th><th class="n">combinations never trained on</th></tr>'
        + "".join(rows)
        + "</table>"
    )


def _reconstructions(folder: Path) -> str:
    pairs = []
    for original in sorted(folder.glob("*-original.png")):
        again = original.with_name(original.name.replace("original", "again"))
        pairs.append(f"<div>{_media(original)}{_media(again)}</div>")
    sounds = []
    for original in sorted(folder.glob("*-original.wav"))[:4]:
        again = original.with_name(original.name.replace("original", "again"))
        sounds.append(f'<div class="card"><span class="soft">original</span>{_media(original)}'
                      f'<span class="soft">reconstruction</span>{_media(again)}</div>')  # fmt: skip
    return f'<div class="pairs">{"".join(pairs)}</div><div class="grid" style="margin-top:1rem">{"".join(sounds)}</div>'


def _samples(folder: Path) -> str:
    """The cards of one direction: what was given, what was generated, whether the oracle finds it right."""
    rights = json.loads((folder / "right.json").read_text())
    cards = []
    for (_, row), right in zip(read_json_lines(folder / "outputs.jsonl"), rights, strict=True):
        given: list[str] = []
        new: list[str] = []
        for part in row["content"]:
            piece = page.text(part["text"]) if part["type"] == "text" else _media(folder / Path(part["path"]).name)
            (new if part.get("loss", True) else given).append(f"<div>{piece}</div>")
        mark = "right" if right else "wrong"
        cards.append(
            f'<div class="card {mark}" title="{mark}"><div class="given">{"".join(given)}</div>'
            f'<div class="new">{"".join(new)}</div></div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _curve(path: Path, columns: list[str], width: int = 420, height: int = 170) -> str:
    """Columns of a metrics.csv over steps as an inline SVG, each with its own colour and last value."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    lines, legend = [], []
    for column, colour in zip(columns, ("#2563a8", "#c26a1b", "#3b8f5a", "#8a4fa3"), strict=False):
        points = [(float(r["step"]), float(r[column])) for r in rows if r.get(column)]
        if len(points) < 2:
            continue
        top = max(v for _, v in points)
        low = min(0.0, min(v for _, v in points))
        last = points[-1][0] or 1.0
        path_data = " ".join(
            f"{'L' if i else 'M'}{8 + (width - 16) * s / last:.1f},{height - 8 - (height - 30) * (v - low) / (top - low or 1):.1f}"
            for i, (s, v) in enumerate(points)
        )
        lines.append(f'<path d="{path_data}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        legend.append(f'<span style="color:{colour}">{column} {points[-1][1]:.3g} (top {top:.3g})</span>')
    svg = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{"".join(lines)}</svg>'
    return f'<div>{svg}<div style="font-size:.85rem">{" &nbsp; ".join(legend)}</div></div>'


def write_report(run: Path, scores: dict[str, Any], seconds: dict[str, float], minutes: float) -> Path:
    """Write `run/report.html`; -> its path. `seconds` by stage."""
    evaluation = run / "eval"
    curves = []
    for name, columns in (
        ("image", ["loss", "psnr", "codebook_use_0"]),
        ("audio", ["loss", "snr_db", "codebook_use_0"]),
        ("decoder", ["loss", "bits_text", "bits_image", "bits_audio"]),
    ):
        file = run / name / "metrics" / "metrics.csv"
        if file.exists():
            curves.append(f"<div><h3>{name}</h3>{_curve(file, columns)}</div>")
    sections = []
    for key, title in _TITLES.items():
        for suffix, note in (("", ""), (".held_out", ": combinations never trained on")):
            folder = evaluation / "samples" / f"{key}{suffix}"
            if folder.exists():
                value = next(v for n, v in scores.items() if n.startswith(f"generation.{key}.") and n.endswith(".held_out") == bool(suffix))  # fmt: skip
                sections.append(f"<h3>{title}{note} <span class='soft'>{_percent(value)} right</span></h3>{_samples(folder)}")
    times = "".join(f'<tr><td>{page.text(name)}</td><td class="n">{value:.0f} s</td></tr>' for name, value in seconds.items())
    total = sum(seconds.values())
    body = f"""
<p class="soft">One model that reads and writes text, pictures and sound, trained from raw files in {total / 60:.1f} minutes
(budget {minutes:g}); the largest process took {scores.get("peak_memory_gb", 0):.1f} GB of memory.</p>
<h2>Scores</h2><p>Shares of files in which everything named is right, read back from pixels and waveforms by an oracle that
never sees the model. Scenes are new; the last column has colour-shape pairs that training never showed.</p>{_score_table(scores)}
<h2>Reconstructions</h2><p>Originals above, what the tokenizers make of them below.</p>{_reconstructions(evaluation / "reconstructions")}
<h2>Generations</h2><p>Grey: what was given. Below it: what the model wrote. Green edge: the oracle finds it right.</p>{"".join(sections)}
<h2>Training</h2><div class="pairs">{"".join(curves)}</div>
<h2>Times</h2><table>{times}<tr><th>all</th><th class="n">{total:.0f} s</th></tr></table>
"""
    path = run / "report.html"
    page.write_page(path, "unitok demo", _STYLE, body)
    return path
