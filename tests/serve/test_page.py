"""The page in a real browser, on the built-in bundle: an image appears row by row, audio has the right length, an image is asked about."""

import re
import shutil
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from clips import clip
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from raw_data import wav
from serving import Server, running

from unitok.bundle import make_bundle
from unitok.media import write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

CAPTION = "a large red circle left of a small blue square on a white background"
FLAGS = [
    "--no-sandbox",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="module")
def scenes() -> Iterator[Server]:
    with running("scenes") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, scenes) -> Iterator[Page]:
    """A page that is ready; what goes wrong in it fails the test."""
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(scenes.url)
    page.wait_for_selector("body[data-ready]")
    page.locator("#seed").evaluate("node => node.value = 1")  # what is drawn is the same in every run
    yield page
    context.close()
    assert not [problem for problem in problems if "400" not in problem]  # the browser's own line for a refused request


def choose(page: Page, *names: str) -> None:
    for box in page.locator("#modalities input").all():
        box.set_checked(box.get_attribute("value") in names, force=True)


def generate(page: Page, text: str, *names: str) -> None:
    choose(page, *names)
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("article.turn[data-done]", timeout=60_000)


def test_an_image_appears_row_by_row_and_audio_has_its_length(page):
    page.evaluate(
        """() => { window.rows = []; const draw = CanvasRenderingContext2D.prototype.drawImage;
        CanvasRenderingContext2D.prototype.drawImage = function (image, ...at) { window.rows.push(image.height); return draw.call(this, image, ...at); }; }"""
    )
    generate(page, CAPTION, "image", "audio")
    rows = page.evaluate("window.rows")
    assert len(rows) > 2
    assert rows == sorted(rows)
    assert rows[-1] == 64
    colors = page.evaluate(
        """() => { const canvas = document.querySelector(".output canvas"), pen = canvas.getContext("2d");
        return [[16, 32], [48, 32], [2, 2]].map(([x, y]) => [...pen.getImageData(x, y, 1, 1).data.slice(0, 3)]); }"""
    )
    red, blue, white = colors
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]
    assert min(white) > 200
    audio = page.locator(".output audio")
    expect(audio).to_have_count(1)
    expect(audio).to_have_js_property("readyState", 4)
    assert abs(audio.evaluate("node => node.duration") - 0.8) < 0.01  # two notes of 0.4 s
    assert "tokens per second" in page.locator(".stats").inner_text()


def test_an_image_is_uploaded_and_asked_about(page, tmp_path):
    generate(page, CAPTION, "image")
    with page.expect_download() as download:
        page.click("text=Download image")
    download.value.save_as(tmp_path / "image.png")
    page.set_input_files("#file", tmp_path / "image.png")
    expect(page.locator("#parts img")).to_have_count(1)
    generate(page, "", "text")
    assert page.locator(".output p").inner_text() == CAPTION
    page.set_input_files("#file", tmp_path / "image.png")
    expect(page.locator("#parts img")).to_have_count(1)
    generate(page, " what color is the circle?", "text")
    assert "red" in page.locator(".output p").inner_text()


def test_audio_is_uploaded_recorded_and_removed(page, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    page.set_input_files("#file", tmp_path / "a.wav")
    expect(page.locator("#parts audio")).to_have_count(1)
    page.click("#record")
    page.wait_for_timeout(600)
    page.click("#record")
    expect(page.locator("#parts audio")).to_have_count(2)
    page.locator("#parts button").first.click()
    expect(page.locator("#parts audio")).to_have_count(1)
    generate(page, "", "text")
    (tmp_path / "a.txt").write_text("no media")
    page.set_input_files("#file", tmp_path / "a.txt")
    expect(page.locator("#error")).to_contain_text("neither an image nor audio or a video")


def test_a_video_is_uploaded_and_another_one_grows(browser, bundle_folder, tmp_path):
    make_bundle(tmp_path / "bundle", {"model": bundle_folder}, add=["video"])
    write_video(tmp_path / "a.webm", clip(4, 32, 32), 8)
    with running(tmp_path / "bundle") as server:
        page = browser.new_context().new_page()
        page.goto(server.url)
        page.wait_for_selector("body[data-ready]")
        page.set_input_files("#file", tmp_path / "a.webm")
        expect(page.locator("#parts video")).to_have_count(1)
        page.locator("details").evaluate_all("nodes => nodes.forEach((node) => { node.open = true; })")
        page.fill("#max_tokens", "60")
        generate(page, "", "video")
        expect(page.locator(".turn.user video")).to_have_count(1)
        made = page.locator(".output img.video")
        expect(made).to_have_count(1)
        assert made.evaluate("node => node.naturalWidth") > 0
        with page.expect_download() as download:
            page.click("text=Download video")
        download.value.save_as(tmp_path / "made.gif")
        assert Image.open(tmp_path / "made.gif").n_frames >= 1


def test_a_drawing_is_a_prompt(page):
    page.click("#draw")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 160)
    page.mouse.up()
    page.click("#use")
    expect(page.locator("#parts img")).to_have_count(1)
    generate(page, "", "text")
    assert page.locator(".output p").inner_text().strip()


