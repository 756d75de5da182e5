"""Figures of the dark-matter report; each comes with the frame of numbers that is drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saelab.analysis.dark_matter.result import DarkMatter
from saelab.core.plotting import BLUE, GREEN, MOST_POINTS, ORANGE, PALETTE, SCALE, SKY, VERMILLION, escape, figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GREY = "#8a8a8a"
"""Controls are grey in every figure."""
Drawn = tuple["Figure", pd.DataFrame]


def figures(result: DarkMatter) -> dict[str, Drawn]:
    """Return every figure for which there are numbers."""
    drawn: dict[str, Drawn] = {
        "fvu": fvu_split(result),
        "vector": vector_r2(result),
        "norms": norm_r2(result),
        "baselines": baselines(result),
    }
    if result.scaling is not None:
        drawn["scaling"] = scaling(result)
    if result.token_scaling:
        drawn["token_scaling"] = token_scaling(result)
        drawn["tokens"] = token_scatter(result)
    if result.introduced is not None:
        drawn["introduced"] = introduced(result)
    if result.downstream is not None:
        drawn["downstream"] = downstream(result)
    if result.pursuit:
        drawn["pursuit"] = pursuit(result)
    if result.earlier:
        drawn["earlier"] = earlier(result)
    if result.error_saes:
        drawn["error_saes"] = error_saes(result)
    return drawn


def fvu_split(result: DarkMatter) -> Drawn:
    """FVU of each SAE as linear and nonlinear part, with the interval of the whole."""
    from plotly import graph_objects as go

    frame = result.to_frame()
    names = _names(frame["name"])
    whole = [d.fvu_interval for d in result.decompositions]
    bars = [
        go.Bar(x=names, y=frame["fvu_nonlinear"], name="nonlinear", marker={"color": VERMILLION}),
        go.Bar(
            x=names,
            y=frame["fvu_linear"],
            name="linear",
            marker={"color": SKY},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - d.fvu for (_, high), d in zip(whole, result.decompositions, strict=True)],
                "arrayminus": [d.fvu - low for (low, _), d in zip(whole, result.decompositions, strict=True)],
            },
        ),
    ]
    return _figure(bars, barmode="stack", xaxis_title="SAE", yaxis_title="FVU"), frame


def vector_r2(result: DarkMatter) -> Drawn:
    """R2 of the error vector by every definition, with the shrinkage and shuffled controls."""
    columns = {
        "r2": ("pooled", BLUE),
        "r2_per_dimension": ("mean over dimensions", SKY),
        "r2_no_intercept": ("no intercept", GREEN),
        "r2_rescaled": ("after rescaling x_hat", ORANGE),
        "r2_shuffled": ("shuffled", GREY),
    }
    frame = result.to_frame()
    return _grouped(frame, columns, _names(frame["name"]), "SAE", "R2 of the error vector"), frame


def norm_r2(result: DarkMatter) -> Drawn:
    """R2 of squared norms on the activation: all SAEs as points, their distribution as a violin when there are five."""
    from plotly import graph_objects as go

    keys = {
        "error": "error",
        "reconstruction": "x_hat",
        "reconstruction_plus_linear": "x_hat + l",
        "linear": "l",
        "nonlinear": "eta",
    }
    rows = [
        {"norm": label, "sae": d.name, "r2": d.norm_r2[key], "shuffled": d.norm_r2_shuffled[key]}
        for key, label in keys.items()
        for d in result.decompositions
    ]
    frame = pd.DataFrame(rows)
    many = len(result.decompositions) >= 5
    traces = []
    for k, (label, part) in enumerate(frame.groupby("norm", sort=False)):
        shape: dict[str, Any] = {"x": part["norm"], "y": part["r2"], "text": _names(part["sae"]), "showlegend": False}
        colour = PALETTE[k % len(PALETTE)]
        trace = (
            go.Violin(points="all", pointpos=0, line={"color": colour}, name=str(label), **shape)
            if many
            else go.Scatter(mode="markers", marker={"color": colour, "size": 9}, **shape)
        )
        traces.append(trace)
    shuffled = {"x": frame["norm"], "y": frame["shuffled"], "mode": "markers", "name": "shuffled"}
    traces.append(go.Scatter(marker={"color": GREY, "symbol": "x"}, **shuffled))
    return _figure(traces, xaxis_title="squared norm of", yaxis_title="R2 on the activation", height=320), frame


def baselines(result: DarkMatter) -> Drawn:
    """R2 of ||e||^2: the full probe against single predictors."""
    from plotly import graph_objects as go

    d = result.decomposition
    names = {
        "x_norm": "||x||",
        "x_norm_squared": "||x||^2",
        "token": "token identity",
        "l0": "L0",
        "loss": "loss at the token",
        "surprisal": "surprisal of the token",
    }
    rows = [{"predictor": "activation", "r2": d.norm_r2["error"]}]
    rows += [{"predictor": names.get(k, k), "r2": v} for k, v in d.baselines.items()]
    rows.append({"predictor": "shuffled", "r2": d.norm_r2_shuffled["error"]})
    frame = pd.DataFrame(rows)
    colours = [GREY if p == "shuffled" else BLUE if p == "activation" else SKY for p in frame["predictor"]]
    bar = go.Bar(x=frame["predictor"], y=frame["r2"], marker={"color": colours})
    return _figure([bar], xaxis_title="predictor", yaxis_title="R2 of ||e||^2"), frame


def scaling(result: DarkMatter) -> Drawn:
    """The scaling law, its floor with its interval, and the nonlinear part against a constant."""
    from plotly import graph_objects as go

    s = result.scaling
    assert s is not None
    frame = pd.DataFrame({"width": s.widths, "fvu": s.fvu, "fvu_nonlinear": s.fvu_nonlinear, "l0": s.l0})
    grid = np.geomspace(s.widths[0], s.widths[-1] * 16, 100)
    ends = [float(grid[0]), float(grid[-1])]
    band = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    traces = [
        go.Scatter(x=ends, y=[s.c_interval[0]] * 2, **band),
        go.Scatter(x=ends, y=[s.c_interval[1]] * 2, fill="tonexty", fillcolor="rgba(0,114,178,0.15)", **band),
        go.Scatter(x=grid, y=s.c + s.a * grid**-s.b, name="c + a width^-b", line={"color": BLUE, "dash": "dot"}),
        go.Scatter(x=s.widths, y=s.fvu, mode="markers", name="FVU", marker={"color": BLUE, "size": 9}),
        go.Scatter(
            x=s.widths, y=s.fvu_nonlinear, mode="markers", name="nonlinear", marker={"color": VERMILLION, "size": 9}
        ),
        go.Scatter(
            x=ends, y=[s.nonlinear] * 2, name="its mean", mode="lines", line={"color": VERMILLION, "dash": "dot"}
        ),
    ]
    axes = {"xaxis": {"title": "width (features)", "type": "log"}, "yaxis": {"title": "FVU", "rangemode": "tozero"}}
    return _figure(traces, height=340, **axes), frame


def token_scaling(result: DarkMatter) -> Drawn:
    """R2 of ||e|| of the SAE in the row on that of the SAE in the column."""
    from plotly import graph_objects as go

    frame = pd.DataFrame([vars(t) for t in result.token_scaling])
    names = [d.name for d in result.decompositions]
    grid = frame.pivot_table(index="larger", columns="smaller", values="r2").reindex(index=names, columns=names)
    heat = go.Heatmap(
        z=grid.to_numpy(),
        x=_names(names),
        y=_names(names),
        colorscale=SCALE,
        zmin=0,
        zmax=1,
        texttemplate="%{z:.2f}",
        hovertemplate="%{y} from %{x}: R2 %{z:.3f}<extra></extra>",
    )
    return _figure([heat], xaxis_title="predicted from", yaxis_title="error norm of", height=360), frame


def token_scatter(result: DarkMatter) -> Drawn:
    """Error norms of the smallest and the largest SAE, token by token."""
    from plotly import graph_objects as go

    first, last = result.decompositions[0].name, result.decompositions[-1].name
    test = np.flatnonzero(result.tokens["fit"] == 0)
    some = test[np.linspace(0, len(test) - 1, min(MOST_POINTS, len(test))).astype(np.int64)]
    frame = pd.DataFrame({name: np.sqrt(result.tokens[f"{name}/total"][some]) for name in (first, last)})
    points = go.Scattergl(
        x=frame[first], y=frame[last], mode="markers", marker={"size": 3, "opacity": 0.4, "color": BLUE}
    )
    titles = {"xaxis_title": f"||e|| of {escape(first)}", "yaxis_title": f"||e|| of {escape(last)}"}
    return _figure([points], height=380, **titles), frame


def introduced(result: DarkMatter) -> Drawn:
    """Estimated against true energies of the synthetic model."""
    from plotly import graph_objects as go

    assert result.introduced is not None
    frame = result.introduced.to_frame()
    pairs = (
        ("true_absent", "linear", SKY, "linear / absent + noise"),
        ("true_introduced", "nonlinear", VERMILLION, ""),
    )
    traces = [
        go.Scatter(
            x=frame[true],
            y=frame[estimate],
            mode="markers",
            name=name or "nonlinear / introduced",
            marker={"color": colour, "size": 7},
        )
        for true, estimate, colour, name in pairs
    ]
    top = float(frame[["true_absent", "true_introduced"]].to_numpy().max())
    traces.append(go.Scatter(x=[0, top], y=[0, top], mode="lines", name="equal", line={"color": GREY, "dash": "dot"}))
    return _figure(traces, xaxis_title="true share of the variance", yaxis_title="estimated", height=340), frame


def downstream(result: DarkMatter) -> Drawn:
    """Cross-entropy above the clean model's, for each variant."""
    from plotly import graph_objects as go

    assert result.downstream is not None
    frame = result.downstream.to_frame()
    names = {
        "sae": "x_hat",
        "sae+linear": "x_hat + l",
        "sae+nonlinear": "x_hat + eta",
        "random_error": "x + random, norm of e",
        "random_nonlinear": "x + random, norm of eta",
        "random_linear": "x + random, norm of l",
    }
    shown = frame[frame["variant"] != "clean"]
    colours = [GREY if "random" in v else BLUE for v in shown["variant"]]
    clean = result.downstream.ce["clean"]
    bar = go.Bar(x=[names[v] for v in shown["variant"]], y=shown["ce"] - clean, marker={"color": colours})
    return _figure(
        [bar], xaxis_title="what stands at the site", yaxis_title="cross-entropy above clean (nats)", height=300
    ), frame


