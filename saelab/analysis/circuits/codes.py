"""Circuit identification with discrete SAE codes (O'Neill and Bui 2024, arXiv 2405.12522).

One small ReLU SAE is trained on the outputs of all heads on ten prompts. Each head's output on a prompt becomes an
integer, its strongest latent. A head scores by how many integers it shows on positive (clean) prompts and never on
negative (corrupted) ones, ``u_h = |P_h - N_h|``; a pair of heads by how many pairs of integers come together on
positives only. No interventions and no gradients. It sees what differs in *distribution* between the two classes, so
pooling over positions decides what it can see and has to be given:

``last``  the readout position             ``mean``  the mean over the prompt
``max``   the position of largest output   ``each``  every position; an integer counts wherever it stands

``u`` grows with the number of integers a head has in use, whatever the labels. So the score is ``z``: u less its mean
over random relabellings of the prompts, in units of their spread. (Departures from the authors' code: outputs have one
global scale so that the penalty means the same for every model; a head without active latents has a code of its own.)
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.scores import EdgeScores
from saelab.analysis.circuits.tasks import TaskBatch
from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.core.result import Result
from saelab.models.components import Components

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Pooling = Literal["last", "mean", "max", "each"]
SPREAD = 0.5
"""Least spread of the null that z divides by, so that one chance code of a head that has few is no great score."""
ROWS_PER_EXAMPLE = 4
"""Outputs of a head on one prompt that the SAE is trained on at most (pooling ``each`` has one for every position)."""


class CodesConfig(Config):
    """Settings of discrete-code circuit identification."""

    pooling: Pooling
    """How a head's outputs on a prompt become integers; there is no default, the result depends on it."""
    latents: int = Field(default=200, gt=0)
    """Latents of the SAE."""
    l1: float = Field(default=0.02, ge=0)
    """Weight of the L1 penalty, on outputs scaled to mean square 1."""
    examples: int = Field(default=10, gt=0)
    """Prompts the SAE is trained on, positives and negatives mixed."""
    epochs: int = Field(default=500, gt=0)
    """Full-batch steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Adam's learning rate."""
    shuffles: int = Field(default=100, ge=20)
    """Relabellings for the null."""
    seed: int = 0
    """Of the SAE, its prompts and the relabellings."""


@dataclass(frozen=True, eq=False, repr=False)
class CodeScores(Result):
    """What the codes say of heads and of pairs of heads."""

    graph: EdgeGraph
    config: CodesConfig
    unique: Int[np.ndarray, " h"]
    """Integers on positives only, of each head."""
    null_mean: Float[np.ndarray, " h"]
    """Its mean over relabellings."""
    null_std: Float[np.ndarray, " h"]
    z: Float[np.ndarray, " h"]
    """(unique - null_mean) / max(null_std, 1/2): the head's score."""
    null_z: Float[np.ndarray, "shuffles h"]
    """z of each relabelling by the same formula."""
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
        nodes[list(self.graph.heads)] = np.maximum(self.z, 0)
        details = self.config.model_dump()
        return EdgeScores("codes", self.graph, None, None, nodes, self.seconds, self.n_prompts, details)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each head, the highest score first."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "head": [self.graph.writers[w] for w in self.graph.heads],
                "z": self.z,
                "unique": self.unique,
                "null": self.null_mean,
                "codes": self.codes_in_use,
            }
        )
        return frame.sort_values("z", ascending=False, kind="stable").reset_index(drop=True)

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
    outputs, owner = _pooled(parts, batch, config.pooling)
    labels = np.repeat([True, False], len(batch))
    generator = torch.Generator().manual_seed(config.seed)
    codes = _encode(outputs, owner, 2 * len(batch), config, generator)
    presence = _presence(codes, owner, len(labels), config.latents + 1)
    unique = _unique(presence, labels[None])[0]
    shuffler = np.random.default_rng(config.seed)
    shuffled = np.stack([shuffler.permutation(labels) for _ in range(config.shuffles)])
    null = _unique(presence, shuffled)
    mean, std = null.mean(0), null.std(0)
    spread = np.maximum(std, SPREAD)
    return CodeScores(
        graph,
        config,
        unique,
        mean,
        std,
        (unique - mean) / spread,
        (null - mean) / spread,
        _pairs(codes, labels[owner], graph, config.latents + 1),
        presence.any(0).sum(1),
        time.perf_counter() - began,
        2 * len(batch),
    )


