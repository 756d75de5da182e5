"""Figures of activation sparsity; each comes with the frame of numbers that is drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saelab.analysis.lazy_neurons import SHARES, LayerSparsity, LazyNeurons
from saelab.core.plotting import BLUE, ORANGE, PALETTE, escape, figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GREY = "#8a8a8a"
Drawn = tuple["Figure", pd.DataFrame]


def figures(result: LazyNeurons) -> dict[str, Drawn]:
    """Return every figure for which there are numbers."""
    drawn = {"layers": _layers(result), "energy": _energy(result), "rates": _rates(result)}
    if result.curve:
        drawn["curve"] = _curve(result)
    if result.comparison is not None:
        drawn["comparison"] = _comparison(result)
    return drawn


def _parts(result: LazyNeurons) -> list[LayerSparsity]:
    return [*result.layers, *([result.code] if result.code else [])]


def _label(part: LayerSparsity) -> str:
    return f"layer {part.layer}" if part.name.startswith("blocks.") else f"SAE ({escape(part.name)})"


def _layers(result: LazyNeurons) -> Drawn:
    from plotly import graph_objects as go

    frame = result.to_frame()
    names = [_label(part) for part in _parts(result)]
    effective = frame["effective"] / frame["width"]
    columns = (("h > 0", frame["positive"]), ("|h| over threshold", frame["above"]), ("participation ratio", effective))
    bars = [
        go.Bar(x=names, y=values, name=name, marker={"color": PALETTE[k]}) for k, (name, values) in enumerate(columns)
    ]
    axis = {"title": "share of the units", "tickformat": ".0%"}
    return _figure(bars, barmode="group", xaxis_title="layer", yaxis=axis), frame


def _energy(result: LazyNeurons) -> Drawn:
    from plotly import graph_objects as go

    rows = [
        {"part": _label(part), "share": share, "energy": value}
        for part in _parts(result)
        for share, value in zip(SHARES, part.energy, strict=True)
    ]
    frame = pd.DataFrame(rows)
    lines = [
        go.Scatter(x=some["share"], y=some["energy"], name=str(name), mode="lines+markers")
        for name, some in frame.groupby("part", sort=False)
    ]
    axes = {
        "xaxis": {"title": "strongest share of the units", "type": "log", "tickformat": ".0%"},
        "yaxis": {"title": "share of ||h||^2", "tickformat": ".0%", "range": [0, 1.02]},
    }
    return _figure(lines, **axes), frame


def _rates(result: LazyNeurons) -> Drawn:
    from plotly import graph_objects as go

    lines, rows = [], []
    for part in _parts(result):
        places = np.unique(np.geomspace(1, part.width, 200).astype(np.int64)) - 1
        rates = np.asarray(part.rates)[places]
        rows += [{"part": _label(part), "rank": int(p) + 1, "rate": r} for p, r in zip(places, rates, strict=True)]
        lines.append(go.Scatter(x=(places + 1) / part.width, y=rates, name=_label(part), mode="lines"))
    axes = {
        "xaxis": {"title": "units, by falling rate (share)", "type": "log"},
        "yaxis": {"title": "share of tokens", "tickformat": ".0%"},
    }
    return _figure(lines, **axes), pd.DataFrame(rows)


def _curve(result: LazyNeurons) -> Drawn:
    from plotly import graph_objects as go

    frame = pd.DataFrame([vars(point) for point in result.curve])
    lines = [
        go.Scatter(x=frame["share"], y=frame["ce"], name="strongest", mode="lines+markers", line={"color": BLUE}),
        go.Scatter(x=frame["share"], y=frame["ce_random"], name="random", mode="lines+markers", line={"color": GREY}),
    ]
    axis = {"title": "neurons kept in every layer", "type": "log", "tickformat": ".0%"}
    return _figure(lines, xaxis=axis, yaxis_title="cross-entropy (nats)"), frame


def _comparison(result: LazyNeurons) -> Drawn:
    from plotly import graph_objects as go

    c = result.comparison
    assert c is not None
    frame = pd.DataFrame([vars(point) for point in c.points])
    levels = (("clean", c.ce_clean), ("no neurons", c.ce_ablated))
    traces: list[Any] = [
        go.Scatter(x=frame["k"], y=frame["ce"], name="strongest neurons", mode="lines+markers", line={"color": BLUE}),
        go.Scatter(
            x=frame["k"], y=frame["ce_random"], name="random neurons", mode="lines+markers", line={"color": GREY}
        ),
        go.Scatter(x=[c.l0], y=[c.ce_sae], name="SAE", mode="markers", marker={"color": ORANGE, "size": 12}),
    ]
    ends = [min(float(frame["k"].min()), c.l0), float(frame["k"].max())]
    traces += [
        go.Scatter(x=ends, y=[value] * 2, name=name, mode="lines", line={"dash": "dot", "color": GREY})
        for name, value in levels
    ]
    axis = {"title": "units per token", "type": "log"}
    return _figure(traces, xaxis=axis, yaxis_title="cross-entropy (nats)"), frame


def _figure(traces: list[Any], **layout: Any) -> "Figure":
    return figure(*traces, **{"height": 320, **layout})
