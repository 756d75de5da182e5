"""Histograms of a feature store. Each function returns a Plotly figure and the frame of numbers that is drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.counts import HistogramResult
from saelab.core.plotting import BLUE, ORANGE, figure, log_axis

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


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
    scale = log_axis(result.counts) if log_counts else {}
    return figure(bar, xaxis_title="activation", yaxis={"title": "tokens", **scale}), frame


def logit_histogram(values: np.ndarray, bins: int = 50) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of a feature's logit weights over the vocabulary."""
    counts, edges = np.histogram(np.asarray(values, np.float64), bins)
    result = HistogramResult(edges.astype(np.float64), counts.astype(np.int64), 0, 0)
    bar, frame = _bars(result, BLUE, "%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} vocabulary tokens")
    return figure(bar, xaxis_title="logit weight", yaxis={"title": "vocabulary tokens", **log_axis(counts)}), frame


def density_histogram(density: np.ndarray, bins: int = 50) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of the log10 densities of the features that fire at all."""
    alive = np.log10(np.asarray(density, np.float64)[np.asarray(density) > 0])
    low, high = (float(alive.min()), float(alive.max())) if len(alive) else (-1.0, 0.0)
    counts, edges = np.histogram(alive, bins, (low, max(high, low + 1e-6)))
    result = HistogramResult(edges.astype(np.float64), counts.astype(np.int64), 0, 0)
    bar, frame = _bars(result, BLUE, "10^%{customdata[0]:.2f} to 10^%{customdata[1]:.2f}<br>%{y:,} features")
    return figure(bar, xaxis_title="log10 density (share of tokens)", yaxis_title="features"), frame
