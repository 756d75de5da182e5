"""Linear and nonlinear error of one SAE or of several on the same tokens, in two passes over the activations.

First pass: cross-moments of x with every SAE's error, so the map W, its R2 on test contexts and the shrinkage control
need nothing else. Second pass, with W: the norms of each token's error and of its parts, and their regressions on x.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from saelab.analysis.dark_matter.tokens import Chunk, Tokens
from saelab.core.errors import ActivationError
from saelab.core.progress import progress
from saelab.core.regression import CrossMoments, LinearMap
from saelab.features.protocols import Dictionary
from saelab.features.rows import encode_in_parts

NORMS = ("error", "reconstruction", "reconstruction_plus_linear", "linear", "nonlinear")
"""Squared norms that are regressed on x: of e, x_hat, x_hat + l, l, eta."""
EXTRA = ("error_norm", "active_part")
"""Regressed beside them: ``||e||`` (not squared) and ``||x_hat - b_dec||^2``."""


@dataclass(eq=False)
class Passes:
    """What the two passes leave for one SAE."""

    fit: CrossMoments
    """x against e, on the contexts of the fit."""
    test: CrossMoments
    """The same on the test contexts."""
    shuffled: tuple[CrossMoments, CrossMoments]
    """Fit and test with the errors of other tokens: the null control."""
    linear: LinearMap
    """``l = linear(x)``."""
    total: Float32[np.ndarray, " n"]
    """``||e||^2`` of each token."""
    linear_norm: Float32[np.ndarray, " n"]
    """``||l||^2``."""
    nonlinear: Float32[np.ndarray, " n"]
    """``||eta||^2``."""
    centred: Float32[np.ndarray, " n"]
    """``||e - mean(e)||^2``, the mean of the token's own split."""
    l0: Float32[np.ndarray, " n"]
    """Active features."""
    active: Float64[Tensor, " d_sae"]
    """Sum of each feature's values over the tokens of the fit, in the SAE's units."""
    fired: Int64[Tensor, " d_sae"]
    """Tokens of the fit on which each feature fires."""
    decoder: Float[Tensor, "d_sae d"]
    """The SAE's write directions."""


@dataclass(eq=False)
class Measured:
    """What both passes leave over all SAEs."""

    saes: dict[str, Passes]
    """Per SAE, by name."""
    x_norm: Float32[np.ndarray, " n"]
    """``||x||^2`` of each token."""
    x_centred: Float32[np.ndarray, " n"]
    """``||x - mean(x)||^2``, the mean of the token's own split."""
    norms_fit: CrossMoments
    """x against the squared norms of every SAE (``NORMS`` then ``EXTRA``, SAE after SAE), fit."""
    norms_test: CrossMoments
    """The same on the test contexts."""
    norms_shuffled: tuple[CrossMoments, CrossMoments]
    """The same with the norms of other tokens."""

    def norm_columns(self, name: str) -> slice:
        """Columns of one SAE in the moments of norms."""
        width = len(NORMS) + len(EXTRA)
        k = list(self.saes).index(name)
        return slice(k * width, (k + 1) * width)


@torch.no_grad()
def measure(tokens: Tokens, site: str, saes: Mapping[str, Dictionary], seed: int = 0) -> Measured:
    """Run both passes for every SAE over the activations at ``site``."""
    d = tokens.width(site)
    for name, sae in saes.items():
        if sae.d_in != d:
            raise ActivationError(
                f"{name} reads activations of width {sae.d_in}, but {site} in the store is {d} wide; give an SAE "
                "that was trained at that site"
            )
    generator = torch.Generator().manual_seed(seed)
    fit, test, shuffled, found = _first_pass(tokens, site, saes, generator)
    result: dict[str, Passes] = {}
    for k, (name, (l0, active, fired)) in enumerate(found.items()):
        mine = slice(k * d, (k + 1) * d)
        own = fit.select(y=mine)
        null = (shuffled[0].select(y=mine), shuffled[1].select(y=mine))
        zeros = (np.zeros(tokens.n, np.float32) for _ in range(4))
        result[name] = Passes(
            fit=own,
            test=test.select(y=mine),
            shuffled=null,
            linear=own.fit(),
            total=next(zeros),
            linear_norm=next(zeros),
            nonlinear=next(zeros),
            centred=next(zeros),
            l0=l0,
            active=active,
            fired=fired,
            decoder=saes[name].W_dec.detach().cpu(),
        )
    return _second_pass(tokens, site, saes, result, generator)


def reconstruct(sae: Dictionary, x: Float[Tensor, "n d"], site: str) -> Float[Tensor, "n d"]:
    """Reconstruction of raw activations, float32 on the CPU."""
    return sae.decode(encode_in_parts(sae, x, site)).float().cpu()


