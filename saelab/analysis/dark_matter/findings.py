"""The paper's findings, each held against one run: measured value, control, and a rule that says whether it holds.

The rules are this library's: the paper states findings on other models in words and ranges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saelab.analysis.dark_matter.result import DarkMatter


@dataclass(frozen=True)
class Finding:
    """One claim and what this run says about it."""

    claim: str
    """The claim."""
    measured: str
    """What was measured."""
    control: str
    """What the controls gave."""
    rule: str
    """When the claim counts as holding."""
    holds: bool | None
    """Whether it does; None when it was not measured."""


def findings(result: "DarkMatter") -> list[Finding]:
    """Return all claims that this run measured."""
    found = [make(result) for make in _CLAIMS]
    return [finding for finding in found if finding is not None]


def _vector(r: "DarkMatter") -> Finding | None:
    d = r.decomposition
    s = d.shrinkage
    low, high = min(x.r2 for x in r.decompositions), max(x.r2 for x in r.decompositions)
    return Finding(
        "about half of the error vector is a linear function of the activation",
        f"R2 {d.r2:.3f} [{d.r2_interval[0]:.3f}, {d.r2_interval[1]:.3f}] ({d.name}); {low:.3f} to {high:.3f} over "
        f"{len(r.decompositions)} SAEs; per-dimension mean {d.r2_per_dimension:.3f}",
        f"shuffled {d.r2_shuffled:.3f}; after rescaling x_hat {s.r2_rescaled:.3f} (shrinkage {s.shrinkage:.3f}, one "
        f"factor removes {s.removed:.1%} of the error)",
        "0.3 <= R2 <= 0.72, and still >= 0.3 after rescaling",
        0.3 <= d.r2 <= 0.72 and s.r2_rescaled >= 0.3,
    )


def _norm(r: "DarkMatter") -> Finding | None:
    d = r.decomposition
    size = max(d.baselines["x_norm"], d.baselines["x_norm_squared"])
    value = d.norm_r2["error"]
    return Finding(
        "over 90 % of the error's squared norm is a linear function of the activation",
        f"R2 {value:.3f} ({d.name}); of the norm without the square {d.norm_r2['error_norm']:.3f}",
        f"shuffled {d.norm_r2_shuffled['error']:.3f}; from ||x|| alone {size:.3f}, token identity "
        f"{d.baselines['token']:.3f}, L0 {d.baselines['l0']:.3f}",
        "R2 >= 0.9",
        value >= 0.9,
    )


def _nonlinear_norm(r: "DarkMatter") -> Finding | None:
    n = r.decomposition.norm_r2
    return Finding(
        "the norm of the nonlinear error is much less predictable than that of the whole error",
        f"R2 {n['nonlinear']:.3f} against {n['error']:.3f} (linear part {n['linear']:.3f})",
        f"shuffled {r.decomposition.norm_r2_shuffled['nonlinear']:.3f}",
        "lower by at least 0.1",
        n["nonlinear"] <= n["error"] - 0.1,
    )


def _same_tokens(r: "DarkMatter") -> Finding | None:
    if not r.token_scaling:
        return None
    far = max(r.token_scaling, key=lambda t: _width(r, t.larger) / _width(r, t.smaller))
    return Finding(
        "larger SAEs fail on the same tokens as smaller ones",
        f"R2 {far.r2:.3f} of ||e|| of {far.larger} on that of {far.smaller}; over all pairs "
        f"{min(t.r2 for t in r.token_scaling):.3f} to {max(t.r2 for t in r.token_scaling):.3f}",
        f"shuffled {far.r2_shuffled:.3f}; from ||x|| alone {far.r2_x_norm:.3f}, of the rest the smaller SAE's error "
        f"explains {far.r2_beyond_x_norm:.1%}",
        "R2 >= 0.5 between smallest and largest, and over a quarter of what ||x|| leaves is explained",
        far.r2 >= 0.5 and far.r2_beyond_x_norm >= 0.25,
    )


def _width(r: "DarkMatter", name: str) -> int:
    return next(d.d_sae for d in r.decompositions if d.name == name)


def _constant(r: "DarkMatter") -> Finding | None:
    s = r.scaling
    if s is None:
        return None
    low, high = s.nonlinear_slope_interval
    relative = s.nonlinear_slope / s.nonlinear
    total = (s.fvu[0] - s.fvu[-1]) / s.fvu[0]
    part = (s.fvu_nonlinear[0] - s.fvu_nonlinear[-1]) / s.fvu_nonlinear[0]
    return Finding(
        "nonlinear error stays about constant as SAEs grow, linear error shrinks",
        f"FVU_nonlinear {s.fvu_nonlinear[0]:.4f} at {s.widths[0]} to {s.fvu_nonlinear[-1]:.4f} at {s.widths[-1]}; "
        f"per doubling {s.nonlinear_slope:+.4f} [{low:+.4f}, {high:+.4f}], {relative:+.1%} of its mean",
        f"whole FVU falls by {total:.1%}, nonlinear by {part:.1%} over the ladder; floor c {s.c:.4f} "
        f"[{s.c_interval[0]:.4f}, {s.c_interval[1]:.4f}], exponent {s.b:.2f} [{s.b_interval[0]:.2f}, "
        f"{s.b_interval[1]:.2f}]",
        "nonlinear FVU changes by less than 5 % per doubling, and by less than half as much as the whole",
        abs(relative) < 0.05 and abs(part) < 0.5 * total,
    )


def _downstream(r: "DarkMatter") -> Finding | None:
    d = r.downstream
    if d is None:
        return None
    low, high = d.harm_share_interval
    harm = d.ce["sae"] - d.ce["clean"]
    noise = (d.ce["random_nonlinear"] - d.ce["clean"]) / harm
    return Finding(
        "nonlinear error does its share of the downstream harm",
        f"{d.harm_share_nonlinear:.1%} [{low:.1%}, {high:.1%}] of the harm, {d.norm_share_nonlinear:.1%} of the "
        f"squared norm; CE {d.ce['clean']:.3f} clean, {d.ce['sae']:.3f} with x_hat, {d.ce['sae+linear']:.3f} with "
        f"x_hat + l, {d.ce['sae+nonlinear']:.3f} with x_hat + eta",
        f"harm of random directions of the norm of eta: {noise:.2f} of the SAE's, eta itself {d.harm_nonlinear:.2f}",
        "the share of the harm is within 15 points of the share of the norm",
        abs(d.harm_share_nonlinear - d.norm_share_nonlinear) <= 0.15,
    )


def _pursuit(r: "DarkMatter") -> Finding | None:
    by = {p.method: p for p in r.pursuit}
    if not {"encoder", "gradient"} <= by.keys():
        return None
    own, better = by["encoder"], by["gradient"]
    fall, whole = 1 - better.fvu_nonlinear / own.fvu_nonlinear, 1 - better.fvu / own.fvu
    others = {"orthogonal": "orthogonal matching pursuit", "random": "gradient pursuit with random directions"}
    other = "; ".join(
        f"{label}: FVU {by[m].fvu:.4f}, nonlinear {by[m].fvu_nonlinear:.4f}" for m, label in others.items() if m in by
    )
    return Finding(
        "gradient pursuit at inference reduces the nonlinear error little",
        f"FVU_nonlinear {own.fvu_nonlinear:.4f} to {better.fvu_nonlinear:.4f} ({-fall:+.1%}), FVU {own.fvu:.4f} to "
        f"{better.fvu:.4f} ({-whole:+.1%}) at L0 {own.l0:.1f} and {better.l0:.1f}",
        other,
        "FVU_nonlinear falls by less than 10 %",
        fall < 0.1,
    )


def _earlier(r: "DarkMatter") -> Finding | None:
    by = {e.predictors: e for e in r.earlier}
    methods = {p.method: p for p in r.pursuit}
    if "own+earlier" not in by or not {"encoder", "gradient"} <= methods.keys():
        return None
    pursuit = 1 - methods["gradient"].fvu_nonlinear / methods["encoder"].fvu_nonlinear
    d, all_of = r.decomposition, by["own+earlier"]
    fall = 1 - all_of.fvu / d.fvu
    best = max((e for k, e in by.items() if k not in ("own", "earlier", "own+earlier")), key=lambda e: e.nonlinear)
    return Finding(
        "what earlier SAEs reconstruct removes more of the nonlinear error than pursuit",
        f"{all_of.nonlinear:.1%} of the nonlinear error explained from its own and earlier reconstructions (own alone "
        f"{by['own'].nonlinear:.1%}, best single site {best.predictors} {best.nonlinear:.1%}); FVU {d.fvu:.4f} to "
        f"{all_of.fvu:.4f} ({-fall:+.1%})",
        f"shuffled {all_of.shuffled:.3f}; pursuit removes {pursuit:.1%} of the nonlinear error",
        "the share explained is larger than the share that pursuit removes",
        all_of.nonlinear > pursuit,
    )


def _error_saes(r: "DarkMatter") -> Finding | None:
    by = {e.part: e for e in r.error_saes}
    if not {"linear", "nonlinear"} <= by.keys():
        return None
    linear, nonlinear = by["linear"], by["nonlinear"]
    return Finding(
        "an SAE trained on the linear error rebuilds it better than one trained on the nonlinear error",
        f"FVU {linear.fvu:.3f} on l, {nonlinear.fvu:.3f} on eta",
        f"Gaussians of the same covariance: {linear.fvu_gaussian:.3f} and {nonlinear.fvu_gaussian:.3f}",
        "FVU on l is below FVU on eta",
        linear.fvu < nonlinear.fvu,
    )


_CLAIMS: tuple[Callable[["DarkMatter"], Finding | None], ...] = (
    _vector,
    _norm,
    _nonlinear_norm,
    _same_tokens,
    _constant,
    _downstream,
    _pursuit,
    _earlier,
    _error_saes,
)
