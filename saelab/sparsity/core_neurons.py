"""Core neurons: after a text's first tokens, its MLPs run with only the neurons that those tokens used most.

CoreInfer (Wang et al. 2024, arXiv 2410.18311). In the first ``prefix`` tokens of a row of text the model runs whole.
A token's core neurons are the ``alpha`` share of an MLP's neurons that are strongest on it; the row's core neurons are
the ``beta`` share that are core neurons of most of those tokens. The rest of the row runs on a smaller dense MLP, whose
matrices are gathered once per row. The result is not the dense model's: it is *lossy*, and whoever uses it measures by
how much.

Our design: strength is magnitude (the paper's models have ReLU-like activations, where the two agree but for sign),
and neurons that are core equally often are ordered by mean magnitude. A row of tokens is taken for the paper's
"sentence". The prefix is part of the same forward pass, since nothing in an MLP looks at another token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from saelab.core.config import Config
from saelab.core.errors import ConfigError, SiteError
from saelab.sparsity.layers import Layer
from saelab.sparsity.measure import Cost, measure
from saelab.sparsity.methods.structured import Branch, branches


class CoreConfig(Config):
    """Which neurons of an MLP run after the prefix."""

    alpha: float = Field(default=0.05, gt=0, le=1)
    """Share of the neurons that count as a token's own."""
    beta: float = Field(default=0.6, gt=0, le=1)
    """Share of the neurons that run."""
    first_layer: int = Field(default=1, ge=0)
    """Blocks before this one run whole: the first MLP of a model depends on single tokens, not on the text."""
    prefix: int = Field(default=64, ge=1)
    """Tokens at the start of each row that run whole and choose the neurons."""


def core_sets(h: Float[Tensor, "b t width"], alpha: float, beta: float) -> Int[Tensor, "b kept"]:
    """Return each text's core neurons, in rising order, from the activations ``h`` of some of its tokens."""
    strength = h.abs().float()
    taken = strength.topk(_count(alpha, h.shape[2]), dim=2, sorted=False).indices.flatten(1)
    mean = strength.mean(1)
    # Less than one half, so that it only orders neurons that are core on equally many tokens.
    counts = 0.49 * mean / mean.amax(1, keepdim=True).clamp_min(1e-30)
    counts.scatter_add_(1, taken, torch.ones_like(taken, dtype=counts.dtype))
    return counts.topk(_count(beta, h.shape[2]), dim=1, sorted=False).indices.sort(dim=1).values


def core_neurons(h: Float[Tensor, "t width"], alpha: float, beta: float) -> Int[Tensor, " kept"]:
    """Return the core neurons of one text."""
    return core_sets(h[None], alpha, beta)[0]


def _count(share: float, width: int) -> int:
    return max(1, round(share * width))


