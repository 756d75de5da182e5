"""How much sparsity each layer gets, for a given share of all their weights."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ConfigError
from saelab.sparsity.pattern import require_share

Shapes = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each layer."""


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Give every layer the same sparsity."""
    require_share(sparsity)
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi: density in proportion to (n_in + n_out) / (n_in n_out), at most 1 (Mocanu et al., SET; Evci et al.).

    The factor is solved for exactly: a layer that would be denser than dense is dense and leaves its surplus to the
    others, and rounding is by largest remainder, so that the total number of weights is the budget, to the weight.
    """
    require_share(sparsity)
    budget = (1 - sparsity) * sum(rows * columns for rows, columns in shapes.values())
    dense: set[str] = set()
    while True:
        free = {name: sum(shape) for name, shape in shapes.items() if name not in dense}
        left = budget - sum(shapes[name][0] * shapes[name][1] for name in dense)
        factor = left / sum(free.values()) if free else 0.0
        full = {name for name in free if factor * free[name] > shapes[name][0] * shapes[name][1]}
        if not full:
            break
        dense |= full
    density = {
        name: 1.0 if name in dense else factor * sum(shape) / (shape[0] * shape[1]) for name, shape in shapes.items()
    }
    size = {name: rows * columns for name, (rows, columns) in shapes.items()}
    kept = {name: int(density[name] * size[name]) for name in shapes}
    rest = round(budget) - sum(kept.values())
    for name in sorted(shapes, key=lambda n: kept[n] - density[n] * size[n])[: max(rest, 0)]:
        kept[name] += 1
    return {name: 1 - kept[name] / size[name] for name in shapes}


def by_global_score(scores: Mapping[str, Float[Tensor, "out in"]], sparsity: float) -> dict[str, float]:
    """Give each layer the sparsity that one threshold on all scores together would give it; exact in sum."""
    require_share(sparsity)
    joined = torch.cat([score.reshape(-1) for score in scores.values()])
    gone = round(sparsity * joined.numel())
    low = torch.zeros(joined.numel(), dtype=torch.bool)
    low[joined.argsort(stable=True)[:gone]] = True
    shares, at = {}, 0
    for name, score in scores.items():
        shares[name] = float(low[at : at + score.numel()].sum()) / score.numel()
        at += score.numel()
    return shares


def by_sensitivity(
    shapes: Shapes, sparsity: float, harm: Callable[[str, float], float], steps: int = 4
) -> dict[str, float]:
    """Spend the budget where it hurts least (our design).

    ``harm(layer, s)`` is the rise in loss when that layer alone has sparsity s. It is asked for at ``steps`` levels of
    each layer; then, from dense, the step with the least harm per weight removed is taken, again and again, until the
    budget is met (the last step only as far as needed).
    """
    require_share(sparsity)
    if steps < 1:
        raise ConfigError(f"a sensitivity scan needs at least 1 step, got {steps}")
    top = min(0.98, sparsity + (1 - sparsity) * 0.75)
    levels = [top * k / steps for k in range(steps + 1)]
    curve = {name: [0.0] + [max(harm(name, level), 0.0) for level in levels[1:]] for name in shapes}
    for values in curve.values():  # harm never falls as sparsity grows; noise could say otherwise
        for k in range(1, len(values)):
            values[k] = max(values[k], values[k - 1])
    size = {name: rows * columns for name, (rows, columns) in shapes.items()}
    at, share = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0.0)
    left = sparsity * sum(size.values())
    while left > 0:
        open_layers = [name for name in shapes if at[name] < steps]
        if not open_layers:
            break
        name = min(open_layers, key=lambda n: (curve[n][at[n] + 1] - curve[n][at[n]]) / size[n])
        step = min((levels[at[name] + 1] - levels[at[name]]) * size[name], left)
        share[name] += step / size[name]
        at[name] += 1
        left -= step
    return share
