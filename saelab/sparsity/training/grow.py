"""Drop and grow: which weights leave a mask and which enter it. Pure functions; the number of nonzeros stays."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sparsity.pattern import keep_largest


def drop_and_grow(
    weight: Float[Tensor, "groups n"],
    score: Float[Tensor, "groups n"],
    mask: Bool[Tensor, "groups n"],
    drop: int,
    grow: int,
) -> Bool[Tensor, "groups n"]:
    """Drop the ``drop`` smallest kept |w| of every group, then add the ``grow`` largest scores outside what is left.

    As in RigL's algorithm 1, what was just dropped may be grown at once if its score is large enough. All groups keep
    the same number (their rows of ``mask`` have equal sums).
    """
    kept = int(mask[0].sum()) - drop
    left = keep_largest(torch.where(mask, weight.abs(), -torch.inf), kept)
    return left | keep_largest(torch.where(left, -torch.inf, score), grow)


def shared_growth(momentum: Mapping[str, float], room: Mapping[str, int], total: int) -> dict[str, int]:
    """Share ``total`` new weights among layers in proportion to ``momentum`` (sparse momentum, section 3.2).

    No layer gets more than its ``room``; what it cannot take goes to the others, and rounding by largest remainder
    keeps the sum exact.
    """
    grown = dict.fromkeys(momentum, 0)
    left = total
    while left > 0:
        open_layers = {name: max(momentum[name], 0.0) for name in momentum if grown[name] < room[name]}
        if not open_layers:
            break
        whole = sum(open_layers.values())
        parts = {n: left * (v / whole if whole else 1 / len(open_layers)) for n, v in open_layers.items()}
        whole_parts = {n: int(p) for n, p in parts.items()}
        rest = left - sum(whole_parts.values())
        for name in sorted(parts, key=lambda n: whole_parts[n] - parts[n])[:rest]:
            whole_parts[name] += 1
        for name, value in whole_parts.items():
            taken = min(value, room[name] - grown[name])
            grown[name] += taken
            left -= taken
    return grown


def explore_score(
    gradient: Float[Tensor, "out in"], active: Float[Tensor, "out in"], step: int, c: float
) -> Float[Tensor, "out in"]:
    """Return |g| + c ln t / (1 + n), n how many masks a weight has been in (Huang et al. 2022, an upper bound)."""
    return gradient.abs() + c * torch.log(torch.tensor(float(max(step, 1)))) / (1 + active)
