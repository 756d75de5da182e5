"""Figures: the frame holds what is drawn, and texts from outside are escaped."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saelab.analysis import figures
from saelab.core import plotting
from saelab.core.statistics import Histogram
from saelab.features import figures as histograms


def test_activation_histogram_draws_the_counts():
    histogram = Histogram.linear(0, 4, 4)
    histogram.update(np.array([0.5, 1.5, 1.6, 4.0]))
    figure, frame = histograms.activation_histogram(histogram.result())
    assert frame["count"].tolist() == list(figure.data[0].y) == [1, 2, 0, 1]
    assert list(figure.data[0].x) == [0.5, 1.5, 2.5, 3.5]
    assert figure.layout.template.layout.colorway == plotting.PALETTE


def test_density_histogram_leaves_dead_features_out():
    _, frame = histograms.density_histogram(np.array([0, 0, 0.1, 0.01, 0.001]))
    assert frame["count"].sum() == 3
    _, frame = histograms.density_histogram(np.zeros(3))
    assert frame["count"].sum() == 0


def test_logit_histogram_counts_the_vocabulary():
    _, frame = histograms.logit_histogram(np.linspace(-1, 1, 100), bins=10)
    assert frame["count"].tolist() == [10] * 10


def test_scatter_carries_feature_numbers_and_is_bounded():
    n = 3 * plotting.MOST_POINTS
    figure, frame = figures.feature_scatter(np.arange(n), np.ones(n), x_title="x", y_title="y", log_x=True)
    assert len(frame) == plotting.MOST_POINTS
    assert (frame["x"] == frame["feature"]).all()
    assert frame["feature"].min() == 1  # 0 has no place on a logarithmic axis
    assert list(figure.data[0].customdata) == frame["feature"].tolist()


def test_training_curves_escape_names_and_skip_what_is_missing():
    log = pd.DataFrame({"tokens": [10, 20], "fvu": [0.5, 0.25]})
    figure, frame = figures.training_curves({"<b>a": log, "b": pd.DataFrame()}, "fvu", "FVU")
    assert [line.name for line in figure.data] == ["&lt;b&gt;a"]
    assert frame["fvu"].tolist() == [0.5, 0.25]


def test_probability_changes_escape_tokens():
    effect = pd.DataFrame(
        {"token": [4, 2, 9], "default": [0.5, 0.2, 0.1], "steered": [0.1, 0.4, 0.2], "change": [-0.4, 0.2, 0.1]}
    )
    figure, frame = figures.probability_changes(effect, ["<b>x</b>", '"""', "c"], n=2)
    assert frame["change"].tolist() == [-0.4, 0.2]
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", '"""']
    assert list(figure.data[1].x) == pytest.approx([0.1, 0.4])


def test_counts_and_losses():
    figure, frame = figures.counts_per_token([0, 3, 5])
    assert list(figure.data[0].x) == [1, 2]
    assert frame["tokens"].tolist() == [0, 3, 5]
    figure, frame = figures.prompt_loss(np.array([np.nan, 1.5], np.float32), ["<i>", "b"])
    assert list(figure.data[0].customdata) == ["&lt;i&gt;", "b"]
    assert frame["loss"].tolist()[1] == 1.5


def test_there_is_one_place_that_makes_figures():
    """Subplots are made by Plotly's own function, and take the template by hand."""
    root = Path(plotting.__file__).parents[1]
    made = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if "go.Figure(" in p.read_text(encoding="utf-8")]
    assert made == ["core/plotting.py"]
    app = root.parent / "app"
    assert not [p.name for p in app.rglob("*.py") if "go.Figure(" in p.read_text(encoding="utf-8")]


def test_colours_of_categories_are_okabe_and_itos():
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(plotting.PALETTE) <= okabe_ito


def test_every_function_names_its_axes():
    log = pd.DataFrame({"tokens": [1, 2], "fvu": [0.5, 0.4]})
    effect = pd.DataFrame({"token": [1, 2], "default": [0.5, 0.1], "steered": [0.2, 0.3], "change": [-0.3, 0.2]})
    points = pd.DataFrame({"name": ["a"], "architecture": ["topk"], "d_sae": [8], "l0": [2.0], "fvu": [0.1]})
    histogram = Histogram.linear(0, 4, 4)
    histogram.update(np.array([0.5, 1.5]))
    drawn = [
        histograms.activation_histogram(histogram.result()),
        histograms.density_histogram(np.array([0.1, 0.01])),
        histograms.logit_histogram(np.linspace(-1, 1, 50)),
        figures.feature_scatter(np.arange(3), np.ones(3), x_title="x", y_title="y"),
        figures.training_curves({"a": log}, "fvu", "FVU"),
        figures.counts_per_token([0, 3, 5]),
        figures.probability_changes(effect, ["a", "b"]),
        figures.prompt_loss(np.array([np.nan, 1.5], np.float32), ["a", "b"]),
        figures.pareto(points, "fvu", "FVU"),
    ]
    for figure, frame in drawn:
        assert figure.layout.template == plotting.template()
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
        assert len(frame)
