"""The fourth axis: when the mask changes, and how sparse it is then. Times are shares of the training, from 0 to 1."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from saelab.core.config import Config
from saelab.sparsity.pattern import NofM, Pattern

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Config, ABC):
    """When masks are made anew. Steps count from 0 to ``steps - 1``."""

    follows: ClassVar[bool] = False
    """Whether the mask goes on following the weights to the end, so that the last one is made after the last step."""

    @abstractmethod
    def due(self, step: int, steps: int) -> bool:
        """Whether the mask is made anew at this step."""

    def sparsity(self, step: int, steps: int, target: float) -> float:
        """Return the sparsity of a mask made at this step, on the way to ``target``."""
        return target

    def pattern(self, step: int, steps: int, final: Pattern) -> Pattern | None:
        """Return the pattern of a mask made at this step, on the way to ``final``; None: dense."""
        return final


class Once(Schedule):
    """One mask, made at one time and kept: static sparse training (``at`` 0), or one-shot pruning on the way."""

    name: Literal["once"] = "once"
    at: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training before the mask is made."""

    def due(self, step: int, steps: int) -> bool:
        """At one step."""
        return step == int(self.at * steps)


class Release(Schedule):
    """SPDF (Thangarasa et al. 2023): a static mask from the first step, and at ``until`` every weight trains."""

    name: Literal["release"] = "release"
    until: float = Field(default=0.5, gt=0, lt=1)
    """Share of the training after which the mask is lifted."""

    def due(self, step: int, steps: int) -> bool:
        """At the first step and at the release."""
        return step in (0, int(self.until * steps))

    def sparsity(self, step: int, steps: int, target: float) -> float:
        """Return the target, then 0."""
        return 0.0 if step and step >= int(self.until * steps) else target

    def pattern(self, step: int, steps: int, final: Pattern) -> Pattern | None:
        """Return the pattern, then none."""
        return None if step and step >= int(self.until * steps) else final


class Cubic(Schedule):
    """Gradual pruning (Zhu & Gupta 2017): s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

    The window of 25 % to 75 % of the training is that of Jin et al. ("The journey matters").
    """

    name: Literal["cubic"] = "cubic"
    initial: float = Field(default=0.0, ge=0, lt=1)
    """s_i: sparsity at the start of the window."""
    start: Share = 0.25
    """t_0, as a share of the training."""
    stop: Share = 0.75
    """t_1, as a share of the training: from then on the mask is fixed."""
    every: int = Field(default=20, ge=1)
    """Steps between prunings."""

    @model_validator(mode="after")
    def _ordered(self) -> "Cubic":
        require_window(self.start, self.stop)
        return self

    def due(self, step: int, steps: int) -> bool:
        """Every ``every`` steps from t_0 on, and at t_1."""
        first, last = _steps(self.start, self.stop, steps)
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    def sparsity(self, step: int, steps: int, target: float) -> float:
        """Return s_t."""
        first, last = _steps(self.start, self.stop, steps)
        left = 1 - min(1.0, (step - first) / max(1, last - first))
        return target if step >= last else target + (self.initial - target) * left**3


class Refresh(Schedule):
    """The mask follows the (dense) weights: made anew every few steps, to the end. N:M training from scratch."""

    name: Literal["refresh"] = "refresh"
    follows = True
    every: int = Field(default=1, ge=1)
    """Steps between masks."""

    def due(self, step: int, steps: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0


class DecayPattern(Schedule):
    """SdGf (Bambhaniya et al. 2024): the pattern itself decays, dense, then M-1:M, M-2:M ... to N:M.

    Dense until ``start``; N:M from ``stop`` on; the patterns between get equal times (our choice).
    """

    name: Literal["decay-pattern"] = "decay-pattern"
    follows = True
    start: Share = 0.1
    """Share of the training that is dense."""
    stop: Share = 0.6
    """Share of the training after which the pattern is the recipe's."""

    @model_validator(mode="after")
    def _ordered(self) -> "DecayPattern":
        require_window(self.start, self.stop)
        return self

    def due(self, step: int, steps: int) -> bool:
        """Every step: the mask follows the weights."""
        return True

    def pattern(self, step: int, steps: int, final: Pattern) -> Pattern | None:
        """Return the pattern of this step."""
        assert isinstance(final, NofM)
        first, last = _steps(self.start, self.stop, steps)
        if step < first:
            return None
        between = final.m - 1 - final.n  # patterns from M-1:M to N+1:M
        done = min(between, (step - first) * between // max(1, last - first)) if step < last else between
        return NofM(final.m - 1 - done, final.m)


class DropAndGrow(Schedule):
    """The smallest weights are dropped and as many grown elsewhere; the number of nonzeros never changes.

    ``grow`` says where: ``random`` (SET, Mocanu et al. 2018); ``gradient``, the largest dense gradients (RigL, Evci et
    al. 2020); ``momentum``, the largest averaged gradients (sparse momentum, Dettmers & Zettlemoyer 2019); ``explore``,
    |gradient| + c ln t / (1 + n), n the number of masks a weight has been in (Huang et al. 2022).
    """

    name: Literal["drop-and-grow"] = "drop-and-grow"
    grow: Literal["random", "gradient", "momentum", "explore"] = "gradient"
    """Where weights grow."""
    every: int = Field(default=50, ge=1)
    """Steps between changes."""
    fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of a layer's weights dropped at the first change."""
    anneal: Literal["cosine", "constant"] = "cosine"
    """How that share changes: to 0 at ``stop`` along a cosine, or not at all."""
    stop: Share = 0.75
    """Share of the training after which the mask is fixed."""
    share: bool = False
    """With momentum: dropped weights are regrown in layers by their mean |momentum|, not where they were."""
    c: float = Field(default=1e-4, ge=0)
    """With explore: what not having been tried is worth, in the gradient's units."""

    @model_validator(mode="after")
    def _agree(self) -> "DropAndGrow":
        if self.share and self.grow != "momentum":
            raise ValueError("share goes by the layers' momentum; use it with grow momentum")
        return self

    def due(self, step: int, steps: int) -> bool:
        """Only the first mask; for the others see :meth:`swaps`."""
        return step == 0

    def swaps(self, step: int, steps: int) -> bool:
        """Whether weights are dropped and grown at this step."""
        return step > 0 and step % self.every == 0 and step < self.stop * steps

    def dropped(self, step: int, steps: int) -> float:
        """Return the share of the weights dropped at this step (RigL, eq. for f_decay)."""
        if self.anneal == "constant":
            return self.fraction
        return self.fraction / 2 * (1 + math.cos(math.pi * step / max(1.0, self.stop * steps)))


AnySchedule = Annotated[Once | Release | Cubic | Refresh | DecayPattern | DropAndGrow, Field(discriminator="name")]
"""A schedule by its ``name``."""


def _steps(start: float, stop: float, steps: int) -> tuple[int, int]:
    return min(int(start * steps), steps - 1), min(int(stop * steps), steps - 1)


def require_window(start: float, stop: float) -> None:
    """Raise ``ValueError`` (which pydantic turns into one line) unless ``start`` is before ``stop``."""
    if start >= stop:
        raise ValueError(f"start {start:g} is not before stop {stop:g}; give the window as shares of the training")
