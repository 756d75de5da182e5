"""The report of a comparison: one HTML file that needs nothing from outside."""

from html import escape
from typing import Any

from saelab.analysis.compare.result import Comparison

TITLES = {
    "matching": (
        "Matching",
        "Similarity of each feature of A with its partner in B, sorted. One-to-one and best differ where several "
        "features want the same partner. Dotted: the mean best similarity that chance gives.",
    ),
    "cosine_and_correlation": (
        "Same direction, same activations?",
        "Each pair matched by activation. Pairs high on the left fire together and write in different directions.",
    ),
    "one_to_many": (
        "One-to-many",
        "LASSO: variance of a feature that a few features of the other SAE predict. A curve well above its dotted line "
        "means that features are spread over several of the other side.",
    ),
    "clusters": ("Many-to-many", "Features in clusters of correlated features, by what the clusters hold."),
    "novel": ("Novel features", "Features of the larger SAE left of the line have no counterpart in the smaller one."),
}
STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}p{max-width:46rem}table{border-collapse:collapse}
td,th{padding:.15rem .8rem .15rem 0;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}thead th{border-bottom:1px solid #8886}.note{opacity:.75}
@media (prefers-color-scheme:dark){body{background:#14171c;color:#e6e6e6}.js-plotly-plot text{fill:#e6e6e6!important}}
"""


def summary_rows(comparison: Comparison) -> list[tuple[str, Any, Any]]:
    """Return (what, value, by chance) of the headline numbers; None where there is none."""
    data = comparison.to_dict()
    rows: list[tuple[str, Any, Any]] = []
    for title, key, control in (
        ("decoder cosine", "decoders", "decoder_baseline"),
        ("correlation", "activations", "activation_baseline"),
    ):
        found, chance = data[key], data[control]
        if found is None:
            continue
        rows += [
            (f"{title}: mean best, A to B", found["mean_best_a_to_b"], chance["mean_best_a_to_b"]),
            (f"{title}: mean best, B to A", found["mean_best_b_to_a"], chance["mean_best_b_to_a"]),
            (f"{title}: mean one-to-one", found["mean_matched"], chance["mean_matched"]),
            (f"{title}: one-to-one over 0.7", found["share_matched_over_0.7"], None),
            (f"{title}: one-to-one over 0.9", found["share_matched_over_0.9"], None),
            (f"{title}: mutual best pairs", found["mutual"], None),
        ]
    names = {"either": "correlation where either fires", "jaccard": "Jaccard of supports", "cosine": "decoder cosine"}
    rows += [(f"pairs by activation: {names[name]}", value, None) for name, value in data["pairs"].items()]
    for title, key in (("B from A", "b_from_a"), ("A from B", "a_from_b")):
        if data[key] is not None:
            last = data[key]["path"][-1]
            rows.append((f"{title}: R² of the best single feature", data[key]["best_single_r2_mean"], None))
            rows.append((f"{title}: R² by LASSO, λ {last['lambda']:g}", last["r2_mean"], None))
            rows.append((f"{title}: share that one feature is enough for", data[key]["needed"]["1"], None))
    if data["splitting"] is not None:
        small, large = ("A", "B") if data["splitting"]["small"] == "a" else ("B", "A")
        rows.append((f"features of {small} split in {large}", data["splitting"]["split"], None))
        rows.append((f"novel features of {large}", data["splitting"]["novel"], None))
        rows.append((f"share novel in {large}", data["splitting"]["novel_share"], None))
    if data["clusters"] is not None:
        rows += [(f"clusters: {kind}", data["clusters"][kind]["clusters"], None) for kind in ("pair", "split", "mixed")]
    return rows


def report(comparison: Comparison) -> str:
    """Return the report as one HTML page; Plotly's script is inside it."""
    import plotly.io

    a, b = comparison.a, comparison.b
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(a.name)} and {escape(b.name)}</title><style>{STYLE}</style>",
        "<h1>Two SAEs compared</h1><table><thead><tr><th><th>A<th>B</thead>",
        f"<tr><td>SAE<td>{escape(a.name)}<td>{escape(b.name)}",
        f"<tr><td>features<td>{a.n_features:,}<td>{b.n_features:,}",
        f"<tr><td>never firing<td>{_number(a.dead)}<td>{_number(b.dead)}",
        f"<tr><td>space<td>{escape(a.space)}<td>{escape(b.space)}</table>",
        f"<p class=note>{comparison.n_tokens:,} tokens {'of ' + escape(comparison.text) if comparison.text else ''}, "
        f"seed {comparison.seed}. Features that never vary on them are left out.</p>",
        "<h2>Numbers</h2><table><thead><tr><th><th>value<th>by chance</thead>",
    ]
    for what, value, chance in summary_rows(comparison):
        parts.append(f"<tr><td>{escape(what)}<td>{_number(value)}<td>{'' if chance is None else _number(chance)}")
    parts.append("</table>")
    if comparison.skipped:
        parts.append("<p class=note>Not computed: " + escape("; ".join(comparison.skipped)) + ".</p>")
    script = True
    for name, (figure, _) in comparison.figures().items():
        title, text = TITLES[name]
        parts.append(f"<h2>{title}</h2><p>{text}</p>")
        parts.append(plotly.io.to_html(figure, include_plotlyjs=script, full_html=False, config={"displaylogo": False}))
        script = False
    parts.append(f"<p class=note>saelab {comparison.saelab_version}</p></html>\n")
    return "\n".join(parts)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