@torch.no_grad()
def _pooled(
    parts: Components, batch: TaskBatch, pooling: Pooling
) -> tuple[Float[Tensor, "m h d"], Int[np.ndarray, " m"]]:
    """Head outputs, one row per prompt (or per prompt and position), and the prompt of each row."""
    found, owners = [], []
    for side, tokens in enumerate((batch.clean, batch.corrupted)):
        heads = head_outputs(parts, tokens)
        valid = batch.valid.to(heads.device)
        rows = torch.arange(len(batch))
        if pooling == "last":
            chosen = heads[:, rows, batch.readout]
        elif pooling == "mean":
            chosen = (heads * valid[None, ..., None]).sum(2) / valid.sum(1)[None, :, None]
        elif pooling == "max":
            size = heads.norm(dim=-1).masked_fill(~valid, -1).argmax(-1)
            chosen = heads.gather(2, size[..., None, None].expand(-1, -1, 1, heads.shape[-1])).squeeze(2)
        else:
            chosen = heads[:, valid]
            rows = valid.nonzero()[:, 0].cpu()
        found.append(chosen.transpose(0, 1))
        owners.append(rows.numpy() + side * len(batch))
    return torch.cat(found).float(), np.concatenate(owners)


@torch.no_grad()
def head_outputs(parts: Components, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "heads b t d"]:
    """What every head writes to the residual stream, in the order of ``EdgeGraph.heads``."""
    residual = sum(parts.embed(tokens).values(), torch.zeros(()))
    found: list[Tensor] = []
    for layer in parts.layers:
        x = layer.norm1(residual)
        heads = parts.heads(layer, parts.pattern(layer, x, x), parts.values(layer, x))
        middle = residual + heads.sum(0) + layer.b_O
        residual = middle + layer.mlp(layer.norm2(residual if parts.parallel else middle))
        found.append(heads)
    return torch.cat(found)


def _encode(
    outputs: Float[Tensor, "m h d"],
    owner: Int[np.ndarray, " m"],
    n_prompts: int,
    config: CodesConfig,
    generator: torch.Generator,
) -> Int[np.ndarray, "m h"]:
    """Train the SAE and return the strongest latent of each output; ``config.latents`` where none is active."""
    outputs = outputs / outputs.square().mean().sqrt().clamp_min(1e-12)
    chosen = torch.randperm(n_prompts, generator=generator)[: config.examples]
    rows = outputs[torch.isin(torch.as_tensor(owner), chosen)].flatten(0, 1)
    most = ROWS_PER_EXAMPLE * config.examples * outputs.shape[1]
    rows = rows[torch.randperm(len(rows), generator=generator)[:most]]
    encoder, b_enc, bias = _train(rows, config, generator)
    with torch.no_grad():
        latents = torch.relu((outputs - bias) @ encoder.T + b_enc)
        best = latents.max(-1)
        codes: np.ndarray = best.indices.masked_fill(best.values <= 0, config.latents).cpu().numpy()
    return codes


def _train(
    rows: Float[Tensor, "n d"], config: CodesConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU SAE with unit rows in encoder and decoder and one bias before and after; MSE + l1 * mean L1 norm.

    Returns encoder, encoder bias and the other bias: nothing else is needed to read codes off.
    """
    width = rows.shape[1]
    start = torch.randn(config.latents, width, generator=generator)
    encoder, decoder = (start.clone().to(rows).requires_grad_() for _ in range(2))
    b_enc = torch.zeros(config.latents).to(rows).requires_grad_()
    bias = torch.zeros(width).to(rows).requires_grad_()
    optimiser = torch.optim.Adam([encoder, decoder, b_enc, bias], lr=config.lr)
    with torch.enable_grad():
        for _ in range(config.epochs):
            unit_e, unit_d = (torch.nn.functional.normalize(w, dim=1) for w in (encoder, decoder))
            latents = torch.relu((rows - bias) @ unit_e.T + b_enc)
            error = (latents @ unit_d + bias - rows).square().mean()
            loss = error + config.l1 * latents.sum(1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return torch.nn.functional.normalize(encoder.detach(), dim=1), b_enc.detach(), bias.detach()


def _presence(
    codes: Int[np.ndarray, "m h"], owner: Int[np.ndarray, " m"], n_prompts: int, n_codes: int
) -> Bool[np.ndarray, "n h c"]:
    """Whether a head shows an integer on a prompt."""
    presence = np.zeros((n_prompts, codes.shape[1], n_codes), bool)
    presence[owner[:, None], np.arange(codes.shape[1])[None], codes] = True
    return presence


def _unique(presence: Bool[np.ndarray, "n h c"], labels: Bool[np.ndarray, "k n"]) -> Int[np.ndarray, "k h"]:
    """Integers on positives only, for each labelling."""
    flat = presence.reshape(len(presence), -1).astype(np.float32)
    positive = labels.astype(np.float32) @ flat > 0
    negative = (~labels).astype(np.float32) @ flat > 0
    only: np.ndarray = (positive & ~negative).reshape(len(labels), *presence.shape[1:]).sum(2)
    return only


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