def test_a_part_of_an_image_is_painted_over_and_made_anew(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    page.set_input_files("#file", tmp_path / "image.png")
    page.click("#parts button.brush")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.up()
    page.click("#use")
    generate(page, CAPTION, "image")
    with page.expect_download() as download:
        page.click("text=Download image")
    download.value.save_as(tmp_path / "made.png")
    made = np.asarray(Image.open(tmp_path / "made.png").convert("RGB"))
    assert made.shape == pixels.shape
    assert np.array_equal(made[32:], pixels[32:])
    assert (made[14:18, 14:18] != pixels[14:18, 14:18]).any()


def test_several_outputs_examples_and_another_seed(page):
    page.click("summary >> text=Settings")
    page.fill("#n", "3")
    page.fill("#seed", "5")
    page.locator("#gallery button").first.click()
    page.wait_for_selector("article.turn[data-done]", timeout=60_000)
    expect(page.locator(".output canvas")).to_have_count(3)
    assert "seed 5" in page.locator(".stats").last.inner_text()
    page.click("text=Again with another seed")
    expect(page.locator(".stats").last).to_contain_text("tokens per second")
    expect(page.locator(".stats").last).not_to_have_text(re.compile(r"seed 5$"))


def test_examples_come_with_an_image_that_is_read_marked_and_filled(page, scenes):
    examples = httpx.get(f"{scenes.url}/about").json()["examples"]
    buttons = page.locator("#gallery button")
    expect(buttons).to_have_count(len(examples))
    for kind, shown in (("box", "canvas"), ("audio", "audio")):
        number = next(i for i, example in enumerate(examples) if example["modalities"][-1] == kind and "image" in example)
        page.locator("#examples > summary").click() if not buttons.first.is_visible() else None
        buttons.nth(number).click()
        page.wait_for_selector("article.turn[data-done]", timeout=60_000)
        expect(page.locator(f".output {shown}").first).to_be_visible()
    assert "pink triangle" in page.locator(".output p").first.inner_text()
    page.locator("#examples > summary").click()
    buttons.filter(has=page.locator("img[alt='what is made anew']")).click()
    page.wait_for_selector("article.turn[data-done] canvas[data-done]", timeout=60_000)
    made = page.locator(".output canvas").evaluate("node => [...node.getContext('2d').getImageData(32, 48, 1, 1).data]")
    assert made[2] > made[0] + 50  # the lower half was pink, and is blue now


def test_errors_of_the_server_are_shown(page):
    page.click("summary >> text=Settings")
    page.fill("#max_tokens", "1")
    choose(page, "image")
    page.fill("#text", CAPTION)
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("a budget of 1 tokens is too small")


def test_two_browsers_at_once_and_the_keyboard_alone(browser, scenes):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(scenes.url)
        page.wait_for_selector("body[data-ready]")
        choose(page, "image")
        page.focus("#text")
        page.keyboard.press("Control+A")
        page.keyboard.type(CAPTION)
        page.keyboard.press("Enter")
    for page in pages:
        page.wait_for_selector("article.turn[data-done]", timeout=60_000)
        expect(page.locator(".output canvas")).to_have_count(1)
        page.context.close()


def test_a_conversation_goes_on_with_what_was_answered(page):
    page.check("input[value=chat]", force=True)
    generate(page, f"draw {CAPTION}", "image")
    choose(page, "text")
    page.fill("#text", "what color is the square?")
    page.keyboard.press("Enter")
    expect(page.locator("article.turn[data-done]")).to_have_count(2, timeout=60_000)
    assert page.locator(".output p").inner_text() == "blue."
