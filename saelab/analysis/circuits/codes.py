"""Circuit identification with discrete SAE codes (O'Neill and Bui 2024, arXiv 2405.12522).

One small ReLU SAE is trained on the outputs of all heads on ten prompts. Each head's output on a prompt becomes an
integer, its strongest latent. A head scores by how many integers it shows on positive (clean) prompts and never on
negative (corrupted) ones, ``u_h = |P_h - N_h|``; a pair of heads by how many pairs of integers come together on
positives only. No interventions and no gradients. It sees what differs in *distribution* between the two classes, so
pooling over positions decides what it can see and has to be given:

``last``  the readout position             ``mean``  the mean over the prompt
``max``   the position of largest output   ``each``  every position; an integer counts wherever it stands

``u`` (``unique``) grows with the number of integers a head has in use, and one stray negative cancels an integer that
hundreds of positives show. So the default score is our own, ``difference``: with p and n the shares of positives and of
negatives that show an integer, q of all, and N prompts of each class, the sum over integers of

    max(0, p - n)^2 / (q (1 - q) 2 / N)        a chi-squared statistic, of what positives show more often

Either score is given less its mean over random relabellings of the prompts (``excess``); ``z``, the excess in units of
their spread, says how sure it is, but ranks heads worse: a head of few integers has next to no spread.
(Other departures from the authors' code: outputs have one global scale so that the penalty means the same for every
model; a head without active latents has a code of its own; ten times the learning rate, and an end at the plateau.)
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.analysis.circuits.code_sae import CodesConfig, encode, output_matrices, pooled
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.scores import EdgeScores
from saelab.analysis.circuits.tasks import TaskBatch
from saelab.core.errors import ConfigError
from saelab.core.result import Result
from saelab.models.components import Components

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SPREAD = 0.5
"""Least spread that z divides by, so that one chance code of a head that has few is no great z."""


@dataclass(frozen=True, eq=False, repr=False)
class CodeScores(Result):
    """What the codes say of heads and of pairs of heads."""

    graph: EdgeGraph
    config: CodesConfig
    unique: Int[np.ndarray, " h"]
    """Integers on positives only, of each head: the paper's u."""
    excess: Float[np.ndarray, " h"]
    """The score that the config names, less its mean over relabellings."""
    null_mean: Float[np.ndarray, " h"]
    """That mean."""
    z: Float[np.ndarray, " h"]
    """excess / max(spread of the relabellings, 1/2): how far beyond chance."""
    null_excess: Float[np.ndarray, "shuffles h"]
    """Excess of each relabelling."""
    pairs: Int[np.ndarray, "h h"]
    """Pairs of integers on positives only, of each earlier head (row) with each head of a later layer (column)."""
    codes_in_use: Int[np.ndarray, " h"]
    """Different integers that a head shows."""
    seconds: float
    """From prompts to scores, null included."""
    n_prompts: int
    """Positives and negatives together."""

    def node_scores(self) -> EdgeScores:
        """The same as scores of writers, for comparison with other methods."""
        nodes = np.full(len(self.graph.writers), np.nan)
        nodes[list(self.graph.heads)] = np.maximum(self.excess, 0)
        details = self.config.model_dump()
        return EdgeScores("codes", self.graph, None, None, nodes, self.seconds, self.n_prompts, details)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each head, the highest score first."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "head": [self.graph.writers[w] for w in self.graph.heads],
                "excess": self.excess,
                "null": self.null_mean,
                "z": self.z,
                "unique": self.unique,
                "codes": self.codes_in_use,
            }
        )
        return frame.sort_values("excess", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.head} {row.z:.1f}" for row in self.to_frame().head(3).itertuples())
        return f"CodeScores({len(self.z)} heads, {self.n_prompts} prompts; largest z: {best})"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Z of every head, by layer and head."""
        from plotly import graph_objects as go

        from saelab.core.plotting import SCALE, figure

        z = self.z.reshape(-1, self.graph.n_heads)
        shown = go.Heatmap(z=z, colorscale=SCALE, colorbar={"title": "z"}, hovertemplate="%{y}.%{x}: %{z:.2f}")
        axes = {"xaxis": {"title": "head", "dtick": 1}, "yaxis": {"title": "layer", "dtick": 1}}
        return {"heads": (figure(shown, height=160 + 40 * len(z), **axes), self.to_frame())}

    def edge_frame(self, n: int = 20) -> "pd.DataFrame":
        """The n pairs of heads with most pairs of integers on positives only."""
        import pandas as pd

        order = np.argsort(-self.pairs, axis=None, kind="stable")[:n]
        rows, columns = np.unravel_index(order, self.pairs.shape)
        names = [self.graph.writers[w] for w in self.graph.heads]
        return pd.DataFrame(
            {
                "from": [names[r] for r in rows],
                "to": [names[c] for c in columns],
                "pairs": self.pairs[rows, columns],
            }
        )


def discrete_codes(parts: Components, batch: TaskBatch, config: CodesConfig) -> CodeScores:
    """Score all heads of a model on a task; clean prompts are positives, corrupted ones negatives."""
    began, graph = time.perf_counter(), EdgeGraph.of(parts)
    if config.examples > 2 * len(batch):
        raise ConfigError(f"examples is {config.examples}, but there are {2 * len(batch)} prompts; raise --n")
    z, owner = pooled(parts, batch, config.pooling)
    labels = np.repeat([True, False], len(batch))
    codes = encode(z, output_matrices(parts), owner, len(labels), config)
    presence = _presence(codes, owner, len(labels), config.latents + 1)
    shuffler = np.random.default_rng(config.seed)
    shuffled = np.stack([shuffler.permutation(labels) for _ in range(config.shuffles)])
    count = _unique if config.score == "unique" else _difference
    score, null = count(presence, labels[None])[0], count(presence, shuffled)
    mean = null.mean(0)
    return CodeScores(
        graph=graph,
        config=config,
        unique=_unique(presence, labels[None])[0],
        excess=score - mean,
        null_mean=mean,
        z=(score - mean) / np.maximum(null.std(0), SPREAD),
        null_excess=null - mean,
        pairs=_pairs(codes, labels[owner], graph, config.latents + 1),
        codes_in_use=presence.any(0).sum(1),
        seconds=time.perf_counter() - began,
        n_prompts=len(labels),
    )


def _presence(
    codes: Int[np.ndarray, "m h"], owner: Int[np.ndarray, " m"], n_prompts: int, n_codes: int
) -> Bool[np.ndarray, "n h c"]:
    """Whether a head shows an integer on a prompt."""
    presence = np.zeros((n_prompts, codes.shape[1], n_codes), bool)
    presence[owner[:, None], np.arange(codes.shape[1])[None], codes] = True
    return presence


def _shown(
    presence: Bool[np.ndarray, "n h c"], labels: Bool[np.ndarray, "k n"]
) -> tuple[Float[np.ndarray, "k h c"], Float[np.ndarray, "k h c"]]:
    """Number of positives and of negatives that show each integer of each head, for each labelling."""
    flat = presence.reshape(len(presence), -1).astype(np.float32)
    shape = (len(labels), *presence.shape[1:])
    return (labels.astype(np.float32) @ flat).reshape(shape), ((~labels).astype(np.float32) @ flat).reshape(shape)


def _unique(presence: Bool[np.ndarray, "n h c"], labels: Bool[np.ndarray, "k n"]) -> Int[np.ndarray, "k h"]:
    """Integers on positives only, for each labelling."""
    positive, negative = _shown(presence, labels)
    only: np.ndarray = ((positive > 0) & (negative == 0)).sum(2)
    return only


def _difference(presence: Bool[np.ndarray, "n h c"], labels: Bool[np.ndarray, "k n"]) -> Float[np.ndarray, "k h"]:
    """The chi-squared statistic of the module's docstring, for labellings of half positives, half negatives."""
    positive, negative = _shown(presence, labels)
    each = labels.shape[1] / 2
    q = (positive + negative) / (2 * each)
    more = np.maximum(positive - negative, 0) / each
    found: np.ndarray = (more**2 / np.maximum(q * (1 - q) * 2 / each, 1e-12)).sum(2)
    return found


def _pairs(
    codes: Int[np.ndarray, "m h"], positive: Bool[np.ndarray, " m"], graph: EdgeGraph, n_codes: int
) -> Int[np.ndarray, "h h"]:
    """Pairs of integers that come together on positives only, for heads of different layers."""
    n, per_layer = codes.shape[1], graph.n_heads
    found = np.zeros((n, n), np.int64)
    wide = codes.astype(np.int64)
    for first in range(n):
        for second in range((first // per_layer + 1) * per_layer, n):
            joint = wide[:, first] * n_codes + wide[:, second]
            found[first, second] = len(np.setdiff1d(joint[positive], joint[~positive]))
    return found
