"""Tables, verdicts and the plot of what ``quality.py`` measured."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonl import markdown, mean_spread
from quality_plan import PEERS, POINTS, SAELAB, Variant, at_l0, best_rate

Row = dict[str, Any]
COLOURS = {
    "topk": "#0072B2",
    "mutual_choice": "#D55E00",
    "batchtopk": "#D55E00",
    "feature_choice": "#009E73",
    "matryoshka": "#CC79A7",
    "gradient": "#56B4E9",
    "relu": "#999999",
    "gated": "#E69F00",
    "jumprelu": "#000000",
}
DASHES = {"saelab": "", "saelens": "7 3", "dictionary_learning": "2 3", "sparsify": "9 3 2 3"}


def variants() -> tuple[Variant, ...]:
    """Return all lines of the tables, in order."""
    return (*SAELAB, *PEERS)


def runs_of(rows: Iterable[Row], subject: str, variant: Variant) -> list[Row]:
    """Return the reported runs of a variant on a subject: those at the learning rate that the sweep found."""
    known = list(rows)
    rates: dict[float, float | None] = {}

    def rate(point: float) -> float | None:
        if point not in rates:
            own = [v for v in variants() if v.package == variant.package]
            swept = [row for row in known if row["stage"] == "lr" and row["package"] == variant.package]
            try:
                rates[point] = best_rate(variant, subject, swept, own, point)
            except ValueError:  # no sweep in these rows
                rates[point] = None
        return rates[point]

    return [
        row
        for row in known
        if row["stage"] == "main"
        and (row["subject"], row["package"], row["name"]) == (subject, variant.package, variant.name)
        and rate(row["point"]) in (None, row["lr"])
    ]


def at_points(runs: Sequence[Row], l0: float, key: str) -> list[float]:
    """Return, for each seed, the value at an L0, read between that seed's runs (nan outside of them)."""
    seeds = sorted({row["seed"] for row in runs})
    found = [at_l0([(r["l0"], r[key]) for r in runs if r["seed"] == seed and r["l0"] > 0], l0) for seed in seeds]
    return [value for value in found if not math.isnan(value)]


def tables(rows: Sequence[Row]) -> str:
    """Return the Markdown of everything measured."""
    parts = []
    for about in (row for row in rows if row["stage"] == "subject"):
        subject = about["subject"]
        if any(row["stage"] in ("lr", "main") and row["subject"] == subject for row in rows):
            parts += [_about(about, rows), _interpolated(rows, subject), _verdicts(rows, subject)]
            parts += [_sweep(rows, subject), _raw(rows, subject)]
    if parts:
        parts.insert(0, _counts(rows))
    return "\n\n".join(part for part in parts if part)


def _about(about: Row, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["stage"] in ("lr", "main") and row["subject"] == about["subject"]]
    seeds = sorted({row["seed"] for row in mine if row["stage"] == "main"})
    return (
        f"### {about['subject']}, {about['site']}\n\n"
        f"d_in {about['d_in']}, d_sae {about['d_sae']}; {mine[0]['tokens']:,} training tokens in batches of "
        f"{mine[0]['batch']} from a store of {about['train_tokens_distinct']:,}; seeds {seeds}. Held out: "
        f"{about['test_tokens']:,} tokens for FVU, L0, dead and under-used, {about['ce_rows']} rows of text for the "
        f"loss (clean {about['ce_clean']:.3f}, zero {about['ce_zero']:.3f}, mean {about['ce_mean']:.3f} nats), "
        f"{about['validation_tokens']:,} other tokens for the learning rates."
    )


def _interpolated(rows: Sequence[Row], subject: str) -> str:
    """FVU and CE recovered of every variant at the same L0."""
    lines = []
    for variant in variants():
        runs = runs_of(rows, subject, variant)
        if not runs:
            continue
        fvu = [mean_spread(at_points(runs, l0, "fvu")) for l0 in POINTS]
        ce = [mean_spread(at_points(runs, l0, "ce_recovered")) for l0 in POINTS[1:3]]
        dead = [mean_spread(at_points(runs, l0, key), 1, True) for key in ("dead", "underused") for l0 in POINTS[1:3]]
        seeds = len({row["seed"] for row in runs})
        rates = "/".join(f"{lr:g}" for lr in dict.fromkeys(row["lr"] for row in sorted(runs, key=lambda r: r["point"])))
        lines.append([variant.label, *fvu, *ce, *dead, rates, str(seeds)])
    middle = POINTS[1:3]
    header = ["at equal L0", *(f"FVU @ {l0}" for l0 in POINTS), *(f"CE rec. @ {l0}" for l0 in middle)]
    header += [*(f"dead % @ {l0}" for l0 in middle), *(f"under-used % @ {l0}" for l0 in middle), "lr", "seeds"]
    return markdown(header, lines)


