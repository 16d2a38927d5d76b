"""Filling: what is outside of a hole stays as it is, in codes and in pixels and samples; holes that make no sense are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.cli import main
from unitok.document import Document, Part
from unitok.errors import UserError
from unitok.generation_config import GenerationConfig
from unitok.sample.fill import make_fill_drafts
from unitok.sample.requests import config_for

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
SECOND = (torch.sin(torch.arange(8000) / 7)[None] * 0.5, 8000)


def as_bytes(image: torch.Tensor) -> np.ndarray:
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_text_is_filled_at_its_blanks_and_nowhere_else(tiny):
    for output in tiny.fill("a ___ text about ___ much", n=4, max_new_tokens=60):
        assert output.text.startswith("a")
        assert " text about" in output.text
        assert output.text.endswith(" much")
        assert "___" not in output.text
    first, second, longer = (tiny.fill(f"a {blank} text", seed=3)[0].text for blank in ("___", "___", "______"))
    assert first == second == longer
    with pytest.raises(UserError, match="hole: a text has its holes as ___"):
        tiny.fill("a ___ text", (0.1, 0.2))


def test_pixels_outside_of_a_mask_of_any_shape_are_the_originals(tiny):
    y, x = np.mgrid[:48, :64]
    mask = (x - 30) ** 2 + (y - 20) ** 2 < 100
    for given in (mask, mask.astype(np.float32), Image.fromarray(mask.astype(np.uint8) * 255), transparent(mask)):
        outputs = tiny.fill(PIXELS, given, "a prompt", n=2)
        for output in outputs:
            made = as_bytes(output.images[0])
            far = (x - 30) ** 2 + (y - 20) ** 2 > 300
            assert made.shape == PIXELS.shape
            assert np.array_equal(made[far], PIXELS[far])
            assert (made[mask] != PIXELS[mask]).any()
            assert [s.modality for s in output.prompt.segments] == ["text"]


def transparent(mask: np.ndarray) -> Image.Image:
    """As OpenAI's clients mark a hole."""
    return Image.fromarray(np.dstack([PIXELS, np.where(mask, 0, 255).astype(np.uint8)]), "RGBA")


def test_an_image_grows_at_its_edges(tiny):
    (output,) = tiny.fill(PIXELS, (8, 0, 16, 4))
    made = as_bytes(output.images[0])
    assert made.shape == (52, 88, 3)
    assert np.array_equal(made[:40, 14:66], PIXELS[:40, 6:58])


def test_samples_outside_of_a_stretch_are_the_originals(tiny):
    (output,) = tiny.fill(SECOND, (0.3, 0.5))
    samples, original = output.audios[0], tiny.audio.prepare(*SECOND)
    rate = tiny.audio.sample_rate
    assert samples.shape == original.shape
    for part in (slice(0, int(0.29 * rate)), slice(int(0.51 * rate), None)):
        assert torch.equal(samples[:, part], original[:, part])
    assert not torch.equal(samples, original)


@pytest.mark.parametrize(
    ("content", "hole", "message"),
    [
        ("no blank", None, "no hole in the text; write ___"),
        (PIXELS, None, "an image needs a mask"),
        (PIXELS, np.zeros((48, 64), bool), "a mask without a hole"),
        (PIXELS, np.ones((8, 8), bool), "a mask of 8 x 8 for an image of 64 x 48 pixels; they must be equal"),
        (PIXELS, np.ones((48, 64, 3), bool), r"a mask of shape \(48, 64, 3\)"),
        (SECOND, None, r"audio needs a stretch to fill: \(start, stop\) in seconds"),
        (SECOND, (0.5, 0.2), "0.5 to 0.2 s of audio of 1 s; the stretch must be in it"),
        (SECOND, (3.0, 4.0), "3 to 4 s of audio of 1 s; the stretch must be in it"),
        ("a ___ b ___" * 10, None, "20 holes: there are tokens for 16"),
    ],
)
def test_a_hole_that_makes_no_sense_is_one_clear_line(tiny, content, hole, message):
    with pytest.raises(UserError, match=message):
        tiny.fill(content, hole)


def test_a_budget_that_the_holes_exceed_is_refused(tiny):
    with pytest.raises(UserError, match="a budget of 5 tokens is too small: the holes need at least"):
        tiny.fill(PIXELS, np.ones((48, 64), bool), max_new_tokens=5)


