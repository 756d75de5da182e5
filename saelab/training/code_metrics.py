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
