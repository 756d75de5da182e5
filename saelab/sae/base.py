"""``SAE``: what every architecture is. A subclass says how the entries of the code are chosen.

Shapes: N tokens, activations (N, d_in), code over d_sae features, reconstruction (N, d_out) with d_out = d_in unless
the architecture says otherwise. Equations are in *scaled* units, ``x_s = s x`` with the scalar ``s = input_scale``
chosen so that the mean of ``||x_s||^2`` is d_in:

    z     = (x_s - b_dec) W_enc + b_enc        pre-activations
    f     = sparse selection of z              the code, in scaled units
    x_hat = (f W_dec + b_dec) / s              raw units again

``encode``, ``decode`` and ``forward`` take and return raw activations; :meth:`SAE.fold_scale` gives s = 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.core.config import Config
from saelab.core.errors import ActivationError
from saelab.kernels import Impl, decode, pre_activations_and_block, pre_activations_at, select_above, select_topk
from saelab.kernels.segments import rows_of
from saelab.sae.auxk import decode_with_aux, encode_with_aux
from saelab.sae.decoder import normalize_rows_, remove_parallel_
from saelab.sae.step import Encoding, StepContext, TrainingPass

__all__ = ["SAE", "SAEConfig"]


class SAEConfig(Config):
    """What every architecture is configured by."""

    architecture: str
    """Name of the architecture (see ``saelab.sae.ARCHITECTURES``)."""
    d_in: int = Field(gt=0)
    """Width of the activations."""
    d_sae: int = Field(gt=0)
    """Number of features."""
    input_scale: float | None = Field(default=None, gt=0)
    """Activations are multiplied by this before encoding; null: measured when training starts (1 before that)."""

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in


class SAE(nn.Module, ABC):
    """A sparse autoencoder; see the module's docstring for the equations and units.

    Parameters: ``w_enc_t`` (d_sae, d_in), the transposed encoder, which is the layout its kernels want; ``b_enc``
    (d_sae,); ``W_dec`` (d_sae, d_out); ``b_dec`` (d_out,). ``W_enc`` (d_in, d_sae) is a view.
    """

    unit_norm_decoder: ClassVar[bool] = True
    """Whether decoder rows are kept at norm 1 in training."""
    in_code_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers that are measured in scaled units, so :meth:`fold_scale` divides them by s."""
    encoder_start: ClassVar[float] = 0.2
    """Norm of encoder columns at the start. Small ones soon point where the data want them; at norm 1 the random start
    still costs error after hundreds of steps (``benchmarks/encoder_start.py``)."""
    needs_gradient: ClassVar[bool] = False
    """Whether training needs ``Batch.gradient``."""
    needs_pairs: ClassVar[bool] = False
    """Whether training needs batches of pairs (rows 2i and 2i + 1)."""

    def __init__(self, config: SAEConfig, seed: int | None = 0) -> None:
        """Initialise with random unit decoder rows and the encoder tied to them; ``seed=None`` leaves zeros."""
        super().__init__()
        self.config = config
        self.folder: Path | None = None
        """The folder (or another library's file) that it was loaded from."""
        self.site: str | None = None
        """Where in its model it belongs, as the folder it was loaded from says."""
        self.target_site: str | None = None
        """Where a transcoder writes."""
        self.w_enc_t = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        if seed is not None:
            self.reset(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw decoder rows uniformly from the unit sphere; the encoder is ``encoder_start`` times their transpose."""
        self.W_dec.normal_(generator=generator)
        normalize_rows_(self.W_dec)
        self.w_enc_t.copy_(self.W_dec).mul_(self.encoder_start)

    def extra_repr(self) -> str:
        """Show the sizes when the SAE is printed."""
        where = f", site={self.site}" if self.site else ""
        return f"{self.config.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{where}"

    # Sizes and views -------------------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.config.d_sae

    @property
    def input_scale(self) -> float:
        """Scalar s by which activations are multiplied inside."""
        return 1.0 if self.config.input_scale is None else self.config.input_scale

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder as (d_in, d_sae): a view of ``w_enc_t``."""
        return self.w_enc_t.T

    @property
    def threshold(self) -> Float[Tensor, " d_sae"] | None:
        """Activation below which a feature is off at inference, in scaled units; None where there is none."""
        return None

    @property
    def center(self) -> Float[Tensor, " d_in"] | None:
        """What is subtracted from the scaled input before encoding."""
        return self.b_dec

    # Inference: raw activations in and out ---------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "..."]) -> SparseCode:
        """Return the code of raw activations (N, d_in); its values are in scaled units.

        Raises :class:`ActivationError` when ``x`` is not a matrix of width d_in.
        """
        return self.encode_scaled(self._scaled(x))

    def decode(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        """Return the reconstruction, in raw units, of a code."""
        if code.d_sae != self.d_sae:
            raise ActivationError(f"the code is over {code.d_sae} features, this SAE has {self.d_sae}")
        x_hat = decode(code, self.W_dec, self.b_dec)
        return x_hat if self.input_scale == 1.0 else x_hat / self.input_scale

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "n d_out"]:
        """Return the reconstruction of raw activations (N, d_in)."""
        return self.reconstruct(x)

    def reconstruct(self, x: Float[Tensor, "..."], code: SparseCode | None = None) -> Float[Tensor, "n d_out"]:
        """Return the reconstruction, in raw units, of raw activations whose code is ``code`` (default: ``encode(x)``).

        This is ``decode(code)`` and what reaches the reconstruction past the code (:meth:`add_skip`).
        """
        return self.add_skip(self.decode(self.encode(x) if code is None else code), x.to(self.W_dec.dtype))

    @abstractmethod
    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the code of scaled activations in inference mode: each token on its own."""

    def _scaled(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            raise ActivationError(
                f"activations have shape {tuple(x.shape)}, expected (tokens, {self.d_in}); "
                "flatten the leading dimensions first: x.reshape(-1, x.shape[-1])"
            )
        if x.shape[1] != self.d_in:
            raise ActivationError(
                f"activations are {x.shape[1]} wide, this SAE was made for d_in = {self.d_in}; "
                "is it the SAE of another site or model?"
            )
        x = x.to(self.W_dec.dtype)
        return x if self.input_scale == 1.0 else x * self.input_scale

    # Training: scaled batches ----------------------------------------------------------------------------------------

    @abstractmethod
    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the code of a scaled batch in training mode (tokens may compete), with gradient."""

    def extra_losses(self, batch: Batch, encoding: Encoding, context: StepContext) -> dict[str, Float[Tensor, ""]]:
        """Return further weighted loss terms (a sparsity penalty, say)."""
        return {}

    def scale_batch(self, batch: Batch) -> Batch:
        """Return a raw batch in scaled units (a gradient scales by 1/s, the chain rule)."""
        s = self.input_scale
        return Batch(
            batch.x * s,
            None if batch.target is None else batch.target * s,
            None if batch.gradient is None else batch.gradient / s,
        )

    def training_pass(self, batch: Batch, context: StepContext) -> TrainingPass:
        """Return the losses of a scaled batch: MSE (sum over d, mean over tokens), AuxK, and the architecture's own.

        AuxK (Gao et al. 2024, appendix A.2): dead features reconstruct the residual ``e = x - x_hat``, taken as
        constant, without bias: ``aux_coefficient * mean_t ||e_t - f_aux,t W_dec||^2``.
        """
        encoding = self.encode_training(batch, context)
        target = batch.x if batch.target is None else batch.target
        impl = self.decode_impl(encoding.code, context)
        x_hat, e_hat = decode_with_aux(encoding, self.W_dec, self.b_dec, impl)
        x_hat = self.add_skip(x_hat, batch.x)
        residual = target - x_hat
        losses = {"mse": _squared_error(residual)}
        if e_hat is not None:
            losses["aux"] = context.aux_coefficient * _squared_error(residual.detach() - e_hat)
        losses |= self.extra_losses(batch, encoding, context)
        return TrainingPass(losses, encoding.code.detach(), x_hat)

    def decode_impl(self, code: SparseCode, context: StepContext) -> Impl:
        """Return the twin that decodes a code in training."""
        return context.impl

    def add_skip(self, x_hat: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Add what reaches the (scaled) reconstruction past the code: nothing, but in transcoders with a skip path."""
        return x_hat

    def choose_topk(
        self, x: Float[Tensor, "n d_in"], k: int, context: StepContext
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Return the k largest pre-activations of each scaled token, without gradient."""
        found = select_topk(
            self.centered(x), self.w_enc_t, self.b_enc, k, precision=context.precision, impl=context.impl
        )
        return found.indices, found.values

    def encoding_at(  # noqa: PLR0917
        self,
        x: Float[Tensor, "n d_in"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " n_plus_1"],
        known: Float[Tensor, " nnz"] | None,
        context: StepContext,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> Encoding:
        """Return activations, with gradient, at chosen entries, and those of dead features that AuxK asks for.

        ``activation`` is applied to the pre-activations at the entries. This is the tail of ``encode_training`` for
        every architecture that first chooses entries.
        """
        return encode_with_aux(x, self.center, self.w_enc_t, self.b_enc, indices, offsets, known, context, activation)

    @torch.no_grad()
    def encode_as_trained(self, batch: Batch) -> SparseCode:
        """Return the code of a raw batch as training chooses it: tokens may compete. Nothing is learned from it.

        Where inference goes by thresholds that training has learned, this is what to compare it with.
        """
        was = self.training
        self.eval()
        try:
            return self.encode_training(self.scale_batch(batch), StepContext()).code
        finally:
            self.train(was)

    def encode_above(
        self, x: Float[Tensor, "n d_in"], threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"]
    ) -> SparseCode:
        """Return all activations z of scaled tokens with z > threshold, each token on its own.

        The values carry gradient, the choice does not. A threshold below 0 counts as 0.
        """
        found = select_above(self.centered(x), self.w_enc_t.detach(), self.b_enc.detach(), threshold.clamp(min=0))
        rows = rows_of(found.offsets, found.indices.numel())
        values = pre_activations_at(
            x, self.w_enc_t, self.b_enc, found.indices, rows, center=self.center, known=found.values
        )
        return SparseCode(found.indices, values, found.offsets, self.d_sae)

    def pre_activations_at(
        self, x: Float[Tensor, "n d_in"], indices: Int[Tensor, " nnz"], rows: Int[Tensor, " nnz"], impl: Impl = "auto"
    ) -> Float[Tensor, " nnz"]:
        """Return z of scaled tokens at chosen entries, with gradient."""
        return pre_activations_and_block(
            x, self.w_enc_t, self.b_enc, indices, rows, indices[:0], center=self.center, impl=impl
        )[0]

    def centered(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return scaled tokens minus :attr:`center`, without gradient."""
        return x.detach() if self.center is None else x.detach() - self.center.detach()

    def before_step(self) -> None:
        """Change gradients before the optimiser step: remove what would only change decoder norms."""
        if self.unit_norm_decoder and self.W_dec.grad is not None:
            remove_parallel_(self.W_dec.grad, self.W_dec)

    def after_step(self) -> None:
        """Change parameters after the optimiser step: bring decoder rows back to norm 1."""
        if self.unit_norm_decoder:
            normalize_rows_(self.W_dec)

    # Weights ---------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers under the names and orientation used on disk (``W_enc`` (d_in, d_sae))."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return {"W_enc": state.pop("w_enc_t").T, **state}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors named as by :meth:`tensors` (all must be there) into this SAE."""
        own = self.tensors()
        assert own.keys() == tensors.keys()
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def fold_scale(self) -> Self:
        """Return an SAE with the same reconstructions and ``input_scale = 1``; its code is 1/s times this one's.

        With z linear in (x, biases), dividing biases (and thresholds) by s divides z and f by s, so decoder rows keep
        their norm.
        """
        folded = type(self)(self.config.model_copy(update={"input_scale": 1.0}), seed=None).to(self.W_dec)
        folded.load_tensors(self.tensors())
        for name in self.in_code_units:
            folded.get_parameter_or_buffer(name).div_(self.input_scale)
        return folded.train(self.training).requires_grad_(self.W_dec.requires_grad)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """Return a parameter or buffer by name."""
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor


def _squared_error(residual: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum over d, mean over tokens; 0 without tokens."""
    return residual.square().sum() / max(residual.shape[0], 1)
