"""A weight in training, seen as (out, in), whatever holds it: a model's linear layer, or a matrix of an SAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saelab.sparsity.layers import chosen, linear_layers


@dataclass(frozen=True, eq=False)
class Target:
    """One weight that is made sparse."""

    name: str
    """What recipes, masks and reports call it."""
    parameter: nn.Parameter
    """What the optimiser trains."""
    transposed: bool
    """Whether the parameter is (in, out)."""
    module: nn.Module | None = None
    """The linear layer it is the weight of, where it is one."""

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight, one row per output: a view, so writing to it changes the parameter."""
        return self._oriented(self.parameter.data)

    @property
    def gradient(self) -> Float[Tensor, "out in"] | None:
        """Its gradient, as a view; None before the first backward pass."""
        return None if self.parameter.grad is None else self._oriented(self.parameter.grad)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.weight.shape
        return rows, columns

    def _oriented(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor

    def oriented(self, tensor: Tensor) -> Float[Tensor, "out in"]:
        """Return a tensor of the parameter's shape (an optimiser's moment) as (out, in)."""
        return self._oriented(tensor)


def targets_of_model(plain: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Target]:
    """Return the weights of a Hugging Face model's linear layers; see :func:`saelab.sparsity.layers.linear_layers`."""
    layers = linear_layers(plain, include, exclude)
    return [Target(layer.name, layer.parameter, layer.transposed, layer.module) for layer in layers]


def targets_of_matrices(
    matrices: Mapping[str, tuple[nn.Parameter, bool]], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[Target]:
    """Return named matrices (parameter, whether it is (in, out)) as targets. Raises :class:`ConfigError`."""
    return [Target(name, *matrices[name]) for name in chosen(list(matrices), include, exclude)]