@contextmanager
def running_core(model: Any, config: CoreConfig, fixed: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Run a subject model on core neurons for the length of a ``with`` block.

    With ``fixed`` (name of an MLP's last layer -> neurons) every row runs on the same neurons after the prefix: the
    control. :meth:`read` and :meth:`logits` see it wherever the plain model does the work.

    Raises :class:`ModelError` when the model's MLPs are of an unknown kind, :class:`ConfigError` for a prefix that
    leaves nothing of the context.
    """
    if config.prefix >= model.n_ctx:
        raise ConfigError(
            f"prefix {config.prefix} takes the whole context of {model.name}, which is {model.n_ctx}; shorten it"
        )
    undo: list[Callable[[], None]] = []
    try:
        for branch in core_branches(model, config):
            neurons = None if fixed is None else fixed[branch.out.name]
            undo.append(_install(model.plain, branch, config, neurons))
        yield
    finally:
        for action in undo:
            action()


def after_prefix(batches: Iterable[Any], prefix: int) -> Iterator[SimpleNamespace]:
    """Yield token batches in which only the predictions that are made after the prefix count."""
    for batch in batches:
        keep = batch.keep.clone()
        keep[:, : prefix + 1] = False
        yield SimpleNamespace(tokens=batch.tokens, keep=keep)


def core_cost(
    model: Any, config: CoreConfig, batches: Iterable[Any], fixed: Mapping[str, Tensor] | None = None
) -> Cost:
    """Measure loss and KL of the predictions after the prefix. Raises :class:`TextError` when there are none."""
    return measure(model, _OnCore(model, config, fixed), after_prefix(batches, config.prefix), bar=False)


class _OnCore:
    """The model on core neurons, for the length of each call."""

    def __init__(self, model: Any, config: CoreConfig, fixed: Mapping[str, Tensor] | None) -> None:
        self._model, self._config, self._fixed = model, config, fixed

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits."""
        with running_core(self._model, self._config, self._fixed):
            found: Tensor = self._model.logits(tokens)
        return found


def core_branches(model: Any, config: CoreConfig) -> list[Branch]:
    """Return the MLPs that run on core neurons. Raises :class:`ModelError`, :class:`ConfigError`."""
    found = [branch for branch in branches(model.plain, "neurons") if branch.block >= config.first_layer]
    if not found:
        raise ConfigError(
            f"first_layer {config.first_layer} leaves no MLP: {model.name} has {model.n_layers} blocks; lower it"
        )
    return found


def require_whole(model: Any, config: CoreConfig, sites: Sequence[str]) -> None:
    """Raise :class:`SiteError` for a site that does not have its usual width, or is not seen, on core neurons."""
    inside = tuple(f"{_parent(branch.out.name)}." for branch in core_branches(model, config))
    for name in sites:
        address = model.site(name).address
        if address is None:
            raise SiteError(f"{name} comes from the bridge, which runs every neuron; harvest it without sparse: core")
        if address.module.startswith(inside):
            raise SiteError(
                f"{name} is inside an MLP, of which only the core neurons run; harvest it without sparse: core, or "
                "harvest hook_mlp_out"
            )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class _Gathered(nn.Module):
    """A linear layer of an MLP, as a whole or with some of the neurons; ``by_rows``: they are its outputs."""

    def __init__(self, layer: Layer, by_rows: bool) -> None:
        super().__init__()
        # One neuron is one contiguous row, whichever side of the layer it is on.
        self._units = (layer.weight if by_rows else layer.weight.T).contiguous()
        bias = getattr(layer.module, "bias", None)
        self._whole_bias = None if bias is None else bias.detach()
        self._by_rows = by_rows
        self.seen: Tensor | None = None
        self.choose(None)

    def choose(self, neurons: Tensor | None) -> None:
        """Gather the slices of some neurons; None: all of them."""
        self._now = self._units if neurons is None else self._units.index_select(0, neurons)
        self._bias = self._whole_bias
        if self._by_rows and neurons is not None and self._whole_bias is not None:
            self._bias = self._whole_bias.index_select(0, neurons)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        if not self._by_rows:
            self.seen = x
        return F.linear(x, self._now if self._by_rows else self._now.T, self._bias)


def _install(plain: nn.Module, branch: Branch, config: CoreConfig, fixed: Tensor | None) -> Callable[[], None]:
    """Make one MLP run on core neurons; return what undoes it."""
    mlp: Any = plain.get_submodule(_parent(branch.out.name))
    layers = {layer.name.rpartition(".")[2]: layer for layer in (*branch.into, branch.out)}
    gathered = {last: _Gathered(layer, layer is not branch.out) for last, layer in layers.items()}
    for last, module in gathered.items():
        setattr(mlp, last, module)
    out = gathered[branch.out.name.rpartition(".")[2]]
    whole = mlp.forward

    def choose(neurons: Tensor | None) -> None:
        for module in gathered.values():
            module.choose(neurons)

    def forward(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        start: Tensor = whole(x[:, : config.prefix])
        if x.shape[1] <= config.prefix:
            return start
        h, parts = out.seen, []
        assert h is not None, "the MLP did not come by its last layer"
        sets = core_sets(h, config.alpha, config.beta) if fixed is None else fixed.expand(len(x), -1)
        for row, neurons in zip(x[:, config.prefix :], sets, strict=True):
            choose(neurons)
            parts.append(whole(row[None]))
        choose(None)
        return torch.cat([start, torch.cat(parts)], dim=1)

    mlp.forward = forward

    def undo() -> None:
        del mlp.forward
        for last, layer in layers.items():
            setattr(mlp, last, layer.module)

    return undo
