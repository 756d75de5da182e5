"""Reducing the error at fixed sparsity (section 3.8.12): the SAE's encoder against pursuit with the same decoder."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from saelab.analysis.dark_matter.decompose import bias_of
from saelab.analysis.dark_matter.tokens import Tokens
from saelab.analysis.pursuit import gradient_pursuit, pursue
from saelab.analysis.reconstruction import ratio
from saelab.core.code import SparseCode
from saelab.core.progress import progress
from saelab.core.regression import CrossMoments
from saelab.features.protocols import Dictionary
from saelab.features.rows import encode_in_parts

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("encoder", "gradient", "orthogonal", "random")


@dataclass(frozen=True)
class PursuitResult:
    """One way to code the same tokens with the same dictionary and, per token, at most the same number of features."""

    method: str
    """``encoder`` (the SAE's own), ``gradient`` pursuit, ``orthogonal`` matching pursuit (its weights may be
    negative); control ``random``: gradient pursuit with as many random unit directions instead of the decoder's. Where
    that comes near the encoder, a budget of this size fits any vector of this width, features or not."""
    l0: float
    """Mean number of features used."""
    fvu: float
    """FVU on test contexts."""
    fvu_nonlinear: float
    """FVU with the linear part of this code's own error added back."""
    r2: float
    """Pooled R2 of this code's error on x."""
    tokens_per_second: float
    """Speed of coding on this machine, in one run in which the methods took turns chunk by chunk."""
    n_tokens: int
    """Tokens coded, fit and test."""


def frame(results: list[PursuitResult]) -> "pd.DataFrame":
    """One row per method."""
    import pandas as pd

    return pd.DataFrame([vars(r) for r in results])


@torch.no_grad()
def compare_pursuit(
    tokens: Tokens, site: str, sae: Dictionary, methods: tuple[str, ...] = METHODS, seed: int = 0
) -> list[PursuitResult]:
    """Code the tokens with each method, the budget of a token being the encoder's own L0 for it."""
    d = tokens.width(site)
    moments = {m: (CrossMoments(d, d), CrossMoments(d, d)) for m in methods}
    bias = bias_of(sae)
    directions = torch.randn(sae.d_sae, d, generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    seconds, used = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
    with progress("pursuit", tokens.n) as bar:
        for chunk in tokens.chunks(site, size=2048):
            x = chunk.x[site]
            budget = encode_in_parts(sae, x, site).l0()
            for method in methods:
                began = time.perf_counter()
                if method == "random":
                    code, e = gradient_pursuit(x - bias, directions, budget.cpu())
                    seconds[method] += time.perf_counter() - began
                else:
                    code = _code(sae, x, site, method, budget)
                    seconds[method] += time.perf_counter() - began
                    e = x - sae.decode(code).float().cpu()
                used[method] += int((code.values != 0).sum())
                for some, part in zip((chunk.fit, ~chunk.fit), moments[method], strict=True):
                    part.update(x[some], e[some])
            bar.advance(x.shape[0])
    results = []
    for method in methods:
        fit, test = moments[method]
        found = test.r2(fit.fit())
        variance = float(test.xx.diagonal().sum())
        whole = float(test.yy.sum()) + test.n * float(test.mean_y.square().sum())
        results.append(
            PursuitResult(
                method=method,
                l0=used[method] / tokens.n,
                fvu=ratio(whole, variance),
                fvu_nonlinear=ratio(float(found.residual.sum()), variance),
                r2=found.pooled,
                tokens_per_second=ratio(tokens.n, seconds[method]),
                n_tokens=tokens.n,
            )
        )
    return results


def _code(sae: Dictionary, x: torch.Tensor, site: str, method: str, budget: torch.Tensor) -> SparseCode:
    if method == "encoder":
        return encode_in_parts(sae, x, site).positive()
    return pursue(sae, x, budget, method)
