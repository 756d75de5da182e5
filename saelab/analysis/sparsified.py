"""Top-k neurons: a model whose MLPs keep only the k strongest neurons of each token, and the same against an SAE.

"Strongest" is largest for neurons that are never negative (ReLU) and largest in magnitude otherwise, which for ReLU is
the same. Positions that are not kept (BOS, padding) stay untouched, as an SAE would not be put there either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.analysis.reconstruction import Reconstruction, ratio
from saelab.core.errors import ConfigError
from saelab.core.progress import progress
from saelab.features.protocols import Dictionary, Model, Replace, Rows
from saelab.features.rows import Piece, encode_in_parts, pieces, require_fit

if TYPE_CHECKING:
    from saelab.analysis.lazy_neurons import LayerSparsity


@dataclass(frozen=True)
class TopKPoint:
    """The model with at most k neurons per token (and layer)."""

    k: int
    """Neurons kept."""
    share: float
    """k over the width."""
    ce: float
    """Mean next-token cross-entropy in nats."""
    ce_random: float
    """Control: with k neurons chosen at random for each token."""
    fvu: float | None
    """FVU of the compared site against the untouched model's; None in the curve over all layers."""


@dataclass(frozen=True)
class Comparison:
    """An SAE against its layer's neurons, cut to as many per token as the SAE has features active."""

    sae: str
    """The SAE's architecture or class."""
    site: str
    """Where it reads."""
    neurons: str
    """Site of the neurons: the MLP of the same block."""
    l0: float
    """Mean L0 of the SAE."""
    d_sae: int
    """Its number of features."""
    ce_clean: float
    """Cross-entropy of the untouched model."""
    ce_sae: float
    """With the site replaced by the SAE's reconstruction."""
    fvu_sae: float
    """FVU of the SAE at its site."""
    ce_ablated: float
    """With no neuron at all: what the MLP is worth."""
    points: list[TopKPoint]
    """The neurons at several k; the first is ``k = round(l0)``."""
    same_object: bool
    """Whether the SAE reconstructs the MLP's output, which the neurons make: only then are the FVUs comparable."""
    k_of_equal_ce: int | None
    """Fewest neurons, among the points, that do no worse than the SAE; None when none of them does."""
    n_predictions: int
    """Predictions scored."""


def keep_top(h: Float[Tensor, "... width"], k: int) -> Float[Tensor, "... width"]:
    """Return h with all but its k entries of largest magnitude set to 0 in each vector; h itself from k = width on."""
    if k >= h.shape[-1]:
        return h
    if k == 0:
        return torch.zeros_like(h)
    places = h.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(h).scatter_(-1, places, h.gather(-1, places))


def keep_random(h: Float[Tensor, "... width"], k: int, generator: torch.Generator) -> Float[Tensor, "... width"]:
    """Return h with all but k entries, drawn anew for each vector, set to 0."""
    if k >= h.shape[-1]:
        return h
    order = torch.rand(h.shape, generator=generator).to(h.device)
    places = order.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(h).scatter_(-1, places, h.gather(-1, places))


