"""The main journey in a real browser: open, sort, open a feature, hover, type a prompt, steer, annotate, reload.

Needs Playwright and a Chromium; skipped where they are not.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.app.planted import plant

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def serve():
    """Start ``saelab app`` on some folders and return its address; every server is ended afterwards."""
    running = []

    def start(*paths):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", "from saelab.cli.main import run; run()", "app", *map(str, paths)]
        running.append(subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE))
        address = f"http://localhost:{port}"
        for _ in range(240):
            assert running[-1].poll() is None, running[-1].stderr.read().decode()
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=2).close()
                return address
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server did not start")

    yield start
    for process in running:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # a busy machine
            process.kill()
            process.wait()
        process.stderr.close()


@pytest.fixture
def visit():
    """Return a function that opens a page; outside requests and script errors fail the test."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        wrong = []

        def go(address, path="/", **options):
            page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
            page.set_default_timeout(120_000)
            local = (address, address.replace("http", "ws"), "data:", "blob:")
            page.on("request", lambda r: None if r.url.startswith(local) else wrong.append(r.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
            page.goto(address + path)
            page.wait_for_selector("h1")
            return page

        yield go
        browser.close()
        assert not wrong


def until(page, act, url):
    """Do something until the page has moved on: a page that is still being drawn does not listen yet."""
    for _ in range(8):
        page.wait_for_timeout(1000)
        act()
        try:
            return page.wait_for_url(url, timeout=8000)
        except playwright.TimeoutError:
            continue
    raise AssertionError(f"{page.url} never became {url}")


def press_until(page, act, place, timeout=15_000):
    """Do something until a part of the page is there; clicks on a page that is still being drawn are lost.

    ``act`` must do no harm when done twice, and the page must need less than ``timeout`` to answer: doing it again
    starts the page anew.
    """
    for _ in range(8):
        act()
        try:
            return place.wait_for(timeout=timeout)
        except playwright.TimeoutError:
            continue
    raise AssertionError(f"{place} never came")


def hover_until(page, place, expected):
    """Hover over a token until its tip says what is expected; return the tip. Drawing moves it from under the mouse."""
    tip = ""
    for _ in range(40):
        place.hover()
        tip = place.evaluate("e => getComputedStyle(e, '::after').content")
        if expected in tip:
            return tip
        page.wait_for_timeout(500)
    raise AssertionError(f"no {expected} in the tip {tip}")


def test_the_main_journey(made, serve, visit, tmp_path):
    shutil.copytree(made / "train", tmp_path / "train")
    shutil.copytree(made / "features", tmp_path / "features")
    address = serve(tmp_path)
    page = visit(address, "/features")
    canvas = page.locator('[data-testid="stDataFrame"] canvas').first
    canvas.wait_for()

    search = page.get_by_role("textbox", name="Search")

    def look_for(text):
        search.fill(text)
        search.press("Enter")

    press_until(page, lambda: look_for("17"), page.get_by_text("1 of 256 features;"))
    press_until(page, lambda: look_for(""), page.get_by_text("256 of 256 features;"))
    first_row = {"x": 40, "y": 55}
    until(page, lambda: canvas.click(position=first_row, force=True), "**/feature?feature=*")
    number = page.locator("h1").inner_text().removeprefix("Feature ")
    assert f"feature={number}&" in page.url + "&"

    tip = hover_until(page, page.locator(".sl .t.p").first, "row")
    assert "position" in tip

    tab = page.get_by_role("tab", name="Across the range")
    press_until(page, tab.click, page.get_by_text("activations,").first)
    press_until(page, page.get_by_role("tab", name="Notes").click, page.get_by_label("Label"))
    page.get_by_label("Label").fill("seen in the browser")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("seen in the browser ·").wait_for()
    page.reload()
    page.get_by_text("seen in the browser ·").wait_for()
    page.goto(address + "/feature?feature=5")
    page.locator(".st-key-on button").wait_for()
    until(page, lambda: page.keyboard.press("ArrowRight"), "**/feature?feature=6*")

    page.get_by_role("link", name="Prompt").click()
    page.get_by_role("button", name="Read it").click()
    page.get_by_text("Features of the prompt").wait_for(timeout=240_000)  # torch and the model are loaded
    page.get_by_text("compare two texts").click()  # once: a second click would take it back
    page.get_by_label("Second text").wait_for()
    read = page.get_by_role("button", name="Read it")
    press_until(page, read.click, page.get_by_text("Features that differ most"), timeout=60_000)
    page.get_by_role("link", name="Steer").click()
    page.get_by_role("button", name="Write").click()
    page.get_by_text("By itself").wait_for()
    for name, said in (("Error", "saelab dark-matter"), ("Circuits", "saelab circuits"), ("Compare", "saelab compare")):
        page.get_by_role("link", name=name, exact=True).click()
        page.get_by_text(said).first.wait_for()


def test_hostile_tokens_are_inert_in_a_browser(serve, visit, tmp_path):
    plant(tmp_path / "features")
    address = serve(tmp_path / "features")
    page = visit(address, "/feature?feature=2")
    page.locator(".sl .t").first.wait_for()
    assert page.locator(".sl script, .sl a, .sl strong").count() == 0
    said = page.locator(".sl").all_inner_texts()
    assert any("<script>alert(1)</script>" in text for text in said)
    assert any("**bold** [link](http://x) $x$ :red[y]" in text for text in said)
    assert any("😀" in text for text in said)
    assert not any("\u202e" in text for text in said)
