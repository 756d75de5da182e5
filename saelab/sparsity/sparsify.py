"""Make a model sparse: collect what the method needs, block by block, and prune each layer in place.

The inputs of a block's layers are computed with all blocks before it already pruned and its own layers still dense, as
the reference implementations of Wanda and SparseGPT do.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from saelab.core.errors import ConfigError, TextError
from saelab.core.progress import progress
from saelab.sparsity.allocation import by_global_score, by_sensitivity, erk, uniform
from saelab.sparsity.layers import Layer, linear_layers, zeros
from saelab.sparsity.measure import loss
from saelab.sparsity.methods import Method, Structured
from saelab.sparsity.methods.structured import Branch, Contribution, branches, shrink, silence, smaller
from saelab.sparsity.pattern import NofM, keep_largest
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.statistics import InputStatistics, watched

ROWS_PER_BATCH = 16


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer."""

    name: str
    outputs: int
    inputs: int
    sparsity: float
    """Share of its weights that are exactly zero, as counted."""
    facts: Mapping[str, float]
    """What the method says beside that."""


@dataclass(frozen=True)
class Sparsified:
    """The outcome of :func:`sparsify`; the model itself was changed."""

    layers: tuple[LayerReport, ...]
    masks: Mapping[str, Tensor]
    """True where a weight stays, (out, in) per layer; empty for a model that was cut."""
    sparsity: float
    """Share of all pruned layers' weights that are zero (or were cut), as counted."""
    seconds: float
    """Wall-clock time, calibration included."""
    calibration_tokens: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method stores beside the model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's config (a smaller MLP)."""


def sparsify(model: Any, rows: Any, recipe: Recipe, *, seed: int = 0) -> Sparsified:
    """Prune a subject model in place as ``recipe`` says; ``rows`` is the calibration text.

    Raises ``ConfigError`` (a pattern that does not divide a layer, an unknown layer), ``ModelError`` (no linear
    layers), ``TextError`` (empty calibration text), ``ActivationError`` (NaN).
    """
    began = time.perf_counter()
    layers = linear_layers(model.plain, recipe.include, recipe.exclude)
    method = recipe.method
    if isinstance(method, Structured):
        batches = _calibration(model, rows, recipe)
        return _structured(model, batches, method, began)
    assert isinstance(method, Method)
    if method.patterned:
        for layer in layers:
            if isinstance(pattern := recipe.pattern_for(recipe.sparsity), NofM):
                pattern.require(layer.shape[1], f"layer {layer.name}")
    # A method that looks at weights alone asks for no text; the scan of an allocation does.
    batches = _calibration(model, rows, recipe) if method.need or recipe.allocation == "sensitivity" else []
    task = _Task(model, tuple(layers), tuple(batches), recipe, method, seed)
    return _layer_by_layer(task, began)


@dataclass(frozen=True)
class _Task:
    """What is to be done."""

    model: Any
    layers: tuple[Layer, ...]
    batches: tuple[Any, ...]
    recipe: Recipe
    method: Method
    seed: int


def _layer_by_layer(task: _Task, began: float) -> Sparsified:
    model, layers, batches, recipe, method = task.model, task.layers, task.batches, task.recipe, task.method
    shares = _shares(task)
    generator = torch.Generator().manual_seed(task.seed)
    reports: dict[str, LayerReport] = {}
    masks: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    with progress("sparsify", len(layers), "layers") as bar:
        for block in sorted({layer.block for layer in layers}):
            here = [layer for layer in layers if layer.block == block]
            inputs = _inputs(model, here, batches, method)
            for layer in here:
                pattern = recipe.pattern_for(shares[layer.name]) if method.patterned else None
                pruned = method.prune(_plain(layer.weight), inputs.get(layer.name), pattern, generator)
                layer.weight.copy_(pruned.weight)
                masks[layer.name] = pruned.mask.cpu()
                tensors |= {f"{layer.name}.{name}": value for name, value in pruned.tensors.items()}
                reports[layer.name] = LayerReport(layer.name, *layer.shape, zeros(layer), dict(pruned.facts))
                bar.advance(1)
    found = tuple(reports[layer.name] for layer in layers)
    size = sum(report.outputs * report.inputs for report in found)
    sparsity = sum(report.sparsity * report.outputs * report.inputs for report in found) / size
    tokens = sum(int(batch.tokens.numel()) for batch in batches)
    return Sparsified(found, masks, sparsity, time.perf_counter() - began, tokens, tensors)


def _inputs(model: Any, layers: Sequence[Layer], batches: Sequence[Any], method: Method) -> dict[str, InputStatistics]:
    if method.need is None:
        return {}
    block = layers[0].block
    with watched(layers, method.need) as found:
        for batch in batches:
            if block < 0:
                model.logits(batch.tokens)
            else:
                model.read(batch.tokens, [f"blocks.{block}.hook_resid_post"])
    for name, statistics in found.items():
        statistics.require_finite(name)
    return found


