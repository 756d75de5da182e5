"""ACDC (Conmy et al. 2023, arXiv 2304.14997): walk the edges from the logits down, remove each that is not missed.

Damage is the metric itself where it rises as the run gets worse (``kl``, ``nll``), and its negative otherwise. An edge
goes when the damage rises by less than ``tau`` over the present circuit's; edges into a part that nothing in the
circuit reads go without a run.
"""

import time

import numpy as np
from jaxtyping import Bool

from saelab.analysis.circuits.metrics import WORSE
from saelab.analysis.circuits.run import EdgeRunner
from saelab.analysis.circuits.scores import EdgeScores
from saelab.core.errors import ConfigError
from saelab.core.progress import progress


def acdc(runner: EdgeRunner, tau: float) -> EdgeScores:
    """Run ACDC once at threshold ``tau`` (in units of the metric).

    The score of an edge is the rise of damage when it was tried, so that kept edges are those above tau; 0 for edges
    that went without a run. ``details`` holds tau, the runs used, and the kept edges' number.
    """
    if not tau > 0:
        raise ConfigError(f"tau is {tau}, expected a positive number of units of {runner.setting.metric}")
    began, graph = time.perf_counter(), runner.graph
    sign = 1.0 if runner.setting.metric in WORSE else -1.0
    removed = np.zeros_like(graph.valid)
    scores = np.where(graph.valid, 0.0, np.nan)
    damage, runs = sign * runner.clean_score, 0
    with progress("acdc", len(graph.readers), unit="readers") as bar:
        for r in reversed(range(len(graph.readers))):
            bar.advance(1)
            reader = graph.readers[r]
            if reader.owners and not (graph.valid & ~removed)[:, list(reader.owners)].any():
                removed[r] = graph.valid[r]
                continue
            for w in reversed(range(reader.n_writers)):
                removed[r, w] = True
                tried = sign * float(runner.scores(removed)[0])
                runs += 1
                scores[r, w] = tried - damage
                if scores[r, w] < tau:
                    damage = tried
                else:
                    removed[r, w] = False
    kept = kept_edges(scores, tau)
    details = {"tau": tau, "runs": runs, "kept": int(kept.sum()), "damage": damage}
    nodes = graph.node_scores(np.nan_to_num(np.where(kept, scores, 0)))
    return EdgeScores(
        "acdc", graph, runner.setting, scores, nodes, time.perf_counter() - began, len(runner.batch), details
    )


def kept_edges(scores: np.ndarray, tau: float) -> Bool[np.ndarray, "r w"]:
    """Edges that a run of :func:`acdc` kept."""
    kept: np.ndarray = np.nan_to_num(scores, nan=-np.inf) >= tau
    return kept
