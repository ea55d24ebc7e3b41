"""The page as it is used: through Gradio's client, and in a real browser."""

import io
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.command_line import error_of
from tokenlearn.main import main
from tokenlearn.page import command, layout
from tokenlearn.page.request import PageRequest
from tokenlearn.page.studio import Studio
from tokenlearn.stopping import Stopped, StopSignals
from tokenlearn.tokens import load_embedding

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKENS = ["<hat>", "<smile>"]
PROMPT = "a photo of a king"
OTHERS = ("", 2, 4.0, 0.8)  # negative prompt, steps, guidance, reach of edits
STRENGTHS = (0, 0)
CONCEPTS = ("", "", "", 0, 0, 0)
WAIT = 60_000  # milliseconds; the machine may have much else to do


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(studio):
    blocks = layout.build(studio, PageRequest(prompt=PROMPT, steps=2), title="test")
    yield command.serve(blocks, "127.0.0.1", free_port())
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / "holiday.png"
    Image.fromarray(pixels).save(path)
    return path


def show(client, *, prompt=PROMPT, seeds="1", photo=None, strengths=STRENGTHS, concepts=CONCEPTS, others=OTHERS):
    """Before, after, opinion, file of the image and file of the config."""
    given = None if photo is None else handle_file(photo)
    answer = client.predict(prompt, seeds, *others, given, TOKENS, *strengths, *concepts, api_name="/show")
    before, after, _, opinion, image, config = answer
    images = [[np.asarray(Image.open(item["image"])) for item in gallery] for gallery in (before, after)]
    return (*images, opinion, image, config)


def file_of(answer):
    return answer["value"] if isinstance(answer, dict) else answer


def test_client_generates_edits_and_judges(client, studio):
    before, after, opinion, image, config = show(client, seeds="1, 2", strengths=(3, 0))
    assert len(before) == len(after) == 2
    assert not np.array_equal(before[0], after[0])
    assert {row[0] for row in opinion["data"]} == {"ordinary person", "wizard", "pirate"}
    assert yaml.safe_load(Path(file_of(config)).read_text())["model"]["init_args"]["edits"] == [{"<hat>": 3}]
    assert file_of(image).endswith(".zip")
    (*_, frame) = studio.generate(PageRequest(prompt=PROMPT, steps=2, tokens={"<hat>": 3}))
    _, _, _, image, _ = show(client, strengths=(3, 0))
    assert np.array_equal(np.asarray(Image.open(file_of(image))), np.asarray(frame.after[0]))


def test_client_edits_a_photo(client, photo):
    before, after, _, image, config = show(client, photo=photo, concepts=("glasses", "", "", 8, 0, 0))
    assert not np.array_equal(before[0], after[0])
    assert Image.open(file_of(image)).size == (30, 40)
    assert yaml.safe_load(Path(file_of(config)).read_text())["model"]["init_args"]["images"] == "holiday.png"
    before, after, _, image, _ = show(client, photo=photo)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(np.asarray(Image.open(file_of(image))), np.asarray(Image.open(photo)))


def test_client_saves_a_token(client, studio):
    path = file_of(client.predict("<smile>", "comfyui", 2.0, api_name="/token_file"))
    np.testing.assert_allclose(load_embedding(path).arrays[0], 2 * studio.tokens["<smile>"].arrays[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": "one"}, "'one' is not a seed"),
        ({"seeds": " ".join("123456789")}, "9 seeds"),
        ({"prompt": "a <cat>"}, "&lt;cat&gt;"),
        ({"concepts": ("king - ", "", "", 5, 0, 0)}, "king -"),
    ],
)
def test_mistakes_are_messages(client, changes, words, capsys):
    with pytest.raises(AppError, match=words):
        show(client, **changes)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"others": ("", 101, 4.0, 0.8)}, {"strengths": (7, 0)}])
def test_values_beyond_a_slider_are_refused(client, changes):
    with pytest.raises(AppError, match="greater than maximum"):
        show(client, **changes)


def test_broken_and_giant_photos_are_messages(client, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    Image.new("1", (6000, 6000)).save(tmp_path / "giant.png")
    for name, words in (("broken", "broken.png"), ("giant", "6000x6000")):
        with pytest.raises(AppError, match=words):
            show(client, photo=tmp_path / f"{name}.png", strengths=(1, 0))


def test_two_clients_do_not_disturb_each_other(address, client, studio):
    other = Client(address, verbose=False)
    given = [*OTHERS, None, TOKENS]
    jobs = [
        client.submit(PROMPT, "5", *given, 2, 0, *CONCEPTS, api_name="/show"),
        other.submit(PROMPT, "6", *given, 0, 0.5, *CONCEPTS, api_name="/show"),
    ]
    alone = Studio(studio.pipeline)  # which remembers nothing of them
    for job, seed, tokens in zip(jobs, (5, 6), ({"<hat>": 2}, {"<smile>": 0.5}), strict=True):
        (*_, frame) = alone.generate(PageRequest(prompt=PROMPT, seeds=(seed,), steps=2, tokens=tokens))
        (image,) = job.result()[1]
        assert np.array_equal(np.asarray(Image.open(image["image"])), np.asarray(layout.displayed(frame.after[0])))


def test_the_command_serves_any_model_on_this_computer_alone(tiny_models, monkeypatch, capsys):
    asked = []

    def use():
        port = options[options.index("--port") + 1]
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        asked.append(len(client.predict(PROMPT, "1", *OTHERS, None, [], *CONCEPTS, api_name="/show")[1]))
        asked.append(client.config["analytics_enabled"])
        listening = Path("/proc/net/tcp").read_text().split("\n")
        hexadecimal = f":{int(port):04X}"
        asked.append({line.split()[1] for line in listening if hexadecimal in line and " 0A " in line})

    monkeypatch.setattr(command, "_wait_until_stopped", use)
    options = ["page", "--pretrained", str(tiny_models / "pipeline"), "--port", str(free_port()), "--steps", "1"]
    main(options)
    assert asked[:2] == [1, False]
    assert [place.split(":")[0] for place in asked[2]] == ["0100007F"]
    assert "http://127.0.0.1:" in capsys.readouterr().out


def test_stopped_by_a_signal():
    with StopSignals():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Stopped) as stopped:
            command._wait_until_stopped()
    assert stopped.value.code == 130
    assert "the page is closed" in stopped.value.message