def bias_of(sae: Dictionary) -> Float[Tensor, " d"]:
    """What the SAE says when no feature fires, in raw units."""
    from saelab.core.code import SparseCode

    nothing = torch.zeros(0, dtype=torch.int64, device=sae.W_dec.device)
    silent = SparseCode(nothing, sae.W_dec.new_zeros(0), torch.zeros(2, dtype=torch.int64).to(nothing), sae.d_sae)
    return sae.decode(silent)[0].detach().float().cpu()


def _first_pass(
    tokens: Tokens, site: str, saes: Mapping[str, Dictionary], generator: torch.Generator
) -> tuple[CrossMoments, CrossMoments, tuple[CrossMoments, CrossMoments], dict[str, tuple[np.ndarray, Tensor, Tensor]]]:
    d = next(iter(saes.values())).d_in
    fit, test, null_fit, null_test = (CrossMoments(d, d * len(saes)) for _ in range(4))
    found = {
        name: (np.zeros(tokens.n, np.float32), torch.zeros(sae.d_sae).double(), torch.zeros(sae.d_sae).long())
        for name, sae in saes.items()
    }
    with progress("linear fit", tokens.n) as bar:
        for chunk in tokens.chunks(site):
            x = chunk.x[site]
            errors = []
            for name, sae in saes.items():
                code = encode_in_parts(sae, x, site)
                e = x - sae.decode(code).float().cpu()
                if not bool(torch.isfinite(e.sum())):
                    raise ActivationError(
                        f"{name} gives NaN or infinity for finite activations; its weights are broken"
                    )
                errors.append(e)
                l0, active, fired = found[name]
                l0[chunk.where] = code.l0().cpu().numpy()
                used = chunk.fit[code.rows().cpu()] & (code.values > 0).cpu()
                features = code.indices.cpu()[used]
                active.index_add_(0, features, code.values.cpu()[used].double())
                fired += torch.bincount(features, minlength=sae.d_sae)
            _update(chunk, x, torch.cat(errors, 1), (fit, test), (null_fit, null_test), generator)
            bar.advance(x.shape[0])
    return fit, test, (null_fit, null_test), found


def _second_pass(
    tokens: Tokens,
    site: str,
    saes: Mapping[str, Dictionary],
    passes: dict[str, Passes],
    generator: torch.Generator,
) -> Measured:
    some = next(iter(passes.values()))
    d, n_norms = some.fit.mean_x.numel(), (len(NORMS) + len(EXTRA)) * len(saes)
    moments = [CrossMoments(d, n_norms) for _ in range(4)]
    measured = Measured(
        passes,
        np.zeros(tokens.n, np.float32),
        np.zeros(tokens.n, np.float32),
        moments[0],
        moments[1],
        (moments[2], moments[3]),
    )
    biases = {name: bias_of(sae) for name, sae in saes.items()}
    with progress("error norms", tokens.n) as bar:
        for chunk in tokens.chunks(site):
            x, where = chunk.x[site], chunk.where
            measured.x_norm[where] = _square(x)
            measured.x_centred[where] = _square(x - _split_mean(chunk, some.fit.mean_x, some.test.mean_x))
            columns = []
            for name, sae in saes.items():
                mine = passes[name]
                x_hat = reconstruct(sae, x, site)
                e, part = x - x_hat, mine.linear(x)
                mine.total[where] = _square(e)
                mine.linear_norm[where] = _square(part)
                mine.nonlinear[where] = _square(e - part)
                mine.centred[where] = _square(e - _split_mean(chunk, mine.fit.mean_y, mine.test.mean_y))
                total = torch.from_numpy(mine.total[where])
                active = (x_hat - biases[name]).square().sum(1)
                rest = [torch.from_numpy(a[where]) for a in (mine.linear_norm, mine.nonlinear)]
                whole = [x_hat.square().sum(1), (x_hat + part).square().sum(1)]
                columns += [total, *whole, *rest, total.sqrt(), active]
            _update(chunk, x, torch.stack(columns, 1), (moments[0], moments[1]), (moments[2], moments[3]), generator)
            bar.advance(x.shape[0])
    return measured


def _update(  # noqa: PLR0917
    chunk: Chunk,
    x: Tensor,
    y: Tensor,
    real: tuple[CrossMoments, CrossMoments],
    null: tuple[CrossMoments, CrossMoments],
    generator: torch.Generator,
) -> None:
    """Give the tokens of a chunk to the moments of their split, and pairs of different tokens to the control's."""
    for some, moments, control in ((chunk.fit, real[0], null[0]), (~chunk.fit, real[1], null[1])):
        here, there = x[some], y[some]
        moments.update(here, there)
        control.update(here, there[torch.randperm(len(there), generator=generator)])


def _split_mean(chunk: Chunk, fit: Tensor, test: Tensor) -> Tensor:
    return torch.where(chunk.fit[:, None], fit, test).float()


def _square(x: Tensor) -> np.ndarray:
    return x.square().sum(1).numpy()