def _calibration(model: Any, rows: Any, recipe: Recipe) -> list[Any]:
    model.sites()  # the first look at the model's sites runs a text of its own: now, not while inputs are counted
    found, positions = [], 0
    for batch in rows.batches(ROWS_PER_BATCH):
        found.append(batch)
        positions += int(batch.tokens.numel())
        if positions >= recipe.calibration_tokens:
            break
    if not found:
        raise TextError("the calibration text is empty; give some text with --calibration")
    return found


def _shares(task: _Task) -> Mapping[str, float | None]:
    """Return each layer's sparsity; None where the pattern says it."""
    layers, recipe = task.layers, task.recipe
    if not task.method.patterned:
        return {}
    shapes = {layer.name: layer.shape for layer in layers}
    sparsity = recipe.pattern_for(recipe.sparsity).sparsity
    if isinstance(recipe.pattern_for(recipe.sparsity), NofM):
        return dict.fromkeys(shapes)  # N:M says its own
    if recipe.allocation == "erk":
        return erk(shapes, sparsity)
    if recipe.allocation == "global":
        return by_global_score({layer.name: layer.weight.abs().float() for layer in layers}, sparsity)
    if recipe.allocation == "sensitivity":
        return by_sensitivity(shapes, sparsity, _Harm(task))
    return uniform(shapes, sparsity)


class _Harm:
    """Rise in loss on the calibration text when one layer alone is pruned."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._layers = {layer.name: layer for layer in task.layers}
        self._batches = task.batches[:2]
        self._dense = loss(task.model, self._batches)
        self._inputs: dict[str, InputStatistics] = {}
        for block in sorted({layer.block for layer in task.layers}):
            here = [layer for layer in task.layers if layer.block == block]
            self._inputs |= _inputs(task.model, here, self._batches, task.method)

    def __call__(self, name: str, sparsity: float) -> float:
        layer, task = self._layers[name], self._task
        before = layer.weight.clone()
        generator = torch.Generator().manual_seed(task.seed)
        pattern = task.recipe.pattern_for(sparsity)
        layer.weight.copy_(task.method.prune(_plain(before), self._inputs.get(name), pattern, generator).weight)
        try:
            return loss(task.model, self._batches) - self._dense
        finally:
            layer.weight.copy_(before)


def _plain(weight: Tensor) -> Tensor:
    """A weight as every method takes it: a float32 copy in main memory, rows one after the other."""
    return weight.detach().float().cpu().contiguous().clone()


# whole neurons and heads ----------------------------------------------------------------------------------------------


def _structured(model: Any, batches: Sequence[Any], method: Structured, began: float) -> Sparsified:
    config = model.plain.config
    wanted = [(kind, share) for kind, share in (("neurons", method.neurons), ("heads", method.heads)) if share]
    todo = [(branch, share) for kind, share in wanted for branch in branches(model.plain, kind)]
    original = {layer.name: layer.weight.numel() for layer in linear_layers(model.plain)}
    changes: dict[str, Any] = {}
    facts: dict[str, dict[str, float]] = {}
    with progress("sparsify", len(todo), "branches") as bar:
        for branch, share in sorted(todo, key=lambda item: item[0].block):
            kept = _choose(model, branch, share, batches)
            facts[branch.out.name] = {f"{branch.kind}_kept": float(kept.sum()), branch.kind: float(len(kept))}
            said = smaller(config, branch, int(kept.sum()))
            if said is None:
                silence(branch, kept)
            else:
                shrink(model.plain, branch, kept)
                changes |= said
            bar.advance(1)
    for key, value in changes.items():
        setattr(config, key, value)
    layers = linear_layers(model.plain)
    reports = tuple(LayerReport(layer.name, *layer.shape, zeros(layer), facts.get(layer.name, {})) for layer in layers)
    left = sum(int((layer.weight != 0).sum()) for layer in layers)
    tokens = sum(int(batch.tokens.numel()) for batch in batches)
    sparsity = 1 - left / sum(original.values())
    return Sparsified(reports, {}, sparsity, time.perf_counter() - began, tokens, config=changes)


def _choose(model: Any, branch: Branch, share: float, batches: Sequence[Any]) -> Tensor:
    """Return which units of a branch stay, from one pass over the calibration text up to its block."""
    found = Contribution(branch)

    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        found.update(rearrange(given[0], "... d -> (...) d").cpu())

    handle = branch.out.module.register_forward_pre_hook(hook)
    try:
        for batch in batches:
            model.read(batch.tokens, [f"blocks.{branch.block}.hook_resid_post"])
    finally:
        handle.remove()
    score = found.score[None]
    if round(share * score.shape[1]) == score.shape[1]:
        raise ConfigError(f"{share:g} of {score.shape[1]} {branch.kind} is all of them; lower method.{branch.kind}")
    return keep_largest(score, score.shape[1] - round(share * score.shape[1]))[0]
