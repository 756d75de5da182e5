"""How long a user waits before anything happens: ``import saelab``, ``saelab --help`` and the help of commands.

    python benchmarks/startup.py                        print the table
    python benchmarks/startup.py --docs docs/api.md     put it into the page

Each line is a process of its own, started to ended; medians of interleaved runs, after one that is not counted (it
compiles the bytecode of a fresh installation). The help of commands is kept between runs (saelab.cli.option_cache); the
line that says so starts without. ``python -c pass`` is the part that is Python's own. CPU seconds are
those of all threads; they change little with what else runs on the machine, seconds do.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonl import markdown, put_section

SAELAB = [sys.executable, "-m", "saelab"]
FIRST = "the first saelab train --help after an installation"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import saelab'": [sys.executable, "-c", "import saelab"],
    "saelab --help": [*SAELAB, "--help"],
    "saelab train --help": [*SAELAB, "train", "--help"],
    FIRST: [*SAELAB, "train", "--help"],
    "saelab circuits --help": [*SAELAB, "circuits", "--help"],
    "a misspelt command": [*SAELAB, "trian"],
    "a misspelt option": [*SAELAB, "train", "--sae.kk", "3"],
}


def children_cpu() -> float:
    """Return the CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds and the CPU seconds of each command, one pair per round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, command in COMMANDS.items():
            with tempfile.TemporaryDirectory() as empty:
                environment = {**os.environ, "XDG_CACHE_HOME": empty} if name == FIRST else None
                started, cpu = time.perf_counter(), children_cpu()
                done = subprocess.run(command, check=False, capture_output=True, env=environment)
                took = time.perf_counter() - started, children_cpu() - cpu
            if (done.returncode != 0) != name.startswith("a misspelt"):
                raise SystemExit(f"{name} returned {done.returncode}: {done.stderr.decode()}")
            if turn > 0:
                seconds[name].append(took)
    return seconds


def table(seconds: dict[str, list[tuple[float, float]]]) -> str:
    """Return the Markdown table and the line that says where it was measured."""
    rows = [
        [
            f"`{name}`" if name.startswith(("python", "saelab")) else name,
            *(f"{statistics.median(s):.2f}" for s in zip(*pairs, strict=True)),
        ]
        for name, pairs in seconds.items()
    ]
    repeats = len(next(iter(seconds.values())))
    return (
        f"{markdown(['process', 'seconds', 'CPU seconds'], rows)}\n\n"
        f"`python benchmarks/startup.py --docs docs/api.md` on {datetime.datetime.now(datetime.UTC).date()}: "
        f"medians of\n{repeats} runs, {os.cpu_count()} {platform.machine()} cores, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[0]:.0f}."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the seconds here")
    parser.add_argument("--docs", type=Path, help="put the table into this page")
    args = parser.parse_args()
    seconds = measure(args.repeats)
    print(table(seconds))
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1))
    if args.docs:
        put_section(args.docs, "startup", table(seconds))


if __name__ == "__main__":
    main()
