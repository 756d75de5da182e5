"""How an SAE is trained."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Field, SerializeAsAny, WrapValidator, model_validator

from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.kernels import Precision
from saelab.sae import ARCHITECTURES, SAEConfig
from saelab.sparsity.training.recipe import TrainingRecipe

__all__ = ["AnySAEConfig", "FitConfig", "TrainingConfig"]

Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingConfig(Config):
    """Optimisation of one SAE. Steps are counted by the batch; the last one may go past ``tokens``."""

    tokens: int = Field(default=10_000_000, gt=0)
    """Tokens to train on; the data are repeated when they are fewer."""
    batch_size: int = Field(default=4096, gt=0)
    """Tokens per optimiser step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of Adam; null: 2e-4 / sqrt(d_sae / 2^14), the scaling law of Gao et al. 2024."""
    lr_warmup: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises linearly from 0."""
    lr_decay: Fraction = 0.2
    """Fraction of the steps, at the end, in which it falls linearly to 0."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay of the mean gradient."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay of the mean squared gradient."""
    eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon (Gao et al. 2024)."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient of loss / d_in (the loss is about d_in at the start); null: no clipping."""
    k_warmup: Fraction = 0.1
    """Fraction of the steps in which k falls linearly from ``k_warmup_factor`` times its value; 0: never more than k.

    Our default: with it fewer features die at the same FVU (docs/quality.md)."""
    k_warmup_factor: float = Field(default=4.0, ge=1)
    """Where the k warm-up begins, in multiples of k."""
    sparsity_warmup: Fraction = 0.05
    """Fraction of the steps in which sparsity penalties, where an architecture has them, rise linearly from 0."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK loss; 0 turns AuxK off."""
    aux_k: int | None = Field(default=None, gt=0)
    """Dead features that AuxK activates per token; null: d_in / 2."""
    dead_after_tokens: int | None = Field(default=None, gt=0)
    """A feature that has not fired for this many tokens is dead; null: a tenth of ``tokens``, 10 M at most."""
    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    """What b_dec is at the start, over the first ``init_tokens`` tokens."""
    init_tokens: int = Field(default=16384, gt=0)
    """Tokens looked at before training, for the input scale and b_dec."""
    precision: Precision = "f32"
    """The encoder's product; ``bf16`` chooses candidates in bfloat16 and recomputes them in float32."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1`` ...; auto: a GPU when there is one."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints (several runs on one pass: the smallest counts)."""
    log_every: int = Field(default=50, gt=0)
    """Steps between lines of ``training.jsonl``."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.lr_warmup + self.lr_decay > 1:
            raise ValueError(
                f"lr_warmup + lr_decay = {self.lr_warmup + self.lr_decay:g} is more than the whole run (1); lower one"
            )
        return self

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return math.ceil(self.tokens / self.batch_size)

    def peak_lr(self, d_sae: int) -> float:
        """Peak learning rate for ``d_sae`` features."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature is dead."""
        return self.dead_after_tokens if self.dead_after_tokens is not None else min(10_000_000, self.tokens // 10 + 1)


def _known_architecture(value: Any) -> Any:
    """Name the nearest architecture for a wrong one, and take ``topk`` when none is given."""
    if isinstance(value, Mapping):
        name = value.get("architecture", "topk")
        try:
            ARCHITECTURES[str(name)]
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return {"architecture": name, **value}
    return value


_MEMBERS = tuple(architecture.config for _, architecture in ARCHITECTURES.items())


def _registered_later(value: Any, handler: Callable[[Any], Any]) -> Any:
    """Take the config of an architecture that a user has registered, which the union cannot know."""
    name = value.get("architecture") if isinstance(value, Mapping) else getattr(value, "architecture", None)
    cls = ARCHITECTURES[str(name)].config if name in ARCHITECTURES else None
    if cls is None or cls in _MEMBERS:
        return handler(value)
    return value if isinstance(value, cls) else cls.model_validate(value)


if TYPE_CHECKING:
    AnySAEConfig = SAEConfig
else:
    AnySAEConfig = Annotated[
        SerializeAsAny[Annotated[Union[_MEMBERS], Field(discriminator="architecture")]],  # noqa: UP007
        WrapValidator(_registered_later),
        BeforeValidator(_known_architecture),
    ]
"""The config of any registered architecture, told apart by its ``architecture`` key."""


class FitConfig(Config):
    """One SAE and its training."""

    name: str = Field(default="sae", pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")
    """Name of the run: its folder below ``out``."""
    sae: AnySAEConfig
    """The SAE: architecture and sizes."""
    training: TrainingConfig = TrainingConfig()
    """The training."""
    start: str | None = None
    """SAE folder to start from (fine-tuning), of the architecture and sizes of ``sae``; null: random weights."""
    sparsity: TrainingRecipe | None = None
    """How the SAE's own matrices (W_enc, W_dec ...) are kept sparse; null: they are not."""
