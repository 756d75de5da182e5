"""The demo over several seeds: the table and the picture of the terminal in the README.

    python benchmarks/demo.py --seeds 0 1 2 --json demo.json --picture docs/images/demo.svg

Each seed is the command ``saelab demo --seed S --json`` in a fresh folder: seed of the SAE's initialisation and of the
order of the data; the embedded model, the text and the held-out text are the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

METRICS = ("fvu", "ce_recovered", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "l0", "dead_fraction")


def run(seed: int, out: Path) -> dict:
    """Run the demo once and return its JSON."""
    command = [sys.executable, "-m", "saelab", "demo", "--seed", str(seed), "--out", str(out), "--force", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(results: list[dict]) -> str:
    """Markdown table: a column per seed, mean and standard deviation."""
    head = ["metric", *(f"seed {r['seed']}" for r in results), "mean", "sd"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    rows = [(name, [r[name] for r in results]) for name in METRICS]
    rows += [(f"{s}: seconds", [r["seconds"][s] for r in results]) for s in results[0]["seconds"]]
    rows += [(f"{s}: tokens/s", [r["tokens_per_second"][s] for r in results]) for s in results[0]["seconds"]]
    for name, values in rows:
        shown = [f"{v:,.0f}" if v > 1000 else f"{v:.4g}" for v in [*values, statistics.mean(values)]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append([name, *shown, f"{spread:.2g}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(folder: Path, target: Path) -> None:
    """Run the demo once more in ``folder`` with a recording terminal, and save what it shows as SVG."""
    import contextlib
    import re

    from rich.console import Console

    from saelab.cli import console
    from saelab.workflows.demo import DemoJob, run_demo

    console.out = Console(record=True, width=112, force_terminal=True, color_system="truecolor", highlight=False)
    with contextlib.chdir(folder):
        console.print_demo(run_demo(DemoJob(), "saelab-demo"))
    # Without the web fonts that rich refers to: a picture should not load anything.
    svg = re.sub(r"@font-face \{.*?\}", "", console.out.export_svg(title="saelab demo"), flags=re.S)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(svg)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the raw results here")
    parser.add_argument("--picture", type=Path, help="write an SVG of the terminal here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results: list[dict] = [{"seed": seed, **run(seed, Path(temporary) / str(seed))} for seed in args.seeds]
        if results:
            print(table(results))
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        if args.picture:
            picture(Path(temporary), args.picture.absolute())


if __name__ == "__main__":
    main()
