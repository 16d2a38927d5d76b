"""What a bundle makes of scenes in motion, as the oracle reads it: percent of everything named right, of all clips and of each kind.

    python examples/video/evaluate.py runs/video/bundle runs/video/test OUT

Text to video, video to text, the first frame or a second given, questions; of each: all right, and motion alone. Video to audio,
and text to video and audio: whether the notes follow the motion. OUT gets contact sheets of the first clips.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from unitok import Unitok
from unitok.document import Part, RawDocument
from unitok.media import save_image
from unitok.modalities.video import Video, contact_sheet
from unitok.sample.outputs import Output
from unitok.scenes.motion import FRAMES, RATE, Clip, follows, parse_caption, questions, read_clip

bundle, test, out = map(Path, sys.argv[1:4])
count = int(sys.argv[4]) if len(sys.argv) > 4 else 200
u = Unitok.from_pretrained(bundle)
rows = [json.loads(line) for line in (test / "clips.jsonl").read_text().splitlines()][:count]
clips = [parse_caption(row["caption"]) for row in rows]
documents = [u.read_prompt(RawDocument("", (Part("video", path=test / row["video"]),))) for row in rows]
out.mkdir(parents=True, exist_ok=True)
drawn = {"seed": 0, "max_new_tokens": 700}  # sampled as the bundle says (generation_config.json)


def pixels(video: Video) -> np.ndarray:
    return ((video.frames.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def motion_of(clip: Clip | None) -> object:
    return clip and (clip.in_turn, clip.where, [(t.way, t.speed, t.growth) for t in clip.things])


def kind_of(clip: Clip | None) -> str:
    if clip is None or not clip.where:
        return "one thing"
    return "in turn" if clip.in_turn else "crossing" if clip.crosses else "at once"


def report(name: str, read: list[Clip | None]) -> None:
    right = [100 * np.mean([r == c for r, c in zip(read, clips, strict=True)])]
    right.append(100 * np.mean([motion_of(r) == motion_of(c) for r, c in zip(read, clips, strict=True)]))
    by_kind: dict[str, list[bool]] = {}
    for one, clip in zip(read, clips, strict=True):
        by_kind.setdefault(kind_of(clip), []).append(one == clip)
    kinds = ", ".join(f"{kind} {100 * np.mean(values):.0f}" for kind, values in sorted(by_kind.items()))
    print(f"{name:28s} {right[0]:5.1f} % all right, {right[1]:5.1f} % of the motion; {kinds}", flush=True)


def drawn_clips(name: str, prompts: list, plan: str, **given: object) -> list[Output]:
    outputs = u.generate(prompts, plan, **drawn, **given)
    videos = [output.videos[0] for output in outputs]
    report(name, [read_clip(pixels(video)) for video in videos])
    sheet = torch.cat([contact_sheet(video.frames) for video in videos[:12]], 1)
    save_image(out / f"{name.replace(' ', '_')}.png", sheet)
    return outputs


def report_audio(name: str, outputs: list[Output]) -> None:
    rate = u.audio.sample_rate
    right = [follows(output.audios[0].numpy(), rate, clip) for output, clip in zip(outputs, clips, strict=True) if clip]
    print(f"{name:28s} {100 * np.mean(right):5.1f} % of the notes follow", flush=True)


grids, *sides = documents[0].segments[0].codes.shape
video_plan = f"video:{RATE}x{FRAMES}x{sides[0]}x{sides[1]}"
audio_plan = f"audio:{FRAMES / RATE:g}s"
report("the codes", [read_clip(pixels(u.decode(document.segments[0]))) for document in documents])
captions = u.generate([[d] for d in documents], "text", max_new_tokens=80)
report("video to text", [parse_caption(output.text) for output in captions])
asked = [(d, *questions(c)[i % len(questions(c))]) for i, (d, c) in enumerate(zip(documents, clips, strict=True)) if c]
answers = u.generate([[d, f" {question}"] for d, question, _ in asked], "text", max_new_tokens=8)
right = [output.text.strip() == f"{answer}." for output, (*_, answer) in zip(answers, asked, strict=True)]
print(f"{'questions':28s} {100 * np.mean(right):5.1f} % right", flush=True)
drawn_clips("text to video", [[row["caption"]] for row in rows], video_plan)
given = [[row["caption"], document] for row, document in zip(rows, documents, strict=True)]
for part in (1, max(2, grids // 2)):  # grids that are given
    count = FRAMES if part == grids else 1 + (part - 1) * u.image.group
    drawn_clips(f"text and {count} frame{'s' if count > 1 else ''}", given, video_plan, prefix_fraction=part / grids)
if "audio" in u.vocab.spans:
    report_audio("video to audio", u.generate([[d] for d in documents], audio_plan, **drawn))
    both = drawn_clips("text to video and audio", [[row["caption"]] for row in rows], f"{video_plan},{audio_plan}")
    report_audio("  its audio", both)
