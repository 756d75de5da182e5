"""Figures about SAEs. Each function returns a Plotly figure and the frame of numbers that is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.plotting import BLUE, GREEN, MOST_POINTS, PALETTE, SCALE, SKY, VERMILLION, escape, figure, log_axis

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.analysis.evaluation import Evaluation


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
    points = go.Scattergl(  # thousands of SVG nodes take a browser half a second
        x=frame["x"],
        y=frame["y"],
        mode="markers",
        marker=marker,
        customdata=frame["feature"],
        hovertemplate=f"feature %{{customdata}}<br>{escape(x_title)} %{{x:.4g}}<br>{escape(y_title)} %{{y:.4g}}{shown}"
        "<extra></extra>",
    )
    axes: dict[str, Any] = {
        "xaxis": {"title": x_title, **(log_axis(frame["x"].to_numpy()) if log_x else {})},
        "yaxis": {"title": y_title, **(log_axis(frame["y"].to_numpy()) if log_y else {})},
    }
    if equal:
        axes["yaxis"] |= {"scaleanchor": "x", "scaleratio": 1}
    return figure(points, height=380, clickmode="event+select", **axes), frame.reset_index(drop=True)


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
    return figure(*lines, showlegend=len(lines) > 1, height=240, **axes), frame


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
    return figure(bar, xaxis_title="active features", yaxis_title="tokens"), frame


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
    yaxis = {"title": "next token", **labels, "tickfont": {"family": "monospace"}, "showgrid": False}
    layout = {"xaxis": {"title": "probability of the next token", "tickformat": ".0%"}, "yaxis": yaxis}
    return figure(*bars, height=90 + 30 * len(frame), barmode="group", **layout), frame


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
    return figure(bar, xaxis_title="position", yaxis_title="loss (nats)", height=180), frame


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
    traces = []
    if len(front) > 1:
        traces.append(go.Scatter(x=front["l0"], y=front[y], mode="lines", line=line, name="front", hoverinfo="skip"))
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
    xaxis = {"title": "L0: active features per token", **(log_axis(l0) if wide else {})}
    # around a single point Plotly would draw an axis down to -0.5
    yaxis = {"title": y_title, "rangemode": "nonnegative" if (frame[y] >= 0).all() else "normal"}
    return figure(*traces, height=360, xaxis=xaxis, yaxis=yaxis), frame


def losses(evaluation: "Evaluation") -> "tuple[Figure, pd.DataFrame]":
    """Next-token loss of the model untouched, with the SAE's reconstruction, and with the site ablated."""
    import pandas as pd
    from plotly import graph_objects as go

    names = {"untouched": "ce_clean", "SAE": "ce_sae", "mean ablation": "ce_mean", "zero ablation": "ce_zero"}
    frame = pd.DataFrame({"site": list(names), "loss": [getattr(evaluation, name) for name in names.values()]})
    hover = "%{x}<br>%{y:.3f} nats<extra></extra>"
    bar = go.Bar(x=frame["site"], y=frame["loss"], marker={"color": [GREEN, BLUE, SKY, SKY]}, hovertemplate=hover)
    return figure(
        bar, xaxis_title=f"what stands at {escape(evaluation.site)}", yaxis_title="loss (nats per token)"
    ), frame
