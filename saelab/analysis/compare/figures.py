"""Figures of a comparison. Each comes with the frame of numbers it draws."""

from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.compare.result import Comparison
from saelab.core.plotting import BLUE, GREEN, MOST_POINTS, ORANGE, SKY, VERMILLION, figure

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    Drawn = tuple[Figure, pd.DataFrame]


def figures(comparison: Comparison) -> "dict[str, Drawn]":
    """All figures for which there are numbers."""
    drawn: dict[str, Drawn] = {"matching": matching_curves(comparison)}
    if "cosine" in comparison.pairs:
        drawn["cosine_and_correlation"] = cosine_and_correlation(comparison)
    if comparison.b_from_a is not None or comparison.a_from_b is not None:
        drawn["one_to_many"] = one_to_many_curves(comparison)
    if comparison.clusters is not None:
        drawn["clusters"] = cluster_bars(comparison)
    if comparison.splitting is not None:
        drawn["novel"] = novel_histogram(comparison)
    return drawn


def matching_curves(comparison: Comparison) -> "Drawn":
    """Similarity of each feature of A with its partner, sorted: best in B, one-to-one, and the mean by chance."""
    import pandas as pd
    from plotly import graph_objects as go

    lines, parts = [], []
    sources = (
        ("cosine", comparison.decoders, comparison.decoder_baseline, BLUE, SKY),
        ("correlation", comparison.activations, comparison.activation_baseline, VERMILLION, ORANGE),
    )
    for name, found, baseline, dark, light in sources:
        if found is None or baseline is None:
            continue
        curves = ((f"{name}, one-to-one", found.pair_value, dark), (f"{name}, best", found.best_b_value, light))
        for title, values, colour in curves:
            ordered = np.sort(values[np.isfinite(values)])[::-1]
            rank = _thin(len(ordered))
            share = (rank + 1) / max(len(ordered), 1)
            parts.append(pd.DataFrame({"curve": title, "rank": rank, "similarity": ordered[rank]}))
            hover = f"{title}<br>%{{y:.3f}} at %{{x:.1%}}<extra></extra>"
            line = {"color": colour, "width": 2}
            lines.append(go.Scatter(x=share, y=ordered[rank], name=title, line=line, hovertemplate=hover))
        chance = baseline.mean_best_a_to_b
        parts.append(pd.DataFrame({"curve": [f"{name}, best by chance"], "rank": [0], "similarity": [chance]}))
        hover = f"{baseline.what}: mean best {chance:.3f}<extra></extra>"
        line = {"color": dark, "width": 1, "dash": "dot"}
        lines.append(go.Scatter(x=[0, 1], y=[chance, chance], name=f"{name}, chance", line=line, hovertemplate=hover))
    axes = {"xaxis": {"title": "share of features", "tickformat": ".0%"}, "yaxis": {"title": "similarity"}}
    return _figure(lines, height=380, **axes), pd.concat(parts, ignore_index=True)


def cosine_and_correlation(comparison: Comparison) -> "Drawn":
    """Each pair matched by activation: correlation of activations against cosine of decoder rows."""
    from saelab.analysis.figures import feature_scatter

    assert comparison.activations is not None
    return feature_scatter(
        comparison.pairs["cosine"],
        comparison.activations.pair_value,
        x_title="decoder cosine",
        y_title="correlation of activations",
        features=comparison.activations.pair_a,
    )


def one_to_many_curves(comparison: Comparison) -> "Drawn":
    """LASSO: share of variance predicted against the number of predictors, both ways, and the best single one."""
    import pandas as pd
    from plotly import graph_objects as go

    lines, parts = [], []
    for title, found, colour in (("B from A", comparison.b_from_a, BLUE), ("A from B", comparison.a_from_b, ORANGE)):
        if found is None:
            continue
        x, y = found.nonzero.mean(0), found.r2.mean(0)
        single = float(found.best_single.mean())
        parts.append(pd.DataFrame({"direction": title, "lambda": found.lambdas, "nonzero": x, "r2": y}))
        hover = "λ %{customdata}<br>%{x:.1f} predictors<br>R² %{y:.3f}<extra></extra>"
        line = {"color": colour, "width": 2}
        lines.append(
            go.Scatter(
                x=x, y=y, customdata=found.lambdas, name=title, line=line, mode="lines+markers", hovertemplate=hover
            )
        )
        hover = f"best single predictor: R² {single:.3f}<extra></extra>"
        line = {"color": colour, "width": 1, "dash": "dot"}
        ends = [0.0, float(max(x.max(), 1))]
        lines.append(go.Scatter(x=ends, y=[single] * 2, name=f"{title}, best single", line=line, hovertemplate=hover))
    axes = {"xaxis": {"title": "predictors used (mean)"}, "yaxis": {"title": "R² (mean)", "rangemode": "tozero"}}
    return _figure(lines, height=340, **axes), pd.concat(parts, ignore_index=True)


def cluster_bars(comparison: Comparison) -> "Drawn":
    """Features of A and of B in clusters of each kind."""
    import pandas as pd
    from plotly import graph_objects as go

    assert comparison.clusters is not None
    kinds = ("pair", "split", "mixed", "alone")
    rows = []
    for kind in kinds:
        chosen = [cluster for cluster in comparison.clusters if cluster.kind == kind]
        sums = {"a": sum(len(c.a) for c in chosen), "b": sum(len(c.b) for c in chosen)}
        rows.append({"kind": kind, "clusters": len(chosen), **sums})
    frame = pd.DataFrame(rows)
    labels = ["pairs (1+1)", "splits (1+n)", "mixed (n+m)", "alone"]
    bars = [
        go.Bar(
            x=labels,
            y=frame[side],
            name=f"features of {side.upper()}",
            marker={"color": colour},
            customdata=frame["clusters"],
            hovertemplate="%{y:,} features in %{customdata:,} clusters<extra></extra>",
        )
        for side, colour in (("a", BLUE), ("b", ORANGE))
    ]
    return _figure(
        bars, height=300, barmode="group", bargap=0.2, xaxis={"title": "kind of cluster"}, yaxis={"title": "features"}
    ), frame


def novel_histogram(comparison: Comparison) -> "Drawn":
    """Largest decoder cosine of each feature of the larger SAE with the smaller one; novel ones left of the line."""
    import pandas as pd
    from plotly import graph_objects as go

    assert comparison.splitting is not None
    values = comparison.splitting.largest_cosine
    counts, edges = np.histogram(values[np.isfinite(values)], 50, (-0.05, 1.0))
    frame = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "features": counts})
    hover = "%{x:.2f}: %{y:,} features<extra></extra>"
    bar = go.Bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, marker={"color": GREEN}, hovertemplate=hover)
    axes = {"xaxis": {"title": "largest decoder cosine with the smaller SAE"}, "yaxis": {"title": "features"}}
    drawn = _figure([bar], height=280, **axes)
    drawn.add_vline(x=comparison.splitting.threshold, line={"color": VERMILLION, "dash": "dot"})
    return drawn, frame


def _thin(n: int) -> np.ndarray:
    """Ranks to draw of n sorted values."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, MOST_POINTS)).astype(np.int64))


def _figure(traces: list[Any], **layout: Any) -> "Figure":
    return figure(*traces, **layout)
