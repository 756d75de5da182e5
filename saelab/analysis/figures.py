"""Figures, all in one look. Each function returns a Plotly figure and the frame of numbers that is drawn.

Colours are Okabe and Ito's, told apart by colour-blind eyes, and Cividis where colour stands for a number. Backgrounds
are transparent and text takes the page's colour, so figures fit light and dark pages. Texts from outside (tokens) are
escaped: Plotly reads a little HTML in its labels.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.counts import HistogramResult

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
"""Colours of categories, in the order they are given out."""
SCALE = "Cividis"
"""Colour scale of numbers."""
MOST_POINTS = 4000
"""Points drawn in a scatter plot; of more, this many are drawn at even distances."""


def escape(text: str) -> str:
    """Escape what Plotly would read as HTML; it knows no entity for quotation marks."""
    return escape_html(text, quote=False)


def _log(values: np.ndarray) -> dict[str, Any]:
    """Settings of a logarithmic axis: ticks at powers of ten, at 2 and 5 too when the values span less than two."""
    positive = values[values > 0]
    wide = len(positive) > 0 and float(positive.max() / positive.min()) > 100
    return {"type": "log", "dtick": 1 if wide else "D2", "exponentformat": "power"}


@lru_cache(maxsize=1)
def template() -> Any:
    """Return the look that all figures share."""
    from plotly import graph_objects as go

    axis = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "automargin": True, "title": {"standoff": 8}}
    layout = go.Layout(
        colorway=list(PALETTE),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        margin={"l": 8, "r": 8, "t": 12, "b": 8},
        bargap=0.04,
        hoverlabel={"font": {"family": "monospace"}},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        xaxis=axis,
        yaxis=axis,
        modebar={"remove": ["lasso", "select", "autoscale", "zoomin", "zoomout"]},
    )
    return go.layout.Template(layout=layout)


def _figure(*traces: Any, **layout: Any) -> "Figure":
    from plotly import graph_objects as go

    return go.Figure(list(traces), {"template": template(), "height": 260, **layout})


def _bars(result: HistogramResult, colour: str, hover: str, logarithmic: bool = False) -> tuple[Any, "pd.DataFrame"]:
    import pandas as pd
    from plotly import graph_objects as go

    low, high = result.edges[:-1], result.edges[1:]
    frame = pd.DataFrame({"low": low, "high": high, "count": result.counts})
    bar = go.Bar(
        x=np.sqrt(low * high) if logarithmic else (low + high) / 2,
        y=result.counts,
        width=high - low,
        customdata=np.stack([low, high], 1),
        marker={"color": colour, "line": {"width": 0}},
        hovertemplate=hover + "<extra></extra>",
    )
    return bar, frame


def activation_histogram(result: HistogramResult, log_counts: bool = False) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of a feature's nonzero activations."""
    bar, frame = _bars(result, ORANGE, "%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} tokens")
    scale = _log(result.counts) if log_counts else {}
    return _figure(bar, xaxis_title="activation", yaxis={"title": "tokens", **scale}), frame


def logit_histogram(values: np.ndarray, bins: int = 50) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of a feature's logit weights over the vocabulary."""
    counts, edges = np.histogram(np.asarray(values, np.float64), bins)
    result = HistogramResult(edges.astype(np.float64), counts.astype(np.int64), 0, 0)
    bar, frame = _bars(result, BLUE, "%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} vocabulary tokens")
    return _figure(bar, xaxis_title="logit weight", yaxis={"title": "vocabulary tokens", **_log(counts)}), frame


