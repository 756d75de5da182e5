"""The look that every figure shares: the Plotly template, the colours, and how texts and axes are written.

A figure function returns the figure and the frame of the numbers that it draws; axes name their units. Colours are
Okabe and Ito's, told apart by colour-blind eyes, and Cividis where colour stands for a number. Backgrounds are
transparent and text takes the page's colour, so figures fit light and dark pages. Texts from outside (tokens) are
escaped: Plotly reads a little HTML in its labels.
"""

from functools import lru_cache
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

import numpy as np

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

if TYPE_CHECKING:
    Drawn = tuple[Figure, pd.DataFrame]
    """A figure and the frame behind it."""


def escape(text: str) -> str:
    """Escape what Plotly would read as HTML; it knows no entity for quotation marks."""
    return escape_html(text, quote=False)


def log_axis(values: np.ndarray) -> dict[str, Any]:
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


def figure(*traces: Any, **layout: Any) -> "Figure":
    """Return a figure of some traces in the shared look."""
    from plotly import graph_objects as go

    return go.Figure(list(traces), {"template": template(), "height": 260, **layout})
