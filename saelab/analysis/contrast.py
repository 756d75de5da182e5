"""What the two halves of a contrastive SAE know: the checks of Poupart 2024 (arXiv 2406.04028, section 5) on pairs.

Which side of a pair an activation is must be readable from the differentiating features and, if the halves are what
they should be, no better than chance from the common ones. The same with random labels is the control.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.core.errors import ActivationError
from saelab.core.result import Result
from saelab.features.rows import encode_in_parts

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

DEAD, DENSE = 1e-3, 0.1
"""Densities below and above which a feature counts as dead and as dense."""


@dataclass(frozen=True)
class Half:
    """One half of the features (or all of them)."""

    name: str
    """``common``, ``differing`` or ``all``."""
    n_features: int
    """Features in it."""
    dead_fraction: float
    """Share of them that fire on less than 0.1 % of the activations."""
    dense_fraction: float
    """Share that fire on more than 10 %."""
    side_auc: float
    """Area under the ROC curve of a logistic regression that tells the side from their activations, on unseen pairs."""
    control_auc: float
    """The same with sides drawn at random (about 0.5)."""
    agreement: float
    """``sum |f+ - f-| / sum (f+ + f-)``: 0 where both sides say the same, 1 where no feature fires on both."""


@dataclass(frozen=True, repr=False)
class ContrastReport(Result):
    """What the halves of a contrastive SAE know of the sides of ``n_pairs`` pairs."""

    halves: tuple[Half, ...]
    """Common, differing, and all features."""
    cosines: dict[str, float]
    """Mean absolute cosine between decoder rows, within each half and between them."""
    n_pairs: int
    """Pairs; the first half of them trained the regressions, the second judged them."""
    seed: int
    """Seed of the control's labels."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python values."""
        return dataclasses.asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per half."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(half) for half in self.halves]).set_index("name")

    def __repr__(self) -> str:
        halves = ", ".join(f"{h.name} AUC {h.side_auc:.3f} (random {h.control_auc:.3f})" for h in self.halves)
        return f"ContrastReport({halves}; {self.n_pairs:,} pairs)"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """How well each half tells the sides, beside its control."""
        from plotly import graph_objects as go

        from saelab.core.plotting import figure

        names = [half.name for half in self.halves]
        bars = [
            go.Bar(name="sides", x=names, y=[half.side_auc for half in self.halves]),
            go.Bar(name="random labels", x=names, y=[half.control_auc for half in self.halves]),
        ]
        axes = {"xaxis": {"title": "features"}, "yaxis": {"title": "ROC AUC of telling the sides", "range": [0, 1]}}
        return {"sides": (figure(*bars, barmode="group", **axes), self.to_frame())}


@torch.no_grad()
def contrast(
    sae: Any, positive: Float[Tensor, "n d_in"], negative: Float[Tensor, "m d_in"], seed: int = 0
) -> ContrastReport:
    """Report what the halves of a contrastive SAE know of pairs that it was not trained on (at least 20)."""
    if positive.shape != negative.shape or positive.shape[0] < 20:
        raise ActivationError(
            f"a contrast needs at least 20 pairs, got {tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    codes = [encode_in_parts(sae, side, "the pairs").to_dense().cpu() for side in (positive, negative)]
    rng = np.random.default_rng(seed)
    common, differing = sae.common_features, sae.differing_features
    groups = {"common": common, "differing": differing, "all": torch.cat([common, differing])}
    halves = tuple(_half(name, [code[:, rows] for code in codes], rng) for name, rows in groups.items())
    unit = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
    cosines = {
        "common-common": _mean_cosine(unit[common], unit[common], same=True),
        "differing-differing": _mean_cosine(unit[differing], unit[differing], same=True),
        "common-differing": _mean_cosine(unit[common], unit[differing], same=False),
    }
    return ContrastReport(halves, cosines, positive.shape[0], seed)


def _half(name: str, codes: list[Tensor], rng: np.random.Generator) -> Half:
    plus, minus = codes
    both = torch.cat(codes)
    density = (both > 0).double().mean(0)
    total = float((plus + minus).double().sum())
    apart = float((plus - minus).double().abs().sum())
    n = len(plus)
    flip = torch.from_numpy(rng.random(n) < 0.5)
    return Half(
        name=name,
        n_features=both.shape[1],
        dead_fraction=float((density < DEAD).double().mean()),
        dense_fraction=float((density > DENSE).double().mean()),
        side_auc=_auc(plus, minus, torch.zeros(n, dtype=torch.bool)),
        control_auc=_auc(plus, minus, flip),
        agreement=apart / total if total else float("nan"),
    )


def _auc(plus: Tensor, minus: Tensor, flip: Bool[Tensor, " n"]) -> float:
    """Train on the first half of the pairs, judge on the second; ``flip`` exchanges the labels of some pairs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    if plus.shape[1] == 0:
        return float("nan")
    x = torch.stack([plus, minus], 1).numpy()
    labels = np.stack([~flip.numpy(), flip.numpy()], 1)
    scale = x.std() or 1.0
    cut = len(x) // 2
    flat = [part.reshape(-1, x.shape[2]) / scale for part in (x[:cut], x[cut:])]
    with warnings.catch_warnings():  # a regression stopped after 1,000 iterations is judged as it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=1000).fit(flat[0], labels[:cut].ravel())
    return float(roc_auc_score(labels[cut:].ravel(), model.decision_function(flat[1])))


def _mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], *, same: bool) -> float:
    cosines = (a @ b.T).abs().double()
    if same:
        n = len(a)
        return float((cosines.sum() - cosines.diagonal().sum()) / max(n * (n - 1), 1))
    return float(cosines.mean())
