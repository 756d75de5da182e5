"""Figures: the frame holds what is drawn, and texts from outside are escaped."""

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
