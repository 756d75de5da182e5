"""The linear layers of a model that may be pruned, whatever their class: ``nn.Linear`` or GPT-2's ``Conv1D``."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saelab.core.errors import ConfigError, ModelError, nearest


@dataclass(frozen=True)
class Layer:
    """One linear layer."""

    name: str
    """Path of its module in the Hugging Face model."""
    module: nn.Module
    """The module; its ``weight`` is (out, in), or (in, out) when ``transposed``."""
    transposed: bool
    """Whether the module is a ``Conv1D``."""
    block: int
    """Transformer block it is in; -1 outside the blocks."""

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight, one row per output; a view of the parameter, so writing to it changes the model."""
        weight = self.parameter.data
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.weight.shape
        return rows, columns


def linear_layers(plain: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of a Hugging Face model that may be pruned, in the order of its modules.

    Embeddings and norms are no linear layers; the unembedding is one and is left out, as are weights tied to it.
    ``include`` and ``exclude`` are shell patterns on the layers' names.

    Raises :class:`ModelError` for a model without linear layers, :class:`ConfigError` for a pattern that fits none.
    """
    found = _all_layers(plain)
    if not found:
        raise ModelError(f"{type(plain).__name__} has no linear layers, so there is nothing to prune")
    names = set(chosen([layer.name for layer in found], include, exclude))
    return [layer for layer in found if layer.name in names]


def chosen(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that fit ``include`` and not ``exclude``; raise :class:`ConfigError` where none does."""
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"no layer is called '{pattern}'{nearest(pattern, names)} (the first is {names[0]})")
    found = [name for name in names if _fits(name, include) and not _fits(name, exclude)]
    if not found:
        raise ConfigError("include and exclude leave no layer to prune; exclude less")
    return found


def _all_layers(plain: nn.Module) -> list[Layer]:
    from transformers.pytorch_utils import Conv1D

    head = getattr(plain, "get_output_embeddings", lambda: None)()
    embedding = getattr(plain, "get_input_embeddings", lambda: None)()
    kept_out = {id(m.weight) for m in (head, embedding) if m is not None}
    found = []
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept_out:
            found.append(Layer(name, module, isinstance(module, Conv1D), block_of(name)))
    return found


def block_of(name: str) -> int:
    """Return the first number in a module's path: the number of its transformer block; -1 when there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else -1


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def zeros(layer: Layer) -> float:
    """Return the share of a layer's weights that are exactly zero, as counted."""
    return int((layer.weight == 0).sum()) / max(layer.weight.numel(), 1)
