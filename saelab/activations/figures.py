"""What the activations of a store look like. Returns a Plotly figure and the frame of numbers that is drawn."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from saelab.core.plotting import PALETTE, escape, figure

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.activations.store import ActivationStore

SAMPLE = 10_000
"""Rows looked at, at even distances."""


def norm_histogram(store: "ActivationStore", bins: int = 60) -> "tuple[Figure, pd.DataFrame]":
    """Histogram of ``||x||`` at each site, over a sample of rows; outliers and dead sites show here first."""
    import pandas as pd
    from plotly import graph_objects as go

    rows = torch.from_numpy(np.linspace(0, store.n_rows - 1, min(SAMPLE, store.n_rows)).astype(np.int64))
    norms = {site: store.read_rows(site, rows).float().norm(dim=1).numpy() for site in store.sites}
    highest = max(float(v.max()) for v in norms.values())
    edges = np.linspace(0, highest * (1 + 1e-6) or 1.0, bins + 1)
    lines, parts = [], []
    for k, (site, values) in enumerate(norms.items()):
        share = np.histogram(values, edges)[0] / len(values)
        parts.append(pd.DataFrame({"site": site, "low": edges[:-1], "high": edges[1:], "share": share}))
        line = {"shape": "hvh", "color": PALETTE[k % len(PALETTE)]}
        lines.append(go.Scatter(x=(edges[:-1] + edges[1:]) / 2, y=share, name=escape(site), mode="lines", line=line))
    axes = {
        "xaxis": {"title": "||x||, norm of the activation"},
        "yaxis": {"title": "share of tokens", "tickformat": ".1%"},
    }
    return figure(*lines, showlegend=True, height=320, **axes), pd.concat(parts, ignore_index=True)
