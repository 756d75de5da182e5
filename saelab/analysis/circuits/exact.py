"""Activation patching: replace one edge, or all that one part writes, and run the model. The judge of all others."""

import time
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from saelab.analysis.circuits.run import EdgeRunner
from saelab.analysis.circuits.scores import EdgeScores
from saelab.core.progress import progress

AT_ONCE = 64
"""Interventions handed to the runner at once (it splits them further to fit memory)."""


def patch_edges(runner: EdgeRunner) -> EdgeScores:
    """Effect of each edge: metric with that edge alone removed - metric of the whole model. One run per edge."""
    began = time.perf_counter()
    places = np.argwhere(runner.graph.valid)
    effects = np.full(runner.graph.valid.shape, np.nan)
    with progress("patching", len(places), unit="edges") as bar:
        for part in _parts(places):
            removed = np.zeros((len(part), *runner.graph.valid.shape), bool)
            removed[np.arange(len(part)), part[:, 0], part[:, 1]] = True
            effects[part[:, 0], part[:, 1]] = runner.scores(removed) - runner.clean_score
            bar.advance(len(part))
    seconds = time.perf_counter() - began
    nodes = runner.graph.node_scores(np.nan_to_num(effects))
    return EdgeScores("patching", runner.graph, runner.setting, effects, nodes, seconds, len(runner.batch))


def patch_nodes(runner: EdgeRunner) -> EdgeScores:
    """Effect of each writer: metric with all it writes removed - metric of the whole model. One run per writer."""
    began = time.perf_counter()
    n = len(runner.graph.writers)
    effects = np.zeros(n)
    for part in _parts(np.arange(n)[:, None]):
        removed = np.stack([without_nodes(runner, part_w) for part_w in part[:, :1]])
        effects[part[:, 0]] = runner.scores(removed) - runner.clean_score
    seconds = time.perf_counter() - began
    return EdgeScores("patching nodes", runner.graph, runner.setting, None, effects, seconds, len(runner.batch))


def without_nodes(runner: EdgeRunner, writers: np.ndarray) -> Bool[np.ndarray, "r w"]:
    """All edges that leave some writers."""
    removed = np.zeros_like(runner.graph.valid)
    removed[:, writers] = runner.graph.valid[:, writers]
    return removed


def combined_effect(runner: EdgeRunner, removed: Bool[np.ndarray, "k r w"]) -> Float[np.ndarray, " k"]:
    """Metric with each set of edges removed - metric of the whole model."""
    return runner.scores(removed) - runner.clean_score


def _parts(places: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, len(places), AT_ONCE):
        yield places[i : i + AT_ONCE]