def _sweep(rows: Sequence[Row], subject: str) -> str:
    """The learning rates: for each variant with a sweep of its own, the best one's validation FVU and dead features."""
    lines = []
    for variant in (v for v in variants() if v.lr_of is None):
        mine = [row for row in rows if row["stage"] == "lr" and row["subject"] == subject]
        mine = [row for row in mine if (row["package"], row["name"]) == (variant.package, variant.name)]
        cells = []
        for point in POINTS if variant.knob == "k" else variant.swept(subject):
            tried = {row["lr"]: row for row in mine if row["point"] == point}
            best = tried.get(best_rate(variant, subject, mine, [variant], point)) if tried else None
            cells.append(_swept(best, len(tried)))
        cells += ["-"] * (len(POINTS) - len(cells))
        if mine:
            lines.append([f"{variant.label}, {variant.knob}", *cells])
    table = markdown(["best rate: FVU, L0, dead (rates tried)", *(f"k {point}" for point in POINTS)], lines)
    return f"<details><summary>Learning rates, one seed, validation text</summary>\n\n{table}\n\n</details>"


def _swept(row: Row | None, tried: int) -> str:
    if row is None:
        return "-"
    knob = "" if row["knob"] == "k" else f"{row['knob']} {row['point']:g}, "
    return f"{knob}{row['lr']:g}: {row['fvu']:.4f}, {row['l0']:.1f}, {row['dead']:.1%} ({tried})"


def _raw(rows: Sequence[Row], subject: str) -> str:
    """Every run as trained: what was asked for and what came out."""
    lines = []
    for variant in variants():
        runs = runs_of(rows, subject, variant)
        for point in sorted({row["point"] for row in runs}):
            mine = [row for row in runs if row["point"] == point]
            cells = [
                mean_spread([r["l0"] for r in mine], 1),
                *(mean_spread([r[key] for r in mine]) for key in ("fvu", "ce_recovered")),
                *(mean_spread([r[key] for r in mine], 1, True) for key in ("dead", "underused")),
                mean_spread([r["l0_as_trained"] for r in mine if "l0_as_trained" in r], 1),
                mean_spread([r["fvu_as_trained"] for r in mine if "fvu_as_trained" in r]),
            ]
            lines.append([f"{variant.label}, {variant.knob} {point:g}", *cells])
    header = ["as trained", "L0", "FVU", "CE recovered", "dead %", "under-used %", "L0, training mode"]
    table = markdown([*header, "FVU, training mode"], lines)
    return f"<details><summary>Every run, mean ± spread over seeds</summary>\n\n{table}\n\n</details>"


# Verdicts ------------------------------------------------------------------------------------------------------------


def paired(ours: Sequence[Row], theirs: Sequence[Row], l0: float, key: str) -> tuple[float, float] | None:
    """Return the difference of means (ours - theirs) at an L0 and its standard error.

    None where either is missing; the error is nan where either has a single seed.
    """
    a, b = at_points(ours, l0, key), at_points(theirs, l0, key)
    if not a or not b:
        return None
    error = sum(statistics.variance(values) / len(values) if len(values) > 1 else math.nan for values in (a, b))
    return statistics.fmean(a) - statistics.fmean(b), math.sqrt(error)


def judge(difference: tuple[float, float] | None, *, lower_is_better: bool) -> str:
    """Say better, worse or level: level within two standard errors."""
    if difference is None:
        return "-"
    gap, error = difference
    if math.isnan(error):
        return "(too few seeds)"
    if abs(gap) <= 2 * error:
        return "level"
    return "better" if (gap < 0) == lower_is_better else "worse"


def _difference(found: tuple[float, float], lower: bool) -> str:
    error = "" if math.isnan(found[1]) else f" ± {found[1]:.4f}"
    return f"{found[0]:+.4f}{error} {judge(found, lower_is_better=lower)}"


@dataclass(frozen=True)
class Claim:
    """Two variants and the metric they are compared in."""

    name: str
    ours: str
    theirs: str
    key: str
    lower: bool = True
    group: str = ""
    """Claims of one group are counted together."""


def claims() -> Iterator[Claim]:
    """Yield what is compared: the papers' claims, then saelab with every peer."""
    yield Claim("Mutual-Choice vs TopK, FVU", "saelab mutual_choice", "saelab topk", "fvu")
    for kind in ("feature_choice", "feature_choice, aux_zipf", "mutual_choice, aux_zipf"):
        for key in ("dead", "underused", "fvu"):
            yield Claim(f"{kind} vs mutual_choice, {key}", f"saelab {kind}", "saelab mutual_choice", key)
    name = "g-SAE (by magnitude) vs TopK, CE recovered"
    yield Claim(name, "saelab gradient", "saelab topk", "ce_recovered", lower=False)
    for ours, arch in (("saelab topk", "topk"), ("saelab mutual_choice", "batchtopk")):
        for peer in (v.label for v in PEERS if v.name == arch):
            for key, lower in (("fvu", True), ("ce_recovered", False), ("dead", True)):
                group = f"saelab topk and mutual_choice vs peers, {key}"
                yield Claim(f"{ours} vs {peer}, {key}", ours, peer, key, lower, group)


