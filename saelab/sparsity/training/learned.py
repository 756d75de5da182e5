"""Treatments of the gradient axis that choose or change weights by values of their own: thresholds, scores, adapters.

What a treatment learns lies in the weight's memory, so it is in every checkpoint; it is trained by plain gradient
descent at a learning rate of its own. FISH and SoRA are for fine-tuning: begin from a trained model.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from saelab.sparsity.training.gradients import Gradient, View


class AutoSparse(Gradient):
    """AutoSparse (Kundu et al. 2023): a soft threshold sigmoid(s) per layer, learned with the weights.

    w -> sign(w) max(|w| - sigmoid(s), 0). dL/ds is exact; what is zero receives a share alpha_t of its gradient, which
    falls to 0 along half a cosine by ``until``. ``decay`` pulls s towards 0, that is the threshold up: the sparsity
    that is reached follows from it and is not set.
    """

    name: Literal["autosparse"] = "autosparse"
    unpatterned: ClassVar[bool] = True
    start: float = -8.0
    """s at the start; sigmoid(-8) is 3e-4."""
    lr: float = Field(default=0.02, gt=0)
    """Learning rate of s."""
    decay: float = Field(default=0.1, ge=0)
    """Weight decay of s."""
    alpha: float = Field(default=0.75, ge=0, le=1)
    """Share of the gradient that zeros receive at the start."""
    until: float = Field(default=0.75, gt=0, le=1)
    """Share of the training after which they receive none."""

    def own_mask(self, view: View) -> Bool[Tensor, "out in"]:
        """Return where the weight is above its threshold."""
        if "s" not in view.memory:
            view.memory["s"] = torch.tensor(self.start, dtype=view.weight.dtype, device=view.weight.device)
        return view.weight.abs() > view.memory["s"].sigmoid()

    def forward(self, view: View) -> Tensor:
        """Threshold."""
        return view.weight.sign() * (view.weight.abs() - view.memory["s"].sigmoid()).clamp_min(0)

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Move the threshold; scale the gradient of zeros."""
        t = view.memory["s"].sigmoid()
        rise = -(gradient * view.weight.sign() * view.mask).sum() * t * (1 - t)
        view.memory["s"] = view.memory["s"] - self.lr * (rise + self.decay * view.memory["s"])
        alpha = self.alpha * 0.5 * (1 + math.cos(math.pi * min(view.progress / self.until, 1.0)))
        return torch.where(view.mask, gradient, alpha * gradient)


class LearnedScores(Gradient):
    """After PST (Li et al. 2022): the score |W| + a (A B) + b (r 1' + 1 c') chooses the mask; A, B, r, c are learned.

    The gradient goes straight through the mask to the score: dL/dS = dL/dW_eff * W. The paper also updates W by a
    low-rank product; here W itself is trained.
    """

    name: Literal["pst"] = "pst"
    rank: int = Field(default=8, ge=1)
    """Columns of A."""
    low_rank: float = Field(default=1.0, ge=0)
    """a."""
    structure: float = Field(default=1.0, ge=0)
    """b: weight of the rows' and columns' terms."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of A, B, r and c."""

    def own_mask(self, view: View) -> Bool[Tensor, "out in"]:
        """Return the mask of the scores."""
        assert view.pattern is not None
        rows, columns = view.weight.shape
        if "A" not in view.memory:
            view.memory["A"] = view.weight.new_zeros(rows, self.rank)
            view.memory["B"] = drawn(self.rank, columns).to(view.weight) / math.sqrt(columns)
            view.memory["r"], view.memory["c"] = view.weight.new_zeros(rows), view.weight.new_zeros(columns)
        m = view.memory
        score = view.weight.abs() + self.low_rank * m["A"] @ m["B"] + self.structure * (m["r"][:, None] + m["c"])
        return view.pattern.mask(score)

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Train the scores; the weight receives the straight-through gradient."""
        m, g = view.memory, gradient * view.weight
        a, b = self.low_rank * g @ m["B"].T, self.low_rank * m["A"].T @ g
        m["A"], m["B"] = m["A"] - self.lr * a, m["B"] - self.lr * b
        m["r"] = m["r"] - self.lr * self.structure * g.sum(1)
        m["c"] = m["c"] - self.lr * self.structure * g.sum(0)
        return gradient


class Nested(Gradient):
    """DRESS (Yu et al. 2022): nested masks, one set of weights; each step trains one of the sparsities in turn.

    Masks are the largest magnitudes of each row, so each contains all sparser ones; afterwards pruning the weights by
    magnitude with pattern ``row`` at any of the sparsities gives that sub-network. What is saved is the densest.
    """

    name: Literal["dress"] = "dress"
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)
    """Sparsities besides the recipe's own, which is the lowest."""

    @model_validator(mode="after")
    def _valid(self) -> "Nested":
        if any(not 0 <= s < 1 for s in self.sparsities):
            raise ValueError(f"sparsities are in [0, 1), got {', '.join(map(str, self.sparsities))}")
        return self

    def own_mask(self, view: View) -> Bool[Tensor, "out in"]:
        """Return the mask of this step's sparsity; of the recipe's own when one looks at the result."""
        from saelab.sparsity.pattern import Unstructured

        assert isinstance(view.pattern, Unstructured)
        levels = [view.pattern.sparsity, *self.sparsities]
        level = levels[0] if view.looking else levels[view.step % len(levels)]
        return Unstructured(level, per_row=True).mask(view.weight.abs())

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Train the weights of this step's mask; what no mask has reached keeps its value."""
        return gradient * view.mask


