"""Latency and memory of the feature browser on a synthetic store, through the pages themselves.

    python benchmarks/app.py --features 100000 --tokens 5000000 --folder /tmp/saelab-app-benchmark

The store is built by saelab's own builder from codes drawn at random (Zipf-distributed features), and kept for the next
run. Each page is run as Streamlit's server runs it, in a process that has just been started, for features drawn at
random; the time is that of the whole script with everything it sends, by the clock and of the processor (the latter
hardly depends on what else the machine does). Then ``saelab app`` is started and opened in a headless Chromium: seconds
to the first page, and the server's memory. What is mapped from files is the kernel's page cache, given up when anyone
needs the memory: the shared libraries, and the parts of the store that were looked at.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from saelab.core.assets import asset


def memory(process="self"):
    """Return resident MiB of a process: its own, and mapped from files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines if ":" in line)
    return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]


def measure(folder, runs):
    """Run the pages; print one JSON object."""
    sys.path.insert(0, str(asset("app")))
    sys.argv = ["main.py", str(folder)]
    from streamlit import config
    from streamlit.testing.v1 import AppTest

    config.set_option("runner.magicEnabled", False)  # as saelab app does
    result = {}
    app = AppTest.from_file(str(asset("app", "main.py")), default_timeout=600)
    started = time.perf_counter(), time.process_time()
    app.run()
    result["first page, cold (imports too)"] = [(time.perf_counter() - started[0], time.process_time() - started[1])]
    result["overview"] = timed(app, runs, lambda k: None)
    app.switch_page("views/features.py").run()
    result["features, sort by another column"] = timed(
        app, runs, lambda k: app.selectbox(key="sort").set_value(["max", "token_entropy", "mean", "density"][k % 4])
    )
    result["features, another page"] = timed(app, runs, lambda k: app.number_input(key="page_number").set_value(k + 1))
    from saelab.features.store import open_features

    n = open_features(next(folder.rglob("features"))).n_features
    chosen = np.random.default_rng(7).integers(0, n, 4 * (runs + 1)).tolist()
    app.switch_page("views/feature.py").run()

    def other(k):
        app.query_params["feature"] = str(chosen.pop())

    for pane in ("Top contexts", "Across the range", "Related"):
        app.session_state["pane"] = pane
        result[f"feature, {pane.lower()}"] = timed(app, runs, other)
    assert not app.exception
    print(json.dumps({"seconds": result, "memory": memory(), "torch": "torch" in sys.modules}))


def timed(app, runs, change):
    """Seconds, by the clock and of the processor, of each of some runs of a page, after one that is not counted."""
    seconds = []
    for k in range(runs + 1):
        change(k)
        started = time.perf_counter(), time.process_time()
        app.run()
        seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return seconds[1:]


def processor_seconds():
    """Return the processor seconds that the processes started here, and those that they started, have used so far."""
    import psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def first_page(folder, pages):
    """Start ``saelab app``, open it in a browser; return seconds to the first page, and the server's memory.

    Seconds are by the clock, and of the processor (server and browser together) until all is drawn. Memory is taken
    before anybody has come, and after the first page and some feature pages.
    """
    from playwright.sync_api import sync_playwright
    from screenshots import FLAGS, SETTLED, start, stop

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    server, address = start([str(folder)])
    try:
        time.sleep(5)  # what is read ahead is read
        before = memory(server.pid)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page()
            page.set_default_timeout(600_000)
            page.goto("about:blank")
            started, used = time.perf_counter(), processor_seconds()
            page.goto(address)
            page.wait_for_selector("h1")
            heading = time.perf_counter() - started
            page.wait_for_function(SETTLED)
            settled, used = time.perf_counter() - started, processor_seconds() - used
            started = time.perf_counter()
            page.goto(address)
            page.wait_for_function(SETTLED)
            again = time.perf_counter() - started
            for i in range(pages):
                page.goto(f"{address}/feature?feature={i * 37}")
                page.wait_for_function(SETTLED)
            after = memory(server.pid)
            browser.close()
    finally:
        stop(server)
    found = {"heading": heading, "settled": settled, "again": again}
    return found | {"processor": used, "before": before, "after": after}


def main():
    """Parse, build if needed, measure in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--l0", type=int, default=16)
    parser.add_argument("--d_in", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=20_000, help="tokens that the synthetic text is drawn from")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/saelab-app-benchmark"))
    parser.add_argument("--existing", action="store_true", help="measure what is in --folder (a demo run, say)")
    parser.add_argument("--no-browser", action="store_true", help="leave out the started server and its memory")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.folder, options.runs)
        return
    if not options.existing and not (options.folder / "features" / "manifest.json").is_file():
        from synthetic_store import make  # imports torch, which the pages do without

        sizes = {"l0": options.l0, "d_in": options.d_in, "vocabulary": options.vocabulary}
        make(options.folder, options.features, options.tokens, **sizes)
    command = [sys.executable, __file__, "--child", "--folder", str(options.folder), "--runs", str(options.runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{'page':34} {'median':>9} {'p95':>9}   {'CPU median':>10} {'CPU p95':>9}")
    for name, pairs in result["seconds"].items():
        wall, cpu = (1e3 * np.array(column) for column in zip(*pairs, strict=True))
        numbers = [np.median(wall), np.quantile(wall, 0.95), np.median(cpu), np.quantile(cpu, 0.95)]
        print(f"{name:34} {numbers[0]:6.0f} ms {numbers[1]:6.0f} ms   {numbers[2]:7.0f} ms {numbers[3]:6.0f} ms")
    print(f"resident memory after these: {described(result['memory'])}; torch imported: {result['torch']}")
    if options.no_browser:
        return
    found = first_page(options.folder, 10)
    times = [found[name] for name in ("heading", "settled", "again")]
    print(
        "started server, first page in a browser: heading {:.2f} s, all drawn {:.2f} s, again {:.2f} s".format(*times)
    )
    print(f"processor seconds of server and browser until then: {found['processor']:.2f}")
    print(f"server's memory: {described(found['before'])} started, {described(found['after'])} after 11 pages")


def described(pair):
    """Say a memory in words."""
    return f"{sum(pair):.0f} MiB ({pair[0]:.0f} its own, {pair[1]:.0f} mapped from files: libraries and the store)"


if __name__ == "__main__":
    main()
