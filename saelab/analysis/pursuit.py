"""Better codes at inference for a given dictionary and a given number of features per token.

*Gradient pursuit* (Blumensath and Davies 2008; Smith 2024 for SAEs; section 3.8 of Engels et al.). Signal s, unit atoms
d_i, weights w = 0, residual r = s. As often as the token's budget says:

    1. add argmax_i <d_i, r> (signed: weights are not negative) to the support
    2. gamma = <d_i, r> on the support; 0 where a weight is 0 and would fall
    3. c = sum gamma_i d_i ;  alpha = <c, r> / <c, c>  (0 when c = 0)
    4. w <- max(w + alpha gamma, 0) ;  r <- s - sum w_i d_i

If clipping makes the residual longer, the step is shortened to where the first weight reaches 0, so that the residual
never grows. *Orthogonal matching pursuit* is the slower standard: each step solves least squares on the support.

Both go over all tokens of a batch at once on the sparse kernels: the largest correlation is found tile by tile, and
``c`` and ``gamma`` touch the chosen atoms alone.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError
from saelab.features.protocols import Dictionary
from saelab.kernels.segments import bag_sum, entry_dots
from saelab.kernels.select import select_topk


class Pursued(NamedTuple):
    """What a pursuit found for N tokens."""

    code: SparseCode
    """Weights of the atoms as given (not normalised)."""
    residual: Float[Tensor, "n d"]
    """``signal - code @ atoms``."""


@torch.no_grad()
def gradient_pursuit(
    signal: Float[Tensor, "n d"], atoms: Float[Tensor, "d_sae d"], budget: Int[Tensor, " n"] | int
) -> Pursued:
    """Code ``signal`` with at most ``budget`` atoms per token, weights at least 0."""
    unit, norms = _unit(atoms)
    budgets = _budgets(signal, budget, atoms.shape[0])
    order = torch.argsort(budgets, descending=True, stable=True)
    wide = int(budgets.max()) if len(budgets) else 0
    n = signal.shape[0]
    state = _State(
        signal[order].clone(),
        torch.zeros(n, wide, dtype=torch.int64, device=signal.device),
        signal.new_zeros(n, wide),
    )
    left = budgets[order]
    for step in range(wide):
        # Tokens are in order of their budget: those that still have one are the first.
        _gradient_step(state, unit, int((left > step).sum()), step)
    return _result(signal, atoms, norms, state, order)


@torch.no_grad()
def orthogonal_pursuit(
    signal: Float[Tensor, "n d"], atoms: Float[Tensor, "d_sae d"], budget: Int[Tensor, " n"] | int
) -> Pursued:
    """Code ``signal`` by orthogonal matching pursuit: ``argmax |<d_i, r>|``, then least squares on the support.

    Its weights may be negative, so its error is below what an SAE's non-negative code can reach with those atoms.
    """
    unit, norms = _unit(atoms)
    budgets = _budgets(signal, budget, atoms.shape[0])
    order = torch.argsort(budgets, descending=True, stable=True)
    wide = min(int(budgets.max()) if len(budgets) else 0, signal.shape[1])
    n = signal.shape[0]
    target = signal[order]
    state = _State(
        target.clone(),
        torch.zeros(n, wide, dtype=torch.int64, device=signal.device),
        signal.new_zeros(n, wide),
    )
    left = budgets[order].clamp(max=wide)
    both = torch.cat([unit, -unit])
    gram = signal.new_zeros(n, wide, wide)
    along = signal.new_zeros(n, wide, 1)
    for step in range(wide):
        m = int((left > step).sum())
        best = _argmax(state.residual[:m], both) % atoms.shape[0]
        state.support[:m, step] = best
        chosen = unit[state.support[:m, : step + 1]]
        # An atom that is chosen again (the residual is 0 but for rounding) gets a place of its own with weight 0.
        again = (state.support[:m, :step] == best[:, None]).any(1)
        row = torch.einsum("nkd,nd->nk", chosen, unit[best]).masked_fill_(again[:, None], 0.0)
        row[:, step] = 1 + 1e-6
        gram[:m, step, : step + 1], gram[:m, : step + 1, step] = row, row
        along[:m, step, 0] = (target[:m] * unit[best]).sum(1).masked_fill_(again, 0.0)
        solved = torch.linalg.solve(gram[:m, : step + 1, : step + 1], along[:m, : step + 1])
        state.weights[:m, : step + 1] = solved.squeeze(2)
        state.residual[:m] = target[:m] - torch.einsum("nkd,nk->nd", chosen, state.weights[:m, : step + 1])
    return _result(signal, atoms, norms, state, order)


def pursue(
    sae: Dictionary,
    x: Float[Tensor, "n d_in"],
    budget: Int[Tensor, " n"] | int,
    method: str = "gradient",
) -> SparseCode:
    """Code raw activations with an SAE's decoder: ``sae.decode`` of the result is the new reconstruction.

    Per-token budgets are usually the SAE's own L0, ``sae.encode(x).l0()``. ``method`` is ``gradient`` or
    ``orthogonal``. The SAE must be a plain dictionary, ``x_hat = (f W_dec + b_dec) / s``.
    """
    if method not in ("gradient", "orthogonal"):
        raise ConfigError(f"unknown pursuit '{method}', expected gradient or orthogonal")
    nothing = torch.zeros(0, dtype=torch.int64, device=sae.W_dec.device)
    silent = SparseCode(nothing, sae.W_dec.new_zeros(0), torch.zeros(2, dtype=torch.int64).to(nothing), sae.d_sae)
    scale = float(getattr(sae, "input_scale", 1.0))
    signal = (x.to(sae.W_dec) - sae.decode(silent)) * scale
    run = gradient_pursuit if method == "gradient" else orthogonal_pursuit
    return run(signal, sae.W_dec.detach(), budget).code


class _State(NamedTuple):
    """Tokens in order of falling budget; slot j of a token holds its j-th atom (weight 0: none, or clipped)."""

    residual: Float[Tensor, "n d"]
    support: Int[Tensor, "n wide"]
    weights: Float[Tensor, "n wide"]


def _gradient_step(state: _State, unit: Float[Tensor, "d_sae d"], m: int, step: int) -> None:
    used = step + 1
    residual, support = state.residual[:m], state.support[:m, :used]
    support[:, step] = _argmax(residual, unit)
    # An atom that is chosen again stays in its first slot.
    again = (support[:, :step] == support[:, step:]).any(1)
    weights = state.weights[:m, :used]
    rows = torch.arange(m, device=support.device).repeat_interleave(used)
    gradient = entry_dots(residual, unit, support.reshape(-1), rows).view(m, used)
    gradient = torch.where((weights <= 0) & (gradient <= 0), 0.0, gradient)
    gradient[:, step].masked_fill_(again, 0.0)
    direction = _combine(unit, support, gradient)
    length = direction.square().sum(1)
    alpha = torch.where(length > 0, (direction * residual).sum(1) / length.clamp_min(1e-30), 0.0)
    moved = (weights + alpha[:, None] * gradient).clamp_min(0)
    after = residual - _combine(unit, support, moved - weights)
    grew = after.square().sum(1) > residual.square().sum(1)
    if bool(grew.any()):
        # Along the unclipped line the residual falls until alpha: stop where the first weight reaches 0.
        falling = gradient[grew] < 0
        reach = torch.where(falling, weights[grew] / (-gradient[grew]).clamp_min(1e-30), torch.inf).amin(1)
        short = torch.minimum(alpha[grew], reach)
        moved[grew] = (weights[grew] + short[:, None] * gradient[grew]).clamp_min(0)
        after[grew] = residual[grew] - short[:, None] * direction[grew]
    weights.copy_(moved)
    residual.copy_(after)


def _combine(
    unit: Float[Tensor, "d_sae d"], support: Int[Tensor, "m used"], weights: Float[Tensor, "m used"]
) -> Float[Tensor, "m d"]:
    m, used = support.shape
    offsets = torch.arange(m + 1, device=support.device) * used
    return bag_sum(unit, support.reshape(-1), offsets, weights.reshape(-1))


def _argmax(residual: Float[Tensor, "m d"], unit: Float[Tensor, "d_sae d"]) -> Int[Tensor, " m"]:
    return select_topk(residual, unit, unit.new_zeros(unit.shape[0]), 1).indices[:, 0]


def _unit(atoms: Float[Tensor, "d_sae d"]) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " d_sae"]]:
    norms = atoms.norm(dim=1)
    return atoms / norms.clamp_min(1e-30)[:, None], norms


def _budgets(signal: Tensor, budget: Tensor | int, d_sae: int) -> Int[Tensor, " n"]:
    if isinstance(budget, int):
        budget = torch.full((signal.shape[0],), budget, dtype=torch.int64, device=signal.device)
    if budget.numel() and int(budget.min()) < 0:
        raise ConfigError(f"a budget of {int(budget.min())} features is below 0")
    return budget.to(signal.device).clamp(max=d_sae)


def _result(signal: Tensor, atoms: Tensor, norms: Tensor, state: _State, order: Tensor) -> Pursued:
    back = torch.argsort(order)
    support, weights = state.support[back], state.weights[back]
    kept = (weights != 0) & (norms[support] > 0)
    values = weights[kept] / norms[support[kept]]
    offsets = torch.cat([order.new_zeros(1), kept.sum(1).cumsum(0)])
    code = SparseCode(support[kept], values, offsets, atoms.shape[0])
    return Pursued(code, signal - bag_sum(atoms, code.indices, code.offsets, code.values))
