"""Run a sparsified model faster than it ran dense: cut units that do nothing, and skip the zeros where that pays.

Decisions are made by measuring: MLPs as a whole, then every other layer with enough zeros, are timed dense and sparse
on their own input, and the faster one stays. What was decided is a list that can be applied again, so that an
interrupted harvest goes on with the same arithmetic.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.core.errors import ConfigError, ModelError
from saelab.kernels.n_of_m import semi_structured, semi_structured_problem
from saelab.kernels.spmm import SparseWeight, spmm
from saelab.sparsity.layers import Layer, linear_layers, zeros
from saelab.sparsity.methods.structured import Branch, branches, shrink

LEAST_ZEROS = 0.5
"""Layers with fewer zeros than this are not timed (our choice; ``benchmarks/sparse_kernels.py`` shows the region)."""
MARGIN = 0.9
"""Sparse must take less than this share of the dense time."""
ROUNDS = 5


@dataclass(frozen=True)
class Choice:
    """What was found for one layer or MLP."""

    layer: str
    """Name of the layer (of the MLP's last layer, for a cut)."""
    run: str
    """``dense``, ``sparse``, ``sparse-transposed`` (its output, for the next sparse layer), ``2:4``, or ``cut``."""
    zeros: float
    """Share of zeros (of neurons or heads that do nothing, for a cut)."""
    ratio: float
    """Sparse time over dense time on this machine; NaN when it was not timed."""


class SparseLinear(nn.Module):
    """A frozen linear layer that reads only its nonzero weights; in the place of ``nn.Linear`` or ``Conv1D``.

    With ``transposed`` its output lies (out, n) in memory, as the sparse layer that reads it wants it.
    """

    def __init__(self, layer: Layer, transposed: bool = False) -> None:
        super().__init__()
        self._transposed = transposed
        self._weight = SparseWeight.from_dense(layer.weight)
        bias = getattr(layer.module, "bias", None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        out = spmm(x.flatten(0, -2), self._weight, self._bias, transposed=self._transposed)
        return out.view(*x.shape[:-1], out.shape[-1])


class SemiStructuredLinear(nn.Module):
    """A 2:4 layer on a GPU's sparse tensor cores, in the place of ``nn.Linear`` or ``Conv1D``. Not run on a GPU yet."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._weight = semi_structured(layer.weight)
        bias = getattr(layer.module, "bias", None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        out = F.linear(x.flatten(0, -2), self._weight, self._bias)
        return out.view(*x.shape[:-1], out.shape[-1])


def _module(layer: Layer, run: str) -> nn.Module:
    return SemiStructuredLinear(layer) if run == "2:4" else SparseLinear(layer, run == "sparse-transposed")


@torch.no_grad()
def accelerate(model: Any, tokens: Int[Tensor, "b t"], sites: Sequence[str] = ()) -> list[Choice]:
    """Make a subject model faster in place; ``tokens`` is a batch such as it will read. Returns what was decided.

    Activations stay the same up to rounding; an MLP or attention that one of ``sites`` looks into is not cut, so that
    every site keeps its width. Raises :class:`ModelError` for a model without linear layers.
    """
    found = _cut(model, [b for b in _branches(model) if not _looked_into(b, sites)])
    rest = {layer.name: layer for layer in linear_layers(model.plain) if zeros(layer) >= LEAST_ZEROS}
    packed = {name for name, layer in rest.items() if semi_structured_problem(layer.weight) is None}
    for branch in _branches(model, ("neurons",)):
        names = [*(layer.name for layer in branch.into), branch.out.name]
        if all(name in rest and name not in packed for name in names):
            pair = [Choice(name, "sparse-transposed", zeros(rest[name]), 0.0) for name in names[:-1]]
            pair.append(Choice(names[-1], "sparse", zeros(rest[names[-1]]), 0.0))
            parent = branch.out.name.rpartition(".")[0]
            found += _decide(model, pair, parent, tokens)
            for name in names:
                del rest[name]
    for name, layer in rest.items():
        run = "2:4" if name in packed else "sparse"
        found += _decide(model, [Choice(name, run, zeros(layer), 0.0)], name, tokens)
    return found


@torch.no_grad()
def apply(model: Any, names: Sequence[str]) -> None:
    """Repeat decisions (``sparse:LAYER``, ``cut:LAYER``) of :func:`accelerate`. Raises :class:`ConfigError`."""
    wanted = [(run, layer) for run, _, layer in (name.rpartition(":") for name in names)]
    cuts = {layer for run, layer in wanted if run == "cut"}
    if cuts:
        _cut(model, [branch for branch in _branches(model) if branch.out.name in cuts])
    layers = {layer.name: layer for layer in linear_layers(model.plain)}
    for run, name in wanted:
        if name not in layers or run not in ("sparse", "sparse-transposed", "2:4", "cut"):
            raise ConfigError(f"{model.name} has no layer for '{run}:{name}'; was it recorded for another model?")
        if run != "cut":
            _replace(model.plain, name, _module(layers[name], run))


def decisions(choices: Sequence[Choice]) -> list[str]:
    """Return what :func:`apply` takes."""
    return [f"{choice.run}:{choice.layer}" for choice in choices if choice.run != "dense"]


def _cut(model: Any, among: Sequence[Branch]) -> list[Choice]:
    """Cut out the neurons and heads that write nothing. A unit whose output weights are all zero has no effect."""
    choices = []
    for branch in among:
        kept = (branch.out.weight != 0).any(dim=0).view(branch.units, -1).any(dim=1)
        share = 1 - float(kept.float().mean())
        if not branch.into or share == 0 or bool((~kept).all()):
            continue
        shrink(model.plain, branch, kept.cpu())
        choices.append(Choice(branch.out.name, "cut", share, float("nan")))
    return choices


def _looked_into(branch: Branch, sites: Sequence[str]) -> bool:
    part = "mlp" if branch.kind == "neurons" else "attn"
    return any(site.startswith(f"blocks.{branch.block}.{part}.") for site in sites)


def _branches(model: Any, kinds: Sequence[str] = ("neurons", "heads")) -> list[Branch]:
    found: list[Branch] = []
    for kind in kinds:
        with suppress(ModelError):  # an architecture whose MLPs or attentions are not known
            found += branches(model.plain, kind)
    return found


def _decide(model: Any, choices: Sequence[Choice], place: str, tokens: Tensor) -> list[Choice]:
    """Put sparse layers in, time the module ``place`` with and without them, and leave the faster there."""
    layers = {layer.name: layer for layer in linear_layers(model.plain)}
    sparse = {c.layer: _module(layers[c.layer], c.run) for c in choices}
    dense = {c.layer: layers[c.layer].module for c in choices}
    given = _input_of(model, place, tokens)
    best = {"sparse": float("inf"), "dense": float("inf")}
    for _ in range(ROUNDS):
        for run, modules in (("dense", dense), ("sparse", sparse)):
            for name, module in modules.items():
                _replace(model.plain, name, module)
            best[run] = min(best[run], _seconds(model.plain.get_submodule(place), given))
    ratio = best["sparse"] / best["dense"]
    wins = ratio < MARGIN
    for name, module in (sparse if wins else dense).items():
        _replace(model.plain, name, module)
    return [Choice(c.layer, c.run if wins else "dense", c.zeros, ratio) for c in choices]


def _input_of(model: Any, place: str, tokens: Tensor) -> Tensor:
    """Return what a module is given when the model reads ``tokens``."""
    seen: list[Tensor] = []
    module = model.plain.get_submodule(place)
    handle = module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        model.logits(tokens)
    finally:
        handle.remove()
    return seen[0]


def _seconds(module: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    module(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _replace(plain: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(plain.get_submodule(parent), last, module)