def density_histogram(density: np.ndarray, bins: int = 50) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of the log10 densities of the features that fire at all."""
    alive = np.log10(np.asarray(density, np.float64)[np.asarray(density) > 0])
    low, high = (float(alive.min()), float(alive.max())) if len(alive) else (-1.0, 0.0)
    counts, edges = np.histogram(alive, bins, (low, max(high, low + 1e-6)))
    result = HistogramResult(edges.astype(np.float64), counts.astype(np.int64), 0, 0)
    bar, frame = _bars(result, BLUE, "10^%{customdata[0]:.2f} to 10^%{customdata[1]:.2f}<br>%{y:,} features")
    return _figure(bar, xaxis_title="log10 density (share of tokens)", yaxis_title="features"), frame


def feature_scatter(
    x: np.ndarray,
    y: np.ndarray,
    *,
    x_title: str,
    y_title: str,
    colour: np.ndarray | None = None,
    colour_title: str = "",
    features: np.ndarray | None = None,
    log_x: bool = False,
    log_y: bool = False,
    equal: bool = False,
) -> "tuple[Figure, pd.DataFrame]":
    """Scatter plot of features; points carry the feature's number. At most ``MOST_POINTS``, at even distances.

    On a logarithmic axis only features with a positive value are drawn. ``equal`` gives both axes the same scale.
    """
    import pandas as pd
    from plotly import graph_objects as go

    frame = pd.DataFrame({"x": np.asarray(x, np.float64), "y": np.asarray(y, np.float64)})
    frame.insert(0, "feature", np.arange(len(x)) if features is None else features)
    frame["colour"] = 0.0 if colour is None else np.asarray(colour, np.float64)
    across, up = frame["x"].to_numpy(), frame["y"].to_numpy()
    drawn = np.isfinite(across) & np.isfinite(up)
    if log_x:
        drawn &= across > 0
    if log_y:
        drawn &= up > 0
    frame = frame.loc[drawn]
    if len(frame) > MOST_POINTS:
        frame = frame.iloc[np.linspace(0, len(frame) - 1, MOST_POINTS).astype(np.int64)]
    marker: dict[str, Any] = {"size": 5, "opacity": 0.75, "color": BLUE}
    if colour is not None:
        bar = {"title": {"text": escape(colour_title), "side": "right"}, "thickness": 10, "outlinewidth": 0}
        marker |= {"color": frame["colour"], "colorscale": SCALE, "colorbar": bar}
    shown = f"<br>{escape(colour_title)} %{{marker.color:.4g}}" if colour is not None else ""
    points = go.Scatter(
        x=frame["x"],
        y=frame["y"],
        mode="markers",
        marker=marker,
        customdata=frame["feature"],
        hovertemplate=f"feature %{{customdata}}<br>{escape(x_title)} %{{x:.4g}}<br>{escape(y_title)} %{{y:.4g}}{shown}"
        "<extra></extra>",
    )
    axes: dict[str, Any] = {
        "xaxis": {"title": x_title, **(_log(frame["x"].to_numpy()) if log_x else {})},
        "yaxis": {"title": y_title, **(_log(frame["y"].to_numpy()) if log_y else {})},
    }
    if equal:
        axes["yaxis"] |= {"scaleanchor": "x", "scaleratio": 1}
    return _figure(points, height=380, clickmode="event+select", **axes), frame.reset_index(drop=True)


def training_curves(logs: "Mapping[str, pd.DataFrame]", metric: str, title: str) -> "tuple[Figure, pd.DataFrame]":
    """One metric of several training runs against the tokens trained on. ``logs`` are frames of ``training.jsonl``."""
    import pandas as pd
    from plotly import graph_objects as go

    parts, lines = [], []
    for k, (name, log) in enumerate(logs.items()):
        if metric not in log or not len(log):
            continue
        parts.append(pd.DataFrame({"run": name, "tokens": log["tokens"], metric: log[metric]}))
        lines.append(
            go.Scatter(
                x=log["tokens"],
                y=log[metric],
                name=escape(name),
                mode="lines+markers" if len(log) < 30 else "lines",
                line={"color": PALETTE[k % len(PALETTE)], "width": 2},
                hovertemplate=f"{escape(name)}<br>%{{x:,}} tokens<br>{escape(title)} %{{y:.4g}}<extra></extra>",
            )
        )
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run": [], "tokens": [], metric: []})
    axes = {"xaxis": {"title": "tokens", "rangemode": "tozero"}, "yaxis": {"title": title, "rangemode": "tozero"}}
    return _figure(*lines, showlegend=len(lines) > 1, height=240, **axes), frame


def counts_per_token(counts: Sequence[int]) -> "tuple[Figure, pd.DataFrame]":
    """Bar for each number of active features: on how many tokens that many were active."""
    import pandas as pd
    from plotly import graph_objects as go

    frame = pd.DataFrame({"active": range(len(counts)), "tokens": list(counts)})
    shown = frame[frame["tokens"] > 0]
    bar = go.Bar(
        x=shown["active"],
        y=shown["tokens"],
        marker={"color": GREEN},
        hovertemplate="%{x} active<br>%{y:,} tokens<extra></extra>",
    )
    return _figure(bar, xaxis_title="active features", yaxis_title="tokens"), frame


def probability_changes(effect: "pd.DataFrame", texts: Sequence[str], n: int = 12) -> "tuple[Figure, pd.DataFrame]":
    """Next-token probabilities before and after steering, for the n tokens whose probability changes most.

    ``effect`` is what :func:`saelab.analysis.steering.next_token_effect` returns; ``texts`` its first n tokens as text.
    """
    from plotly import graph_objects as go

    frame = effect.head(n).assign(text=list(texts)[:n]).sort_values("change", kind="stable").reset_index(drop=True)
    places = list(range(len(frame)))
    bars = [
        go.Bar(
            y=places,
            x=frame[name],
            orientation="h",
            name=name,
            marker={"color": colour},
            hovertemplate=name + " %{x:.2%}<extra></extra>",
        )
        for name, colour in (("default", SKY), ("steered", VERMILLION))
    ]
    labels = {"tickmode": "array", "tickvals": places, "ticktext": [escape(text) for text in frame["text"]]}
    yaxis = {**labels, "tickfont": {"family": "monospace"}, "showgrid": False}
    layout = {"xaxis": {"title": "probability of the next token", "tickformat": ".0%"}, "yaxis": yaxis}
    return _figure(*bars, height=90 + 30 * len(frame), barmode="group", **layout), frame


def prompt_loss(loss: np.ndarray, texts: Sequence[str]) -> "tuple[Figure, pd.DataFrame]":
    """Loss of each token of a prompt, in nats."""
    import pandas as pd
    from plotly import graph_objects as go

    frame = pd.DataFrame({"position": range(len(loss)), "token": list(texts), "loss": loss})
    bar = go.Bar(
        x=frame["position"],
        y=frame["loss"],
        customdata=[escape(text) for text in texts],
        marker={"color": SKY},
        hovertemplate="%{x}: %{customdata}<br>%{y:.3f} nats<extra></extra>",
    )
    return _figure(bar, xaxis_title="position", yaxis_title="loss (nats)", height=180), frame


def pareto(frame: "pd.DataFrame", y: str, y_title: str, *, low_is_good: bool = True) -> "tuple[Figure, pd.DataFrame]":
    """Evaluations as points of ``l0`` and ``y``, one colour per ``architecture``, their front as a line.

    ``frame`` has columns ``name``, ``architecture``, ``d_sae``, ``l0`` and ``y``. On the front is what no other beats:
    no evaluation has both a smaller L0 and a better ``y``. L0 is drawn logarithmically when it spans more than ten
    times. Returns the frame with a column ``front``.
    """
    from plotly import graph_objects as go

    frame = frame.sort_values(["l0", y], ascending=[True, low_is_good], kind="stable").reset_index(drop=True)
    values = frame[y].to_numpy(np.float64) * (1 if low_is_good else -1)
    best = np.concatenate([[np.inf], np.fmin.accumulate(values)[:-1]]) if len(frame) else np.zeros(0)
    frame["front"] = values < best
    front = frame[frame["front"]]
    line = {"color": "rgba(128,128,128,0.7)", "width": 1.5, "dash": "dot"}
    traces = [go.Scatter(x=front["l0"], y=front[y], mode="lines", line=line, name="front", hoverinfo="skip")]
    for k, (name, part) in enumerate(frame.groupby("architecture", sort=True)):
        traces.append(
            go.Scatter(
                x=part["l0"],
                y=part[y],
                mode="markers",
                name=escape(str(name)),
                marker={"size": 10, "color": PALETTE[k % len(PALETTE)]},
                customdata=[[escape(str(n)), d] for n, d in zip(part["name"], part["d_sae"], strict=True)],
                hovertemplate=f"%{{customdata[0]}}<br>%{{customdata[1]:,}} features<br>L0 %{{x:.4g}}<br>"
                f"{escape(y_title)} %{{y:.4g}}<extra></extra>",
            )
        )
    l0 = frame["l0"].to_numpy(np.float64)
    wide = len(l0) > 0 and l0.min() > 0 and l0.max() / l0.min() > 10
    xaxis = {"title": "L0: active features per token", **(_log(l0) if wide else {})}
    return _figure(*traces, height=360, xaxis=xaxis, yaxis={"title": y_title}), frame
