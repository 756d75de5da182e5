"""How well single codes (or features, or neurons) stand for a property of tokens: precision and recall.

For a property R of tokens and a code c: recall = #(R and c on) / #R, precision = #(R and c on) / #(c on) (Tamkin et al.
2023, section 4). Choosing the best of many codes on the tokens it is judged on flatters it: find on one part of the
text, judge on another.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class CodeMatches:
    """The best code of each property, found on one half of the tokens and judged on the other."""

    code: Int[Tensor, " properties"]
    """The code; -1 where no code had the recall that was asked for."""
    precision: Float[Tensor, " properties"]
    """Its precision on the other half (nan without a code, or where it never is on)."""
    recall: Float[Tensor, " properties"]
    """Its recall there."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per property."""
        import pandas as pd

        columns = {"code": self.code, "precision": self.precision, "recall": self.recall}
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def precision_recall(
    on: Bool[Tensor, "n codes"], has: Bool[Tensor, "n properties"]
) -> tuple[Float[Tensor, "properties codes"], Float[Tensor, "properties codes"]]:
    """Return precision and recall of every code for every property; nan where nothing is counted."""
    both = has.double().T @ on.double()
    return both / on.double().sum(0), both / has.double().sum(0)[:, None]


def match_codes(
    on: Bool[Tensor, "n codes"], has: Bool[Tensor, "n properties"], least_recall: float = 0.01
) -> CodeMatches:
    """Return the code of best precision (of those with enough recall) for each property.

    Even rows are for finding, odd rows for judging.
    """
    precision, recall = precision_recall(on[::2], has[::2])
    candidates = torch.where(recall > least_recall, precision, -torch.inf).nan_to_num(-torch.inf, neginf=-torch.inf)
    # of equally precise codes the one that is on more often
    code = (candidates + 1e-9 * recall.nan_to_num(0)).argmax(1)
    found = candidates.gather(1, code[:, None]).squeeze(1) > -torch.inf
    precision, recall = (m.gather(1, code[:, None]).squeeze(1) for m in precision_recall(on[1::2], has[1::2]))
    nothing = torch.full_like(precision, torch.nan)
    return CodeMatches(
        torch.where(found, code, -1), torch.where(found, precision, nothing), torch.where(found, recall, nothing)
    )


def precision_at_recall(
    values: Float[Tensor, "n units"], has: Bool[Tensor, " n"], recall: float
) -> Float[Tensor, " units"]:
    """Return the precision of each unit (a neuron, say) thresholded where it reaches ``recall``: codes' baseline.

    The threshold is the largest value at which at least that share of the property's tokens are at or above it; tokens
    that tie with it are all on.
    """
    inside = values[has].sort(0, descending=True).values
    if not len(inside):
        return torch.full((values.shape[1],), torch.nan)
    needed = min(max(1, -int(-recall * len(inside) // 1)), len(inside))
    on = values >= inside[needed - 1]
    return (on & has[:, None]).sum(0) / on.sum(0)


def js_divergence(p: Float[Tensor, "... n"], q: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Return the Jensen-Shannon divergence of distributions over the last axis, in nats (at most log 2).

    How far what a model goes on with, after a state's code was set, is from what that state goes on with.
    """
    middle = (p + q) / 2
    parts = [torch.where(a > 0, a * (a / middle.clamp(min=1e-30)).log(), 0.0).sum(-1) for a in (p, q)]
    return (parts[0] + parts[1]) / 2