def test_mistakes_on_the_command_line_are_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = error_of(["page", "--port", port], capsys)
        assert port in error
        assert "--port" in error
    for options, words in (
        (["--port", "70000"], "70000"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--steps", "0"], "steps"),
        (["--seeds", "[]"], "seeds"),
        (["--device", "toaster", "--port", str(free_port())], "toaster"),
        (["--pretrained", "no/such/model", "--port", str(free_port())], "no/such/model"),
    ):
        assert words in error_of(["page", *options], capsys)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "tokenlearn-diffusion[page]" in error_of(["page"], capsys)


def test_another_computer_is_warned_of(studio, capsys):
    blocks = layout.build(studio, PageRequest(prompt=PROMPT, steps=1), title="test")
    command.serve(blocks, "0.0.0.0", free_port())
    blocks.close(verbose=False)
    assert "everybody who can reach 0.0.0.0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.set_default_timeout(WAIT)
    opened.hosts = set()
    opened.on("request", lambda request: opened.hosts.add(request.url.split("/")[2]))
    opened.goto(address)
    wait_until_done(opened)
    yield opened
    opened.close()


def wait_until_done(page):
    page.wait_for_selector("#save-image:not([disabled])")
    expect(page.locator("#status")).to_have_text("", timeout=WAIT)


def shown(page, gallery):
    """Pixels of the first image of a gallery."""
    source = page.locator(f"#{gallery} img").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())))


def move(page, slider, value):
    box = page.locator(f"#{slider} input[type=number]")
    box.fill(str(value))
    box.blur()


def drag(page, slider, share):
    """Drag the handle from the middle to a share of the way, with the mouse."""
    box = page.locator(f"#{slider} input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()


def drop(page, path):
    """Drop a file, as from the desktop."""
    handle = page.evaluate_handle(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            return data;
        }""",
        [path.name, list(path.read_bytes())],
    )
    page.dispatch_event("#photo button", "drop", {"dataTransfer": handle})


def wait_for(condition):
    end = time.monotonic() + WAIT / 1000
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_browser_moves_a_slider_drops_a_photo_and_downloads_a_token(page, photo, studio, tmp_path):
    first = shown(page, "after")
    assert np.array_equal(first, shown(page, "before"))

    drag(page, "slider-hat", 0.75)
    wait_for(lambda: not np.array_equal(shown(page, "after"), first))
    wait_until_done(page)
    strength = float(page.locator("#slider-hat input[type=number]").input_value())
    assert 2 < strength < 4
    (*_, expected) = studio.generate(PageRequest(prompt=PROMPT, steps=2, tokens={"<hat>": strength}))
    assert np.array_equal(shown(page, "after"), np.asarray(layout.displayed(expected.after[0])))
    assert np.array_equal(shown(page, "before"), first)
    move(page, "slider-hat", 0)
    wait_for(lambda: np.array_equal(shown(page, "after"), first))

    drop(page, photo)
    dropped = np.asarray(layout.displayed(Image.open(photo)))
    wait_for(lambda: np.array_equal(shown(page, "before"), dropped))
    wait_until_done(page)
    move(page, "slider-smile", 0.5)
    wait_for(lambda: not np.array_equal(shown(page, "after"), dropped))
    wait_until_done(page)

    for button, name in (("save-token", "hat-tl.safetensors"), ("save-yaml", "page.yaml")):
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    assert load_embedding(tmp_path / "hat-tl.safetensors").token == "<hat>"
    assert yaml.safe_load((tmp_path / "page.yaml").read_text())["model"]["init_args"]["images"] == "holiday.png"
    assert page.hosts == {page.url.split("/")[2]}, "nothing is fetched from elsewhere"


def test_browser_shows_a_message_for_a_broken_photo(page, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    drop(page, tmp_path / "broken.png")
    expect(page.get_by_text("cannot read the photo 'broken.png'")).to_be_visible(timeout=WAIT)


def test_browser_hides_and_shows_sliders(page):
    assert page.locator("#slider-smile").get_by_text("<smile> (even)").is_visible()
    handle = page.locator("#slider-smile input[type=range]")
    assert [handle.get_attribute(name) for name in ("min", "max", "step")] == ["-1", "0.6", "0.05"], "0 is among them"
    page.get_by_role("button", name="Which tokens have sliders").click()
    page.locator("#chosen .token-remove").first.click()
    expect(page.locator("#slider-hat")).to_be_hidden(timeout=WAIT)
