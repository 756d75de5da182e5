"""Runs in which chosen edges carry another run's values.

The input of reader r is the residual stream it would see, minus, for each removed edge (r, w), what writer w wrote in
*this* run, plus what it wrote in the *other* one:

    x_r = sum_w out_w - sum_w removed[r, w] (out_w - other_w)

``other`` comes from the ablation: the corrupted prompts, their mean at each position, or zero. Biases belong to no
writer (but an MLP's own to the MLP) and are always there. Several sets of edges run as one batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.metrics import at_readout, measure
from saelab.analysis.circuits.tasks import MetricName, TaskBatch
from saelab.models.components import Components, Layer

Ablation = Literal["corrupted", "mean", "zero"]
Positions = Literal["all", "readout"]
NUMBERS_AT_ONCE = 1 << 25
"""Largest tensor of writers' outputs that a batch of sets of edges may need."""


@dataclass(frozen=True)
class Setting:
    """What makes two circuit scores comparable: metric, ablation, positions. Part of every result."""

    metric: MetricName
    """See :mod:`saelab.analysis.circuits.metrics`."""
    ablation: Ablation
    """What a removed edge carries: the corrupted prompt's value, the corrupted prompts' mean at that position, or 0."""
    positions: Positions = "all"
    """Where removed edges carry it: at every position, or at the readout alone."""


