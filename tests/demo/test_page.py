"""The page of demo/, through its HTTP API as any client uses it, and in a browser where there is one."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from common.video import count_frames, read_frames
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
FACE = ROOT / "assets" / "face.png"
PROMPT = "A person nods in front of a teal wall."
FIELDS = {"prompt": PROMPT, "s_y": 2, "s_r": 3, "placement": "tass", "steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder of uploaded files; gradio reads its name when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def serve(uploads):
    """serve("--ckpt", ...) -> the page of these options, served, and its address."""
    from demo.app import parse_arguments
    from demo.page import LAUNCH, build
    from demo.studio import Studio

    pages = []

    def run(*options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["app.py", "--device", "cpu", *map(str, options)])
            page = build(Studio(parse_arguments()))
        pages.append(page)
        return page, page.launch(prevent_thread_lock=True, **LAUNCH)[1]

    yield run
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def url(serve):
    return serve()[1]


@pytest.fixture
def ask(url):
    """ask(photo, s_r=8, ...) -> notes, HTML of the film, HTML of the last setting's. One visitor's."""
    return visitor(url)


def visitor(url):
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, download_files=False)

    def ask(photo=None, api_name="/film", **fields):
        photo = handle_file(photo) if isinstance(photo, str | Path) else photo
        fields = FIELDS | fields
        return client.predict(photo, *fields.values(), api_name=api_name)

    ask.client = client
    return ask


def held(photo):
    """The bytes of a photo as the browser sends them once it holds them."""
    url = "data:image/png;base64," + base64.b64encode(photo).decode()
    return {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}


def frames_of(film, tmp_path):
    """The frames (F, H, W, 3) of a film in HTML."""
    path = tmp_path / "film.mp4"
    path.write_bytes(base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]+)"', film)[1]))
    return read_frames(path, range(count_frames(path)))


def caption(film):
    return re.search(r"<figcaption>(.*)</figcaption>", film)[1].replace("<br>", "\n")


def uploaded(folder):
    return [path for path in folder.rglob("*") if path.name != "image.webp" and path.is_file()]


def shrunk(frames):
    """To 64x64 by the mean of each block."""
    n, height, width, _ = frames.shape
    return frames.reshape(n, 64, height // 64, 64, width // 64, 3).mean((2, 4))


def test_the_film_is_that_of_sample_py(ask, uploads, in_process, tmp_path):
    import sample

    notes, film, before = ask(FACE, s_r=5, steps=3, seed=4)
    assert notes == "" and before == ""
    options = "--ref", FACE, "--prompt", PROMPT, "--s-ref", 5, "--steps", 3, "--seed", 4, "--device", "cpu"
    code, out, err = in_process(sample.main, "sample.py", *options, "--out", tmp_path / "sample.mp4")
    assert code == 0, err
    words = re.search(r"similarity to the photo \d\.\d\d.*", out)[0]
    assert caption(film) == f"s_y 2, s_r 5, tass, 3 steps, seed 4\n{words}"
    theirs = read_frames(tmp_path / "sample.mp4", range(17)).astype(float)
    ours = shrunk(frames_of(film, tmp_path))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 8  # two encodings, one enlarged
    assert np.abs(ours - theirs[:, ::-1]).mean() > 16
    assert uploaded(uploads) == []


def test_a_moved_knob_stands_beside_the_last_setting(ask):
    photo = held(FACE.read_bytes())
    _, first, _ = ask(FACE)
    _, second, before = ask(photo, s_r=8)
    assert before == first and "s_r 3" in caption(first) and "s_r 8" in caption(second)
    assert second.split("<figcaption>")[0] != first.split("<figcaption>")[0]
    _, third, before = ask(photo, s_r=0, seed=1)  # another seed: the last setting is made anew with it
    assert "s_r 0" in caption(third) and "s_r 8" in caption(before) and "seed 1" in caption(before)
    _, again, _ = ask(photo, s_r=8, seed=1)
    assert again == before
    _, _, before = ask(photo, s_r=8, seed=2)  # only the seed
    assert before == again


@pytest.mark.slow
def test_a_grid_shows_every_setting(ask, tmp_path):
    notes, film = ask(FACE, api_name="/grid", steps=1, kind="placements")
    last_words = [line.split()[-1] for line in notes.splitlines()]
    assert last_words == ["overlap", "temporal", "fixed", "remote", "phase"]  # the model was trained with tass
    frames = frames_of(film, tmp_path)
    assert frames.shape == (17, 2 * (256 + 36), 3 * 256, 3)
    cells = [frames[:, y : y + 256, x : x + 256].astype(float) for y in (0, 292) for x in (0, 256, 512)]
    _, remote, _ = ask(FACE, steps=1, placement="remote")
    remote = frames_of(remote, tmp_path)
    errors = [np.abs(cell - remote).mean() for cell in cells]
    assert errors[4] < 4 and min(errors[:4] + errors[5:]) > 1.5 * errors[4], errors


def test_the_last_row_of_a_grid_is_filled_with_white():
    from demo.page import tiles

    film = tiles([(str(k), np.full((2, 64, 64, 3), 30 * k, np.uint8)) for k in range(7)], 3)
    assert film.shape == (2, 3 * (256 + 36), 3 * 256, 3)
    assert (film[:, -292:-36, :256] == 180).all() and (film[:, -292:, 256:] == 255).all()


def test_the_scales_of_a_grid_lie_around_the_sliders():
    from demo.page import SCALES, grid_of
    from demo.studio import Knobs

    labels, knobs = zip(*grid_of(SCALES, Knobs(s_text=2.0, s_ref=3.0, placement="tass", steps=1)))
    pairs = [(y, r) for y in (1, 2, 4) for r in (0, 3, 6)]
    assert [(knob.s_text, knob.s_ref) for knob in knobs] == pairs
    assert grid_of(SCALES, Knobs(s_text=20.0, s_ref=30.0, placement="tass", steps=1))[-1][1].s_ref == 60
    assert list(labels) == [f"s_y {y}, s_r {r}" for y, r in pairs]


def test_bad_uploads_get_their_line(ask, url, uploads, tmp_path):
    text, large, wall = tmp_path / "notes.txt", tmp_path / "large.png", tmp_path / "wall.png"
    text.write_text("no picture")
    large.write_bytes(bytes(50 * 2**20))
    Image.new("RGB", (64, 64), "teal").save(wall)
    notes, _, _ = ask(text)
    assert re.fullmatch(r"error: notes\.txt is not an image that can be read \(JPEG, .*\)", notes)
    notes, film, _ = ask(wall)
    assert "note: no face was found in the photo" in notes and "no face was found" in caption(film)
    with pytest.raises(ValueError, match="exceeds the maximum file size of 10485760 bytes"):
        ask(large)
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": large.open("rb")})  # past the client's own check
    assert answer.status_code == 413 and "maximum allowed size of 10485760 bytes" in answer.text
    assert ask(held(bytes(16 * 2**20)))[0] == "error: the photo is larger than 10 MB"
    assert uploaded(uploads) == []


def test_other_errors_are_one_line_too(ask):
    from gradio_client.exceptions import AppError

    assert ask(None, prompt="  ")[0] == "error: the prompt is empty: describe the video"
    assert ask(None, steps=2.5)[0].startswith("error: the page: steps = 2.5")
    assert ask(None, seed=None)[0].startswith("error: the page: seed = None")
    with pytest.raises(AppError, match=r"is an address: upload the photo itself$"):
        ask("http://127.0.0.1:9/face.png")
    notes, film, _ = ask(None, prompt="A person nods before a quasar.")
    assert notes == "note: words that this model was never taught: quasar" and "seed 0" in film


def test_a_request_deletes_no_picture_of_the_page(ask, uploads):
    shown = sorted(uploads.rglob("image.webp"))
    assert len(shown) == 8
    ask({"path": str(shown[0]), "meta": {"_type": "gradio.FileData"}})
    assert sorted(uploads.rglob("image.webp")) == shown


def test_two_visitors_at_once_get_their_own_films(url):
    faces = [ROOT / "assets" / "clips" / f"{k}.png" for k in range(2)]
    alone = [visitor(url)(face, seed=k)[1] for k, face in enumerate(faces)]
    assert alone[0] != alone[1]
    first, second = visitor(url), visitor(url)
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(ask, face, seed=k) for k, (ask, face) in enumerate(zip((first, second), faces))]
        together = [job.result() for job in jobs]
    assert [answer[1] for answer in together] == alone
    assert [answer[2] for answer in together] == ["", ""]  # no last setting: a visitor's own only


def test_the_steps_are_reported_while_it_samples(ask):
    from gradio_client import handle_file

    job = ask.client.submit(handle_file(FACE), *(FIELDS | {"steps": 6}).values(), api_name="/film")
    seen = set()
    while not job.done():
        seen |= {(part.length, part.desc) for part in job.status().progress_data or ()}
        time.sleep(0.01)
    assert seen == {(6, "this setting")}


def test_the_page_names_no_foreign_address(url):
    page = httpx.get(url).text
    loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']([^\"']+)", page)
    styles = httpx.get(f"{url}theme.css").text
    assert loaded and not [
        name
        for name in loaded + re.findall(r"(?:url\(|@import )[\"']?([^)\"']+)", styles)
        if re.match("(https?:)?//", name)
    ]
    config = httpx.get(f"{url}config").json()
    assert config["analytics_enabled"] is False and config["stylesheets"] == []


def test_another_checkpoint_has_no_drawn_people(serve, small, root):
    page, url = serve("--ckpt", small, "--gemma", root / "assets" / "gemma")
    kinds = [block["type"] for block in page.config["components"]]
    assert "gallery" not in kinds and "dropdown" not in kinds
    notes, film, _ = visitor(url)(FACE, steps=1)
    assert "has never seen a reference image" in notes and caption(film) == "s_y 2, s_r 3, tass, 1 steps, seed 0\n"


def test_options_are_checked_before_anything_is_loaded(in_process, tmp_path):
    from demo.app import main

    code, _, err = in_process(main, "app.py", "--lora", tmp_path / "no.safetensors")
    assert code == 2 and err == f"error: no LoRA at {tmp_path / 'no.safetensors'}: give --lora FILE or FILE:STRENGTH\n"


# Progress and place in the queue are on the page for moments only, so the page itself writes them down.
WATCH = """window.seen = ""; new MutationObserver(() => {
    const said = document.body.textContent.match(/\\d+\\s*\\/\\s*\\d+\\s+steps|queue:\\s*\\d+/g);
    if (said) window.seen += said.join("; ") + "; ";
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def program(tmp_path_factory):
    """`python demo/app.py`, the address that it prints, and its folder for temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    environment = os.environ | {"TMPDIR": str(folder)}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, str(ROOT / "demo" / "app.py"), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        line = process.stdout.readline()
        url = re.fullmatch(r"the page is at (\S+) \(Ctrl\+C ends it\)\n", line)
        assert url, line + process.stderr.read()
        yield process, url[1], folder
        process.kill()


@pytest.mark.slow
def test_only_this_machine_reaches_the_page(program):
    process, _, folder = program
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert [*folder.glob("st-drc-*")]
    process.send_signal(signal.SIGTERM)
    process.wait(600)
    assert not [*folder.glob("st-drc-*")]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_shows_all_of_it(program, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=600_000)
    text, large, wall = tmp_path / "notes.txt", tmp_path / "large.png", tmp_path / "wall.png"
    text.write_text("no picture")
    large.write_bytes(bytes(50 * 2**20))
    (damaged := tmp_path / "damaged.png").write_bytes(b"no picture either")
    Image.new("RGB", (64, 64), "teal").save(wall)
    _, url, _ = program
    addresses = set()

    def open_page(browser):
        page = browser.new_context().new_page()
        page.set_default_timeout(600_000)
        page.on("request", lambda request: addresses.add(request.url))
        with page.expect_response(re.compile("/heartbeat/")):  # the page's code has started
            page.goto(url)
        page.evaluate(WATCH)
        page.get_by_label("number input for steps").fill("4")
        return page

    def upload(page, path):
        if page.get_by_label("Remove Image").count():
            page.get_by_label("Remove Image").click()
        page.locator("input[type=file]").first.set_input_files(path)

    def show(page, path):
        upload(page, path)
        expect(page.locator("img").first).to_have_attribute("src", re.compile("^data:"))

    def press(page):
        page.get_by_role("button", name="make the video").click()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = open_page(browser)
        films = page.locator(".film figure")

        # a photo: while it is on its way into the page, the button is off
        button, waiting = page.get_by_role("button", name="make the video"), []
        page.route("**/run/predict", lambda route: waiting.append(route))
        upload(page, FACE)
        while not waiting:
            page.wait_for_timeout(50)
        expect(button).to_be_disabled()
        waiting[0].continue_()
        page.unroute("**/run/predict")
        expect(button).to_be_enabled()
        expect(page.locator("img").first).to_have_attribute("src", re.compile("^data:"))

        # a knob, progress, a film with its similarity
        page.get_by_label("number input for s_r: photo").fill("5")
        press(page)
        expect(films).to_have_count(1)
        expect(films).to_contain_text(re.compile(r"s_y 2, s_r 5, tass, 4 steps, seed 0similarity to the photo 0\.\d\d"))
        playing = "video => video.readyState >= 2 && video.videoWidth == 256 && !video.paused"
        assert re.search(r"[1-4]\s*/\s*4\s+steps", page.evaluate("window.seen"))
        page.wait_for_function(f"({playing})(document.querySelector('video'))")

        # another value of the knob: the last setting beside it, the same photo
        page.get_by_label("number input for s_r: photo").fill("9")
        press(page)
        expect(films).to_have_count(2)
        expect(films.nth(0)).to_contain_text("s_r 9")
        expect(films.nth(1)).to_contain_text("s_r 5")

        # menus make the prompt; the row of people and "someone new" make the photo
        page.get_by_label("motion").click()
        page.get_by_role("option", name="nod", exact=True).click()
        expect(page.get_by_label("prompt")).to_have_value("A person nods in front of a teal background.")
        picture = page.locator("img").first
        before = picture.get_attribute("src")
        page.get_by_role("button", name="someone new").click()
        expect(picture).not_to_have_attribute("src", before)
        before = picture.get_attribute("src")
        page.locator(".people img").nth(3).click()
        expect(picture).not_to_have_attribute("src", before)

        # bad uploads
        upload(page, text)
        expect(page.get_by_text("Invalid file type: notes.txt. Only image/* allowed.")).to_be_visible()
        upload(page, large)
        expect(
            page.get_by_text(re.compile(r"exceed the maximum allowed size of 10\.0 Mb: .large\.png"))
        ).to_be_visible()
        notes = page.get_by_label("notes")
        upload(page, damaged)
        expect(notes).to_have_value(re.compile(r"error: damaged\.png is not an image that can be read"))
        expect(page.get_by_label("Remove Image")).to_have_count(0)
        show(page, wall)
        press(page)
        expect(notes).to_have_value(re.compile("no face was found in the photo"))

        # two visitors at once: one sees the queue, both get their own film
        other = open_page(browser)
        for k, visitor in enumerate((page, other)):
            show(visitor, ROOT / "assets" / "clips" / f"{k}.png")
            visitor.get_by_label("number input for steps").fill("8")
            visitor.get_by_label("seed").fill(str(k + 1))
            press(visitor)
        expect(films.first).to_contain_text("8 steps, seed 1")
        expect(other.locator(".film figure")).to_contain_text("8 steps, seed 2")
        assert "queue:" in page.evaluate("window.seen") + other.evaluate("window.seen")
        browser.close()
    assert [address for address in addresses if not address.startswith((url, "data:", "blob:"))] == []
