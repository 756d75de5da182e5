"""Results as one JSON object per line, appended as they come, and tables of them put into the docs."""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; none when there is no file."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line]


def append_row(results: Path, row: dict[str, Any]) -> None:
    """Write one line in one call, so that two processes can share a file."""
    results.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(row) + "\n").encode())
    finally:
        os.close(handle)


def mean_spread(values: Iterable[float], digits: int = 3, percent: bool = False) -> str:
    """Return ``mean ± sample standard deviation``; the mean alone of a single value, a dash without any."""
    numbers = [100 * value if percent else value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, first column left and the rest right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def put_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a page."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no section {begin} ... {end}; add the two lines")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def add_table_options(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add the options of :func:`printed`."""
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--docs", type=Path, help="put the tables into this page")


def printed(args: argparse.Namespace, section: str, tables: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Print the tables of what was measured, or put them into a page; say whether that was what was asked for."""
    if not (args.table or args.docs):
        return False
    text = tables(read_rows(args.results))
    if args.table:
        print(text)
    if args.docs:
        put_section(args.docs, section, text)
    return True