class FishMask(Gradient):
    """FISH mask (Sung et al. 2021): only the k weights with the largest empirical Fisher information are trained.

    The first ``batches`` steps train nothing and average the squared gradients of their batches (the paper squares each
    example's gradient; a loop sees batches). All other weights, and all other parameters, stay as they were.
    """

    name: Literal["fish"] = "fish"
    unpatterned: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    share: float = Field(default=0.005, gt=0, le=1)
    """Share of each layer's weights that is trained."""
    batches: int = Field(default=16, ge=1)
    """Steps that measure the Fisher information."""

    def forward(self, view: View) -> Tensor:
        """All weights take part."""
        return view.weight

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Measure, then let the chosen weights' gradient through."""
        m = view.memory
        m.setdefault("start", view.weight.clone())
        if view.step < self.batches:
            m["fisher"] = m.get("fisher", torch.zeros_like(gradient)) + gradient.square()
            return torch.zeros_like(gradient)
        return gradient * self._trained(m)

    def after_step(self, view: View) -> None:
        """Undo what the optimiser (weight decay) did to the weights that are not trained."""
        start = view.memory["start"]
        if view.step < self.batches:
            view.weight.copy_(start)
        else:
            view.weight.copy_(torch.where(self._trained(view.memory), view.weight, start))

    def facts(self, view: View) -> dict[str, float]:
        """Say how many weights are no longer what they were."""
        return {"trained": float((view.weight != view.memory["start"]).double().mean())}

    def _trained(self, memory: dict[str, Tensor]) -> Bool[Tensor, "out in"]:
        if "trained" not in memory:
            fisher = memory.pop("fisher")
            kept = max(1, round(self.share * fisher.numel()))
            flat = torch.zeros(fisher.numel(), dtype=torch.bool, device=fisher.device)
            flat[fisher.reshape(-1).argsort(descending=True, stable=True)[:kept]] = True
            memory["trained"] = flat.view(fisher.shape)
        return memory["trained"]


class SoRA(Gradient):
    """SoRA (Ding et al. 2023): W + B diag(g) A with W frozen; the gate g has an L1 penalty, so its zeros drop out.

    Each step ends with g -> soft(g - lr dL/dg, lr penalty). The product is merged into the weight at the end; the rank
    that is left is reported. A, B and g are trained by Adam, as adapters are; all other parameters stay as they were.
    """

    name: Literal["sora"] = "sora"
    unpatterned: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    rank: int = Field(default=16, ge=1)
    """Rank at the start."""
    lr: float = Field(default=2e-3, gt=0)
    """Learning rate of A, B and g."""
    penalty: float = Field(default=0.1, ge=0)
    """Weight of |g|_1."""

    def forward(self, view: View) -> Tensor:
        """Add the adapter."""
        m = view.memory
        if "A" not in m:
            rows, columns = view.weight.shape
            m["start"] = view.weight.clone()
            m["A"] = drawn(self.rank, columns).to(view.weight) / math.sqrt(columns)
            m["B"], m["g"] = view.weight.new_zeros(rows, self.rank), view.weight.new_ones(self.rank)
        return view.weight + (m["B"] * m["g"]) @ m["A"]

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Train the adapter; the weight receives nothing."""
        m = view.memory
        a, b, g = m["A"], m["B"], m["g"]
        slopes = {
            "A": g[:, None] * (b.T @ gradient),
            "B": (gradient @ a.T) * g,
            "g": (b * (gradient @ a.T)).sum(0),
        }
        for name, slope in slopes.items():
            m[name] = adam(m, name, slope, lr=self.lr, step=view.step)
        m["g"] = m["g"].sign() * (m["g"].abs() - self.lr * self.penalty).clamp_min(0)
        return torch.zeros_like(gradient)

    def after_step(self, view: View) -> None:
        """Undo what the optimiser (weight decay) did to the frozen weight."""
        view.weight.copy_(view.memory["start"])

    def facts(self, view: View) -> dict[str, float]:
        """Say which rank is left."""
        return {"rank": float((view.memory["g"] != 0).sum())}


def adam(
    memory: dict[str, Tensor],
    name: str,
    gradient: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Tensor:
    """Return ``memory[name]`` after one Adam step; the moments are kept beside it."""
    first = memory.get(f"{name}.first", torch.zeros_like(gradient)).lerp(gradient, 1 - betas[0])
    second = memory.get(f"{name}.second", torch.zeros_like(gradient)).lerp(gradient.square(), 1 - betas[1])
    memory[f"{name}.first"], memory[f"{name}.second"] = first, second
    m, v = first / (1 - betas[0] ** (step + 1)), second / (1 - betas[1] ** (step + 1))
    return memory[name] - lr * m / (v.sqrt() + 1e-8)


def drawn(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Return the same standard normal numbers for the same shape."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1_000_003 + columns))