@torch.no_grad()
def top_k_curve(
    model: Model,
    rows: Rows,
    sites: Sequence[str],
    ks: Sequence[int],
    *,
    max_tokens: int | None,
    rows_per_batch: int = 16,
    seed: int = 0,
) -> list[TopKPoint]:
    """Cross-entropy with only k neurons per token kept at all ``sites`` at once, for each k."""
    if any(k < 0 for k in ks):
        raise ConfigError(f"top_k holds {min(ks)}, expected numbers of neurons from 0 on")
    totals = {k: [0.0, 0.0] for k in ks}
    n, generator = 0, torch.Generator().manual_seed(seed)
    with progress("top-k curve", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            n += int(_scored(piece).sum())
            for k in ks:
                for which, random in enumerate((None, generator)):
                    replace = {site: _cut(piece.keep, k, random) for site in sites}
                    totals[k][which] += _loss(model.logits(piece.tokens, replace=replace), piece)
            bar.advance(piece.n_kept)
    width = max(model.width(site) for site in sites)
    return [TopKPoint(k, k / width, ratio(top, n), ratio(other, n), None) for k, (top, other) in totals.items()]


@torch.no_grad()
def compare_with_sae(
    model: Any,
    sae: Dictionary,
    rows: Rows,
    site: str,
    *,
    max_tokens: int | None = 5_000,
    epsilon: float = 0.01,
    rows_per_batch: int = 16,
    seed: int = 0,
) -> "tuple[Comparison, LayerSparsity]":
    """Measure an SAE and the neurons of its block on the same tokens; return the comparison and the code's sparsity.

    Raises :class:`ConfigError` when the site is in no block with an MLP.
    """
    from saelab.analysis.lazy_neurons import UnitCounts, neuron_sites
    from saelab.features.rows import dictionary_name

    require_fit(model, sae, site)
    layer = model.layer(site)
    neurons = {block: name for name, block in neuron_sites(model).items()}
    if layer not in neurons:
        raise ConfigError(f"{site} is in no block with an MLP, so there are no neurons to compare with")
    l0, rms = _code_scale(model, sae, rows, site, max_tokens, rows_per_batch)
    width = model.width(neurons[layer])
    ks = sorted({min(width, max(1, round(l0)) * factor) for factor in (1, 2, 4, 8, 16)})
    run = _Against(model, sae, site, neurons[layer], ks, seed)
    code = UnitCounts(sae.d_sae, epsilon * rms)
    with progress("neurons against SAE", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            code.update(run.update(piece))
            bar.advance(piece.n_kept)
    n = run.n
    points = [
        TopKPoint(k, k / width, ratio(run.ce[k], n), ratio(run.ce_random[k], n), run.fvu[k].result().fvu) for k in ks
    ]
    ce_sae = ratio(run.ce_sae, n)
    good = [point.k for point in points if point.ce <= ce_sae]
    comparison = Comparison(
        sae=dictionary_name(sae),
        site=site,
        neurons=neurons[layer],
        l0=l0,
        d_sae=sae.d_sae,
        ce_clean=ratio(run.ce_clean, n),
        ce_sae=ce_sae,
        fvu_sae=run.fvu_sae.result().fvu,
        ce_ablated=ratio(run.ce_ablated, n),
        points=points,
        same_object=site == f"blocks.{layer}.hook_mlp_out",
        k_of_equal_ce=min(good) if good else None,
        n_predictions=n,
    )
    return comparison, code.result(dictionary_name(sae), layer)


class _Against:
    """Sums of a comparison."""

    def __init__(self, model: Any, sae: Dictionary, site: str, neurons: str, ks: list[int], seed: int) -> None:  # noqa: PLR0917
        self.model, self.sae, self.site, self.neurons, self.ks = model, sae, site, neurons, ks
        self.generator = torch.Generator().manual_seed(seed)
        middle = torch.zeros(sae.d_in)
        self.fvu_sae, self.fvu = Reconstruction(middle), {k: Reconstruction(middle) for k in ks}
        self.ce, self.ce_random = dict.fromkeys(ks, 0.0), dict.fromkeys(ks, 0.0)
        self.ce_clean = self.ce_sae = self.ce_ablated = 0.0
        self.n = 0

    def update(self, piece: Piece) -> Tensor:
        """Run the model on some rows in every way; return the dense code of the kept tokens."""
        keep = piece.keep
        self.n += int(_scored(piece).sum())
        clean, x = self._run(piece, {})
        self.ce_clean += clean
        code = encode_in_parts(self.sae, x, self.site)
        x_hat = self.sae.decode(code).to(x)
        self.fvu_sae.update(x, x_hat)

        def put(values: Tensor) -> Tensor:
            values = values.clone()
            values[keep.to(values.device)] = x_hat.to(values)
            return values

        self.ce_sae += _loss(self.model.logits(piece.tokens, replace={self.site: put}), piece)
        self.ce_ablated += self._run(piece, {self.neurons: _cut(keep, 0, None)})[0]
        for k in self.ks:
            loss, after = self._run(piece, {self.neurons: _cut(keep, k, None)})
            self.ce[k] += loss
            self.fvu[k].update(x, after)
            self.ce_random[k] += self._run(piece, {self.neurons: _cut(keep, k, self.generator)})[0]
        return code.to_dense()

    def _run(self, piece: Piece, replace: dict[str, Replace]) -> tuple[float, Tensor]:
        """Summed loss, and the activation at the SAE's site in that run."""
        seen: list[Tensor] = []

        def look(values: Tensor) -> Tensor:
            if self.site in replace:
                values = replace[self.site](values)
            seen.append(values)
            return values

        logits = self.model.logits(piece.tokens, replace={**replace, self.site: look})
        return _loss(logits, piece), seen[0][piece.keep.to(seen[0].device)].float()


def _code_scale(  # noqa: PLR0917
    model: Any, sae: Dictionary, rows: Rows, site: str, max_tokens: int | None, rows_per_batch: int
) -> tuple[float, float]:
    """Mean L0 of the SAE, and the root mean square of its code over tokens and features."""
    active = tokens = 0
    squares = 0.0
    with progress("SAE", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            (x,) = model.read(piece.tokens, [site]).values()
            code = encode_in_parts(sae, x[piece.keep.to(x.device)], site)
            active += int(code.l0().sum())
            squares += float(code.values.double().square().sum())
            tokens += code.n_tokens
            bar.advance(piece.n_kept)
    return ratio(active, tokens), (squares / max(tokens * sae.d_sae, 1)) ** 0.5


def _cut(keep: Bool[Tensor, "b t"], k: int, generator: torch.Generator | None) -> Replace:
    def replace(h: Tensor) -> Tensor:
        cut = keep_top(h, k) if generator is None else keep_random(h, k, generator)
        return torch.where(keep.to(h.device)[..., None], cut, h)

    return replace


def _scored(piece: Piece) -> Bool[Tensor, "b t"]:
    """Positions whose next token is a kept one."""
    scored = torch.zeros_like(piece.keep)
    scored[:, :-1] = piece.keep[:, 1:]
    return scored


def _loss(logits: Tensor, piece: Piece) -> float:
    scored = _scored(piece).to(logits.device)
    targets = piece.tokens[:, 1:][piece.keep[:, 1:]].to(logits.device)
    log_p = logits[scored].float().log_softmax(-1)
    return -float(log_p.gather(1, targets[:, None]).double().sum())