def test_an_edited_image_has_the_grid_of_its_source(tiny):
    output, _ = tiny.edit(PIXELS, "make it blue", n=2, guidance_scale=2.0, media_guidance_scale=1.5)
    assert output.new.segments[0].codes.shape == output.prompt.segments[0].codes.shape
    (described,) = tiny.edit(PIXELS, "make it blue", generation_config={"edit_described": True})
    assert [segment.modality for segment in described.new.segments] == ["text", "image"]
    assert described.new.segments[1].codes.shape == output.prompt.segments[0].codes.shape
    with pytest.raises(UserError, match="edit_described is 1: it must be true or false"):
        tiny.edit(PIXELS, "make it blue", generation_config={"edit_described": 1})
    with pytest.raises(UserError, match="instruction: give a text"):
        tiny.edit(PIXELS, " ")
    with pytest.raises(UserError, match=r"image: 'a.png' is a text; give a file as Path\('a.png'\), a tensor"):
        tiny.edit("a.png", "make it blue")
    with pytest.raises(UserError, match="image: text, where an image should be"):
        tiny.edit(Part("text", "a.png"), "make it blue")


def test_the_command_line_fills_and_writes_maps(bundle_folder, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    line = ["sample", "--bundle", str(bundle_folder), "--text", "a prompt", "--image", str(tmp_path / "a.png")]
    main([*line, "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "o"), "--save-map", "labels"])
    made = np.asarray(Image.open(tmp_path / "o" / "000000-0.png"))
    assert np.array_equal(made[32:], PIXELS[32:])
    assert Image.open(tmp_path / "o" / "000000-0.labels.png").mode == "P"
    main([*line, "--fill", "0,0,8,0", "--out", str(tmp_path / "p")])
    assert Image.open(tmp_path / "p" / "000000-0.png").size == (72, 48)
    main(["sample", "--bundle", str(bundle_folder), "--text", "a ___ text", "--fill", "___", "--out", str(tmp_path / "q")])
    assert (tmp_path / "q" / "000000.txt").read_text().startswith("a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "a.png", "--fill", "soon"], "--fill soon: write 1.2s-1.9s of audio"),
        (["--fill", "___"], "give it, without --prompts and --live"),
        (["--text", "a ___", "--fill", "___", "--live"], "give it, without --prompts and --live"),
    ],
)
def test_flags_of_holes_that_do_not_fit_are_refused(flags, message, bundle_folder, tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    flags = [str(tmp_path / flag) if flag == "a.png" else flag for flag in flags]
    with pytest.raises(SystemExit) as exit:
        main(["sample", "--bundle", str(bundle_folder), *flags, "--out", str(tmp_path / "o")])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_what_a_prompt_says_in_a_role_stays_where_it_is(tiny):
    before = Document(tuple(tiny.read("hello", role="user")))
    (output,) = tiny.fill("a ___ b", prompt=before, max_new_tokens=40)
    assert output.text.startswith("a")
    assert output.text.endswith(" b")
    mask = np.zeros((48, 64), bool)
    mask[:9, :9] = True
    (output,) = tiny.fill(PIXELS, mask, before, guidance_scale=2.0)
    assert np.array_equal(as_bytes(output.images[0])[20:], PIXELS[20:])


def test_holes_in_media_have_the_budget_that_they_need_and_those_in_texts_the_default(tiny):
    mask = np.ones(PIXELS.shape[:2], bool)
    for content, hole, given, most in (
        (PIXELS, mask, {}, 1024),
        (PIXELS, mask, {"max_new_tokens": 70}, 70),
        ("a ___", None, {}, 512),
    ):
        (draft,) = make_fill_drafts(tiny, content, hole, None, config_for(tiny, GenerationConfig(**given)))
        assert draft.request.max_new_tokens == most


def test_a_single_pixel_of_a_large_image_is_a_hole(tiny):
    large, mask = np.zeros((900, 1200, 3), np.uint8), np.zeros((900, 1200), bool)
    mask[700, 11] = True
    (output,) = tiny.fill(large, mask)
    assert output.images[0].shape == (3, 900, 1200)


def test_a_palette_with_a_transparent_color_is_a_mask(tiny, tmp_path):
    mask = np.zeros((48, 64), bool)
    mask[:20, :20] = True
    palette = Image.fromarray(np.where(mask, 0, 1).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 255, 255, 255])
    palette.save(tmp_path / "mask.png", transparency=0)
    (output,) = tiny.fill(PIXELS, tmp_path / "mask.png")
    assert np.array_equal(as_bytes(output.images[0])[32:], PIXELS[32:])
    with pytest.raises(UserError, match="no such file"):
        tiny.fill(PIXELS, tmp_path / "gone.png")