class EdgeRunner:
    """A model, a batch of a task and a setting: measures any set of edges."""

    def __init__(self, parts: Components, batch: TaskBatch, setting: Setting) -> None:
        self.parts, self.batch, self.setting = parts, batch, setting
        self.graph = EdgeGraph.of(parts)
        valid = batch.valid.to(parts.model.device)
        readout = torch.zeros_like(valid)
        readout[torch.arange(len(batch)), batch.readout.cpu()] = True
        self.where: Float[Tensor, "b t 1"] = (valid if setting.positions == "all" else readout)[..., None].float()
        with torch.no_grad():
            self.clean = self.outputs(batch.clean)
            self.other = self._other()
            self.clean_logits = self.logits()
            self.reference = self.metric(self.clean_logits)

    def _other(self) -> Float[Tensor, "w b t d"]:
        """What removed edges carry."""
        if self.setting.ablation == "zero":
            return torch.zeros_like(self.clean)
        found = self.outputs(self.batch.corrupted)
        if self.setting.ablation == "corrupted":
            return found
        valid = self.batch.valid.to(found.device)[None, ..., None].to(found.dtype)
        mean = (found * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        return mean.expand_as(found)

    @torch.no_grad()
    def outputs(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "w b t d"]:
        """What each writer writes in an untouched run."""
        written: list[Tensor] = []
        self.forward(tokens, keep=written)
        return torch.cat(written)

    def metric(self, logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """Metric per prompt of logits at the readout (several runs of the batch after one another are allowed)."""
        times = logits.shape[0] // len(self.batch)
        if times == 1:
            return measure(self.setting.metric, logits, self.batch, self.reference_logits(logits))
        parts = [
            measure(self.setting.metric, part, self.batch, self.reference_logits(part)) for part in logits.chunk(times)
        ]
        return torch.cat(parts)

    def reference_logits(self, logits: Tensor) -> Float[Tensor, "n v"]:
        """The whole model's logits at the readout (those given, while they are being made)."""
        return self.clean_logits if hasattr(self, "clean_logits") else logits

    @torch.no_grad()
    def logits(self, removed: Bool[np.ndarray, "*k r w"] | None = None) -> Float[Tensor, "n v"]:
        """Logits at the readout with some edges removed; for k sets, k runs of the batch after one another."""
        if removed is None:
            return at_readout(self.forward(self.batch.clean), self.batch.readout)
        sets = torch.as_tensor(removed.reshape(-1, *self.graph.valid.shape)).to(self.clean.device, self.clean.dtype)
        step = max(1, NUMBERS_AT_ONCE // self.clean.numel())
        found = []
        for i in range(0, len(sets), step):
            chosen = sets[i : i + step]
            k = len(chosen)
            logits = self.forward(self.batch.clean.repeat(k, 1), removed=chosen)
            found.append(at_readout(logits, self.batch.readout.repeat(k)))
        return torch.cat(found)

    def scores(self, removed: Bool[np.ndarray, "*k r w"]) -> Float[np.ndarray, " k"]:
        """Mean metric of the batch with some edges removed, for each set of edges."""
        values = self.metric(self.logits(removed))
        means: np.ndarray = values.double().view(-1, len(self.batch)).mean(1).cpu().numpy()
        return means

    @property
    def clean_score(self) -> float:
        """Mean metric of the whole model."""
        return float(self.reference.double().mean())

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        removed: Float[Tensor, "k r w"] | None = None,
        embeddings: Float[Tensor, "e b t d"] | None = None,
        keep: list[Tensor] | None = None,
        inputs: dict[tuple[int, str], Tensor] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits at all positions.

        ``removed`` holds one set of edges for each of the k copies of the batch in ``tokens``. ``embeddings`` stand in
        for those of the tokens. ``keep`` collects the writers' outputs in order. ``inputs`` collects, for each
        (layer, slot), the input of its readers, (readers, b, t, d), for gradients.
        """
        run = _Run(self, tokens, removed, keep, inputs)
        start = list(self.parts.embed(tokens).values()) if embeddings is None else list(embeddings)
        run.write(torch.stack(start))
        for n, layer in enumerate(self.parts.layers):
            heads = run.heads(n, layer)
            before = run.residual
            run.write(heads, layer.b_O)
            x = run.read(n, "mlp", before if self.parts.parallel else run.residual)
            run.write(layer.mlp(layer.norm2(x[0]))[None])
        return self.parts.unembed(run.read(self.graph.n_layers, "logits", run.residual)[0])


class _Run:
    """State of one forward pass."""

    def __init__(
        self,
        runner: EdgeRunner,
        tokens: Tensor,
        removed: Tensor | None,
        keep: list[Tensor] | None,
        inputs: dict[tuple[int, str], Tensor] | None,
    ) -> None:
        self.runner, self.graph, self.parts = runner, runner.graph, runner.parts
        self.removed, self.keep, self.inputs = removed, keep, inputs
        self.k = 1 if removed is None else removed.shape[0]
        self.b = tokens.shape[0] // self.k
        self.residual: Any = 0.0
        self.differences: list[Tensor] = []
        self.n_written = 0

    def write(self, outputs: Float[Tensor, "n b t d"], bias: Tensor | None = None) -> None:
        """Add some writers' outputs (and a bias that is nobody's) to the residual stream."""
        self.residual = self.residual + outputs.sum(0)
        if bias is not None:
            self.residual = self.residual + bias
        if self.keep is not None:
            self.keep.append(outputs)
        if self.removed is not None:
            n = outputs.shape[0]
            other = self.runner.other[self.n_written : self.n_written + n]
            split = outputs.reshape(n, self.k, self.b, *outputs.shape[2:])
            self.differences += ((split - other[:, None]) * self.runner.where).unbind(0)
            self.n_written += n

    def read(self, layer: int, slot: str, residual: Tensor) -> Float[Tensor, "r b t d"]:
        """Input of a block's readers of one slot; one for all (r = 1) where nothing tells them apart."""
        where = self.graph.slots(layer, slot)
        n = where.stop - where.start
        if self.inputs is not None:
            self.inputs[layer, slot] = residual[None].expand(n, -1, -1, -1)
            return self.inputs[layer, slot]
        if self.removed is None:
            return residual[None]
        used = self.graph.readers[where.start].n_writers
        chosen = self.removed[:, where, :used]
        writers = chosen.any(1).any(0).nonzero()[:, 0].tolist()
        if not writers:
            return residual[None]
        differences = torch.stack([self.differences[w] for w in writers], 1)
        taken = torch.bmm(chosen[:, :, writers], differences.flatten(2))
        return residual[None] - taken.transpose(0, 1).reshape(n, *residual.shape)

    def heads(self, n: int, layer: Layer) -> Float[Tensor, "h b t d"]:
        """What the heads of a block write."""
        q, k, v = (layer.norm1(self.read(n, slot, self.residual)) for slot in ("q", "k", "v"))
        pattern = self.parts.pattern(layer, _one(q), _one(k))
        return self.parts.heads(layer, pattern, self.parts.values(layer, _one(v)))


def _one(x: Float[Tensor, "r b t d"]) -> Tensor:
    """A single input for all heads without the head axis."""
    return x[0] if x.shape[0] == 1 else x
