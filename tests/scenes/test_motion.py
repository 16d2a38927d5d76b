"""Promises of scenes in motion: captions are read back, frames are read back, also after a codec's blur, and what is no clip is none."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from unitok.scenes.motion import (
    ACROSS,
    FRAMES,
    OPPOSITE,
    RATE,
    SPEEDS,
    Clip,
    Thing,
    caption,
    draw_clip,
    follows,
    notes,
    parse_caption,
    questions,
    read_clip,
    render_clip,
    render_notes,
)
from unitok.scenes.world import SAMPLE_RATE


def clips(count: int, seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [draw_clip(rng) for _ in range(count)]


def crossing(front: str = "blue") -> Clip:
    """A red circle that begins at the left and a blue ring."""
    circle, ring = Thing("red", "circle", "small", "right", "quickly"), Thing("blue", "ring", "small", "left", "quickly")
    return Clip("white", (circle, ring), ACROSS[front == "red"])


def test_captions_are_read_back_and_name_everything():
    drawn = clips(400)
    assert [parse_caption(caption(clip)) for clip in drawn] == drawn
    assert len({caption(clip) for clip in drawn}) == len(set(drawn))
    kinds = Counter((len(c.things), c.in_turn, c.crosses) for c in drawn)
    assert set(kinds) == {(1, False, False), (2, False, False), (2, True, False), (2, False, True)}
    for front, across in (("blue", "crossing in front of"), ("red", "crossing behind")):
        assert caption(crossing(front)) == (
            f"a small red circle moves right quickly, and {across} it a small blue ring moves left quickly, on a white background"
        )
    for text in ("", "a red circle", caption(drawn[0]) + "s", caption(drawn[0]).replace("background", "foreground")):
        assert parse_caption(text) is None


@pytest.mark.parametrize("side", [32, 64])
def test_the_oracle_reads_what_is_drawn(side):
    rng = np.random.default_rng(1)
    drawn = clips(60, seed=side)
    read = [read_clip(render_clip(clip, rng, side)) for clip in drawn]
    assert sum(a == b for a, b in zip(read, drawn, strict=True)) >= 59
    for clip in drawn[:10]:  # blurred and noisy, as codecs leave them
        frames = ndimage.gaussian_filter(render_clip(clip, rng, side).astype(float), (0, 0.6 * side / 64, 0.6 * side / 64, 0))
        assert read_clip(frames + rng.normal(0, 8, frames.shape)) == clip


def test_the_oracle_tells_every_fact_apart():
    rng = np.random.default_rng(2)
    moves = Thing("red", "circle", "small", "right", "slowly")
    other = Thing("blue", "ring", "large", "left", "quickly")
    for thing in (
        moves,
        Thing("red", "circle", "small", "left", "slowly"),
        Thing("red", "circle", "small", "right", "quickly"),
        Thing("red", "circle", "large", "right", "slowly"),
        Thing("red", "square", "small", "right", "slowly"),
        Thing("red", "circle", growth="grows"),
        Thing("red", "circle", growth="shrinks"),
    ):
        for clip in (
            Clip("black", (thing,)),
            Clip("black", (thing, other), "below"),
            Clip("black", (thing, other), "above", in_turn=True),
            Clip("black", (other, thing), "below", in_turn=True),
        ):
            assert read_clip(render_clip(clip, rng, 64)) == clip, caption(clip)


def test_of_things_that_cross_the_oracle_tells_which_is_in_front():
    rng = np.random.default_rng(5)
    for side in (32, 64):
        for front in ("red", "blue"):
            clip = crossing(front)
            frames = render_clip(clip, rng, side)
            assert read_clip(frames) == clip
            back = [replace(thing, way=way) for thing, way in zip(clip.things[::-1], OPPOSITE[0], strict=True)]
            assert read_clip(frames[::-1]) == replace(clip, things=tuple(back), where=ACROSS[front == "blue"])  # they go back
            middle = frames[FRAMES // 2].astype(int)
            ahead = {"red": (middle[..., 0] - middle[..., 2] > 90).sum(), "blue": (middle[..., 2] - middle[..., 0] > 90).sum()}
            first = frames[0].astype(int)
            alone = {"red": (first[..., 0] - first[..., 2] > 90).sum(), "blue": (first[..., 2] - first[..., 0] > 90).sum()}
            assert max(ahead, key=lambda color: ahead[color] / alone[color]) == front


def test_what_stands_still_flickers_or_is_missing_is_no_clip():
    rng = np.random.default_rng(3)
    frames = render_clip(Clip("white", (Thing("red", "circle", "small", "right", "slowly"),)), rng, 64)
    assert read_clip(np.repeat(frames[:1], FRAMES, 0)) is None
    assert read_clip(np.full_like(frames, 245)) is None
    assert read_clip(frames[0]) is None
    assert read_clip(frames[:, :40]) is None
    assert read_clip(frames[::-1]) == Clip("white", (Thing("red", "circle", "small", "left", "slowly"),))
    assert read_clip(np.repeat(frames, 2, 0)) == read_clip(frames)  # at twice the rate


def test_questions_have_one_answer():
    for clip in clips(200, seed=4):
        asked = questions(clip)
        assert len({question for question, _ in asked}) == len(asked) >= 2
    both = Clip(
        "gray", (Thing("red", "circle", "small", "up", "slowly"), Thing("blue", "ring", "large", "up", "quickly")), "right of"
    )
    assert dict(questions(both)) == {
        "what shape is the red thing?": "circle",
        "which way does the red circle move?": "up",
        "how does the red circle move?": "slowly",
        "what shape is the blue thing?": "ring",
        "which way does the blue ring move?": "up",
        "how does the blue ring move?": "quickly",
        "how many things are there?": "two",
        "do the things cross?": "no",
    }
    for front in ("red", "blue"):
        asked = dict(questions(crossing(front)))
        assert asked["do the things cross?"] == "yes"
        assert asked["what color is the thing in front?"] == front
    assert max(SPEEDS.values()) + 2 * 0.21 < 1  # so that nothing leaves the frame


def test_notes_follow_the_motion():
    rng = np.random.default_rng(3)
    drawn = clips(60, seed=9)
    waves = [render_notes(clip, rng) for clip in drawn]
    assert all(wave.shape == (1, FRAMES * SAMPLE_RATE // RATE) and np.abs(wave).max() < 1 for wave in waves)
    assert all(follows(wave, SAMPLE_RATE, clip) for wave, clip in zip(waves, drawn, strict=True))
    noisy = [np.clip(wave + rng.normal(0, 0.01, wave.shape), -1, 1) for wave in waves]
    assert sum(follows(wave, SAMPLE_RATE, clip) for wave, clip in zip(noisy, drawn, strict=True)) >= 58
    for a, wave in zip(drawn[:15], waves[:15], strict=True):  # it fits another clip only where that has the same notes
        assert all(follows(wave, SAMPLE_RATE, b) == (notes(a) == notes(b)) for b in drawn[:15])
    assert not follows(waves[0][:, :-SAMPLE_RATE], SAMPLE_RATE, drawn[0])
    assert follows(np.pad(waves[0], ((0, 0), (0, 1))), SAMPLE_RATE, drawn[0])
    assert follows(waves[0][:, :-20], SAMPLE_RATE, drawn[0])
    assert not follows(np.zeros_like(waves[0]), SAMPLE_RATE, drawn[0])
    up, right = (Clip("white", (Thing("red", "circle", "small", way, "quickly"),)) for way in ("up", "right"))
    assert np.all(np.diff([pitch for _, _, pitch, _ in notes(up)]) > 0)
    assert np.all(np.diff([loudness for *_, loudness in notes(right)]) > 0)
