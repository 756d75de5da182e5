"""What an SAE is told about a training step, and what it hands back."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels import Impl, Precision


@dataclass(frozen=True, eq=False)
class StepContext:
    """State of the training run that the loss of one step may depend on."""

    dead: Int[Tensor, " n_dead"] | None = None
    """Features that are dead now; None when there are none or AuxK is off."""
    aux_k: int = 0
    """Dead features that AuxK activates per token."""
    aux_coefficient: float = 0.0
    """Weight of the AuxK loss."""
    k_factor: float = 1.0
    """The sparsity target (k, or a budget) is multiplied by this; above 1 during the k warm-up."""
    sparsity_factor: float = 1.0
    """Sparsity penalties are multiplied by this; below 1 while they warm up."""
    precision: Precision = "f32"
    """How the encoder's product is computed; see :func:`saelab.kernels.select_topk`."""
    impl: Impl = "auto"
    """Twin of the kernels."""


@dataclass(frozen=True, eq=False)
class Block:
    """Activations of a few features for all tokens, dense: what AuxK reconstructs the residual with."""

    features: Int[Tensor, " n_block"]
    """Which features."""
    values: Float[Tensor, "n n_block"]
    """Their activations, at least 0."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """The code of a training batch, and the activations of dead features when AuxK is on."""

    code: SparseCode
    """Activations in scaled units, with gradient."""
    aux: Block | SparseCode | None = None
    """Activations of dead features, dense when they are few."""
    pre: Float[Tensor, " nnz"] | None = None
    """Pre-activations of the code's entries, with gradient."""


@dataclass(frozen=True, eq=False)
class TrainingPass:
    """Losses of one batch."""

    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Terms of the loss, already weighted; their sum is minimised. ``mse`` is always there."""
    code: SparseCode | None = None
    """The code, without gradient."""
    x_hat: Float[Tensor, "n d_out"] | None = None
    """The reconstruction in scaled units, with gradient."""
    mse: Float[Tensor, ""] | None = None
    """Squared error of the reconstruction (sum over d, mean over tokens), where ``losses["mse"]`` is not just that."""

    @property
    def squared_error(self) -> Float[Tensor, ""]:
        """Squared error of the reconstruction, without gradient: what the FVU is made of."""
        return (self.losses["mse"] if self.mse is None else self.mse).detach()