def pursuit(result: DarkMatter) -> Drawn:
    """FVU by coding method, with the tokens per second of each."""
    frame = result.frames()["pursuit"]
    names = [f"{m}<br>{s:,.0f} tokens/s" for m, s in zip(frame["method"], frame["tokens_per_second"], strict=True)]
    columns = {"fvu": ("FVU", BLUE), "fvu_nonlinear": ("nonlinear", VERMILLION)}
    return _grouped(frame, columns, names, "coded by", "FVU"), frame


def earlier(result: DarkMatter) -> Drawn:
    """R2 of the parts of the error from reconstructions at other sites."""
    frame = result.frames()["earlier"]
    columns = {
        "error": ("e", BLUE),
        "linear": ("l", SKY),
        "nonlinear": ("eta", VERMILLION),
        "shuffled": ("e, shuffled", GREY),
    }
    return _grouped(frame, columns, _names(frame["predictors"]), "predicted from", "R2"), frame


def error_saes(result: DarkMatter) -> Drawn:
    """FVU of SAEs trained on each part, beside their Gaussian twins."""
    frame = result.frames()["error_saes"]
    columns = {"fvu": ("SAE", BLUE), "fvu_gaussian": ("Gaussian of the same covariance", GREY)}
    return _grouped(frame, columns, _names(frame["part"]), "part of the error", "FVU"), frame


def _grouped(
    frame: pd.DataFrame, columns: dict[str, tuple[str, str]], names: list[str], x_title: str, y_title: str
) -> "Figure":
    from plotly import graph_objects as go

    bars = [
        go.Bar(x=names, y=frame[column], name=label, marker={"color": colour})
        for column, (label, colour) in columns.items()
    ]
    return _figure(bars, barmode="group", xaxis_title=x_title, yaxis_title=y_title, height=300)


def _figure(traces: list[Any], **layout: Any) -> "Figure":
    return figure(*traces, **{"height": 280, **layout})


def _names(values: Any) -> list[str]:
    return [escape(str(value)) for value in values]
