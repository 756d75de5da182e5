"""Execute the notebooks in a kernel, each in an empty folder of its own, and say what they take.

    python notebooks/run.py                     all of them
    python notebooks/run.py 01 04               some
    python notebooks/run.py --save FOLDER       also write the executed .ipynb files
    python notebooks/run.py --docs              write the table to docs/notebooks.md
    python notebooks/run.py --record FILE 01    keep the numbers; with --docs the table is made of all that are kept

Time is that of the whole notebook, kernel and imports included; memory is the peak of the kernel's resident set.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
MEMORY = "import resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"


def main() -> int:
    """Run what the command line names; return 1 when a notebook fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the notebooks' names; default: all")
    parser.add_argument("--save", type=Path, help="folder for the executed notebooks")
    parser.add_argument("--docs", action="store_true", help="write docs/notebooks.md")
    parser.add_argument("--record", type=Path, help="JSON file with the numbers of earlier runs, to be added to")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds that one cell may take")
    options = parser.parse_args()
    paths = [p for p in notebooks() if not options.names or p.name.startswith(tuple(options.names))]
    if not paths:
        parser.error(f"no notebook begins with {', '.join(options.names)}")
    rows = json.loads(options.record.read_text()) if options.record is not None and options.record.is_file() else {}
    failed = []
    for path in paths:
        try:
            rows[path.stem] = execute(path, options.timeout, options.save)
        except CellExecutionError as error:
            failed.append(path.stem)
            print(f"{path.stem} failed:\n{error}", file=sys.stderr)
            continue
        print(f"{path.stem:30} {rows[path.stem]['seconds']:6.0f} s {rows[path.stem]['memory']:7.0f} MB", flush=True)
        if options.record is not None:
            options.record.write_text(json.dumps(rows, indent=1))
    print(f"{'total':30} {sum(row['seconds'] for row in rows.values()):6.0f} s")
    if options.docs and not failed:
        missing = [path.stem for path in notebooks() if path.stem not in rows]
        if missing:
            print(f"no numbers of {', '.join(missing)}; the table says so", file=sys.stderr)
        write_docs(rows, separately=options.record is not None)
    return 1 if failed else 0


def notebooks() -> list[Path]:
    """Return the notebooks in order."""
    return sorted(HERE.glob("[0-9]*.py"))


def execute(path: Path, timeout: int, save: Path | None = None) -> dict[str, Any]:
    """Run one notebook in an empty folder; return its seconds and the kernel's peak memory in MB."""
    notebook = jupytext.read(path)
    notebook.cells.append(nbformat.v4.new_code_cell(MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=timeout, startup_timeout=300, resources=where)
        started = time.perf_counter()
        try:
            client.execute()
        finally:
            seconds = time.perf_counter() - started
            if save is not None:
                save.mkdir(parents=True, exist_ok=True)
                nbformat.write(notebook, save / f"{path.stem}.ipynb")
    (last,) = notebook.cells.pop().outputs
    return {"seconds": seconds, "memory": int(last["data"]["text/plain"]) / 1024}


def title_of(notebook: Any) -> str:
    """Return the heading of a notebook."""
    lines: list[str] = notebook.cells[0].source.splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))


def write_docs(rows: dict[str, Any], separately: bool = False) -> None:
    """Write docs/notebooks.md; ``separately`` says that the rows were measured one notebook at a time."""
    lines = [
        "# Notebooks",
        "",
        "In `notebooks/`, as scripts with `# %%` cells that Jupyter opens with jupytext (and editors as they are). No",
        "outputs are kept in the repository. `make notebooks` runs them all, each in an empty folder, in a kernel.",
        "",
        "```text",
        "pip install jupytext notebook ipywidgets",
        "jupytext --to ipynb notebooks/*.py",
        "```",
        "",
        "| notebook | seconds | peak memory, MB |",
        "| --- | ---: | ---: |",
    ]
    for path in notebooks():
        row = rows.get(path.stem)
        title = title_of(jupytext.read(path)).split(". ", 1)[-1]
        numbers = "not measured | |" if row is None else f"{row['seconds']:,.0f} | {row['memory']:,.0f} |"
        lines.append(f"| `{path.stem}`: {title} | {numbers}")
    total = sum(row["seconds"] for row in rows.values())
    command = "--docs`" if not separately else "--record FILE NAME --docs`, one notebook at a time,"
    lines += [
        f"| {'together' if len(rows) == len(notebooks()) else 'all measured'} | {total:,.0f} | |",
        "",
        f"`python notebooks/run.py {command} on {datetime.datetime.now(datetime.UTC).date().isoformat()}: "
        f"{os.cpu_count()} {platform.machine()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, no GPU.",
        "Seconds are those of the whole notebook, kernel start and imports included.",
        "",
    ]
    (HERE.parent / "docs" / "notebooks.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
