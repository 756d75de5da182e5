"""Pictures of all pages of the feature browser, made in a headless Chromium; those in the docs come from here.

    python benchmarks/screenshots.py saelab-demo --out docs/images
    python benchmarks/screenshots.py saelab-demo --out /tmp/looks --every   # all widths, light and dark

Needs Playwright and a Chromium, see tests/app/test_browser.py. Besides the pictures it prints, for each page, the
seconds from the request to the last thing drawn.
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PAGES = {
    "overview": "/",
    "features": "/features",
    "feature": "/feature",
    "prompt": "/prompt",
    "steer": "/steer",
    "error": "/error",
    "circuits": "/circuits",
    "compare": "/compare",
    "train": "/train",
}
PRESS = {"prompt": "Read it", "steer": "Write", "error": "Read it"}
SIZES = {"phone": (390, 844), "1280": (1280, 900), "1920": (1920, 1080)}
SETTLED = """() => {
  const app = document.querySelector('[data-testid="stApp"]');
  return app && app.getAttribute('data-test-script-state') === 'notRunning' && document.querySelector('h1')
    && !document.querySelector('[data-testid="stSkeleton"]');
}"""


def start(folders):
    """Serve the browser on a free port; return the process and its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "saelab", "app", *folders, "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    for _ in range(400):
        if server.poll() is not None:
            sys.exit("the server ended; run saelab app on these folders to see why")
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=2).close()
            return server, address
        except OSError:
            time.sleep(0.3)
    server.terminate()
    sys.exit("the server did not start")


def stop(server):
    """End the server, by force if it does not go."""
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def settle(page):
    """Wait until the script has ended and nothing has been drawn for a while."""
    page.wait_for_function(SETTLED, timeout=600_000)
    page.wait_for_timeout(300)
    page.wait_for_function(SETTLED, timeout=600_000)


def take(page, address, name, path, wait):
    """Open a page, press its button, and return its picture and the seconds until it was drawn."""
    started = time.perf_counter()
    page.goto(address + path)
    settle(page)
    seconds = time.perf_counter() - started - 0.3
    if name in PRESS and page.get_by_role("button", name=PRESS[name]).count():
        page.wait_for_timeout(wait)
        page.get_by_role("button", name=PRESS[name]).first.click()
        page.wait_for_timeout(500)
        settle(page)
    page.wait_for_timeout(wait)  # charts are drawn after the script has ended
    return page.screenshot(), seconds


def main():
    """Parse, serve, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="what saelab app is given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", action="store_true", help="all widths, light and dark")
    parser.add_argument("--width", action="append", choices=list(SIZES), help="with --every: only these widths")
    parser.add_argument("--theme", action="append", choices=["light", "dark"], help="with --every: only these")
    parser.add_argument("--page", action="append", choices=list(PAGES), help="only these pages")
    parser.add_argument("--feature", type=int, help="feature shown on its page; default: the first one worth a look")
    parser.add_argument("--wait", type=int, default=1500, help="milliseconds for charts to be drawn")
    parser.add_argument("--quality", type=int, default=80, help="of the WebP")
    options = parser.parse_args()
    from PIL import Image
    from playwright.sync_api import sync_playwright

    from saelab.workflows.browse import find_store
    from saelab.workflows.show import example_features

    feature = options.feature if options.feature is not None else example_features(find_store(options.folders[0]))[1]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    sizes = {name: SIZES[name] for name in (options.width or SIZES)} if options.every else {"1280": SIZES["1280"]}
    themes = options.theme or ("light", "dark") if options.every else ("light",)
    options.out.mkdir(parents=True, exist_ok=True)
    server, address = start(options.folders)
    total = 0
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            for width, (w, h) in sizes.items():
                for theme in themes:
                    context = browser.new_context(viewport={"width": w, "height": h}, color_scheme=theme)
                    page = context.new_page()
                    page.set_default_timeout(180_000)
                    for name in options.page or PAGES:
                        path = PAGES[name] + (f"?feature={feature}" if name == "feature" else "")
                        png, seconds = take(page, address, name, path, options.wait)
                        suffix = f"-{width}-{theme}" if options.every else ""
                        file = options.out / f"app-{name}{suffix}.webp"
                        Image.open(io.BytesIO(png)).convert("RGB").save(file, quality=options.quality, method=6)
                        total += file.stat().st_size
                        print(f"{file.name:34} {file.stat().st_size / 1024:6.0f} KiB  {seconds:5.1f} s", flush=True)
                    context.close()
            browser.close()
    finally:
        stop(server)
    print(f"{total / 1e6:.2f} MB in all")


if __name__ == "__main__":
    main()