def _found(rows: Sequence[Row], subject: str) -> Iterator[tuple[Claim, list[tuple[float, float] | None]]]:
    """Yield the claims that were measured on a subject, with the difference at every L0."""
    mine = {v.label: runs_of(rows, subject, v) for v in variants()}
    for claim in claims():
        if mine.get(claim.ours) and mine.get(claim.theirs):
            yield claim, [paired(mine[claim.ours], mine[claim.theirs], l0, claim.key) for l0 in POINTS]


def _counts(rows: Sequence[Row]) -> str:
    """How often each claim was judged better, level and worse, over all subjects and L0."""
    counted: dict[str, Counter[str]] = {}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        for claim, differences in _found(rows, subject):
            counts = counted.setdefault(claim.group or claim.name, Counter())
            counts.update(judge(found, lower_is_better=claim.lower) for found in differences)
    if not counted:
        return ""
    words = ("better", "level", "worse")
    lines = [[name, *(str(counts[word]) for word in words)] for name, counts in counted.items()]
    return markdown(["comparisons over all models and L0", *words], lines)


def _verdicts(rows: Sequence[Row], subject: str) -> str:
    """Differences that the claims are about, at every L0."""
    lines = [
        [claim.name, *(_difference(found, claim.lower) if found else "-" for found in differences)]
        for claim, differences in _found(rows, subject)
    ]
    if not lines:
        return ""
    return markdown(["difference ± standard error", *(f"L0 {l0}" for l0 in POINTS)], lines)


# Plot ----------------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path, subject: str = "embedded") -> None:
    """Draw FVU and CE recovered against L0, means over seeds, as a small SVG."""
    shown = [v for v in variants() if "," not in v.name and runs_of(rows, subject, v)]
    panels = [("FVU (lower is better)", "fvu", True), ("CE recovered (higher is better)", "ce_recovered", False)]
    width, height = 1000, 440
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, (title, key, log) in enumerate(panels):
        lines = {v.label: _means(runs_of(rows, subject, v), key) for v in shown}
        parts.append(_panel(title, lines, shown, 60 + number * 370, log))
    for number, variant in enumerate(shown):
        y = 40 + 22 * number
        parts.append(_stroke([(790, y), (825, y)], variant) + f'<text x="832" y="{y + 4}">{variant.label}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _means(runs: Sequence[Row], key: str) -> list[tuple[float, float]]:
    points = sorted({row["point"] for row in runs})
    groups = [[row for row in runs if row["point"] == point] for point in points]
    means = [(statistics.fmean(r["l0"] for r in g), statistics.fmean(r[key] for r in g)) for g in groups]
    return sorted(pair for pair in means if 4 <= pair[0] <= 140)


def _panel(
    title: str, lines: dict[str, list[tuple[float, float]]], shown: Sequence[Variant], left: float, log: bool
) -> str:
    """Draw one panel with its axes; L0 is logarithmic, and FVU too."""
    top, wide, high = 40.0, 300.0, 350.0
    ys = [y for pairs in lines.values() for _, y in pairs]
    low_y, high_y = min(ys), max(ys)
    scale: Callable[[float], float] = math.log if log else float
    margin = 0.05 * (scale(high_y) - scale(low_y))
    bottom, ceiling = scale(low_y) - margin, scale(high_y) + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / 4) / math.log(140 / 4)
        return left + wide * across, top + high * (1 - (scale(y) - bottom) / (ceiling - bottom))

    parts = [
        f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{top - 12}" font-weight="bold">{title}</text>',
        f'<text x="{left + wide / 2}" y="{top + high + 36}" text-anchor="middle">L0, features per token</text>',
    ]
    for tick in (4, 8, 16, 32, 64, 128):
        x = at(tick, low_y)[0]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + high}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + high + 16}" text-anchor="middle">{tick}</text>')
    for step in range(6):
        value = bottom + (ceiling - bottom) * step / 5
        y = top + high * (1 - step / 5)
        label = math.exp(value) if log else value
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label:.3g}</text>')
    for variant in shown:
        places = [at(x, y) for x, y in lines[variant.label]]
        parts.append(_stroke(places, variant))
        colour = COLOURS[variant.name]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return "\n".join(parts)


def _stroke(places: Sequence[tuple[float, float]], variant: Variant) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = DASHES[variant.package]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{COLOURS[variant.name]}" stroke-width="1.8"{style}/>'
