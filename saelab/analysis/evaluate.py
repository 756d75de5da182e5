"""``evaluate``: reconstruction, sparsity and the effect on the model's predictions, of one SAE at one site.

Over the same rows of text, the model runs

1. up to the site only, for the mean activation (left out when the caller gives a mean);
2. untouched, the site read in the same pass: cross-entropy, and x for the reconstruction statistics;
3. with the site replaced by the SAE's reconstruction;
4. with the site replaced by zero;
5. with the site replaced by the mean.

A transcoder reads one site and reconstructs another (``target_site``): its reconstruction of 2. is put in the place of
the target, whose mean and variance are the ones that count.

Beside the code of inference stands the code as training chooses it (see :mod:`saelab.analysis.trained_mode`). A
gradient SAE's choice in training needs one more pass, with gradients, and sees the next token: it is a separate number.

A prediction counts when the token it is about is a kept one (no BOS, no padding, no special token). Replaced are, by
default, the kept positions alone: a BOS position mostly acts as an attention sink with an enormous norm that SAEs
are not trained on, and replacing it would measure that and not the SAE. ``splice="all"`` replaces every position.
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.analysis.evaluation import Evaluation, load_evaluation, save_evaluation
from saelab.analysis.predictions import log_softmax, put, summed_cross_entropy, summed_divergence
from saelab.analysis.reconstruction import Reconstruction, ratio, rebuild
from saelab.analysis.trained_mode import TrainedMode
from saelab.core.batch import Batch
from saelab.core.errors import ActivationError, ConfigError
from saelab.core.progress import progress
from saelab.core.statistics import IntegerCounts, Moments
from saelab.features.build import dictionary_fingerprint
from saelab.features.protocols import Dictionary, Model, Replace, Rows
from saelab.features.rows import (
    Piece,
    describe_rows,
    dictionary_name,
    encode_in_parts,
    pieces,
    read_site,
    require_finite,
    require_fit,
    source_fingerprint,
    source_name,
)

__all__ = ["Evaluation", "evaluate", "load_evaluation", "save_evaluation", "site_mean"]

LOGIT_BYTES = 256 << 20
"""Batches are split by rows so that one float32 logit tensor stays below this."""
VARIANTS = ("sae", "zero", "mean")


@torch.no_grad()
def evaluate(
    model: Model,
    sae: Dictionary,
    rows: Rows,
    site: str,
    *,
    max_tokens: int | None = None,
    rows_per_batch: int = 16,
    density_dense: float = 0.1,
    splice: Literal["kept", "all"] = "kept",
    mean: Float[Tensor, " d"] | None = None,
    target_site: str | None = None,
    trained_batch: int = 4096,
) -> Evaluation:
    """Measure an SAE on text.

    ``max_tokens`` takes the fewest first rows that hold that many kept tokens. ``mean`` is the activation that the mean
    ablation puts in; without it, it is the mean over these same tokens, from a first pass that stops at the site. The
    result does not depend on ``rows_per_batch``, up to rounding in the model. ``target_site`` is the site that a
    transcoder reconstructs. ``trained_batch`` is the number of tokens that competed in a training batch.

    Raises :class:`ActivationError` when the SAE's width is not the site's and when activations hold NaN or infinity
    (rows named), :class:`TextError` when the rows hold no tokens.
    """
    require_fit(model, sae, site)
    target = site if target_site is None else target_site
    width = _require_target(model, sae, target)
    if splice not in ("kept", "all"):
        raise ConfigError(f"splice is '{splice}', expected 'kept' or 'all'")
    if mean is not None and tuple(mean.shape) != (width,):
        raise ActivationError(f"mean has shape {tuple(mean.shape)}, but {target} has width {width}; give ({width},)")
    mean_source = "tokens" if mean is None else "given"
    if mean is None:
        mean = site_mean(model, rows, target, max_tokens=max_tokens, rows_per_batch=rows_per_batch)
    run = _Run(model, sae, (site, target), splice=splice, mean=mean, trained_batch=trained_batch)
    with progress("evaluate", max_tokens) as bar:
        for batch in pieces(rows, rows_per_batch, max_tokens):
            for piece in _split(batch, model.d_vocab):
                run.update(piece)
                bar.advance(piece.n_kept)
    return Evaluation(
        **run.result(density_dense),
        density_dense=density_dense,
        splice=splice,
        mean_source=mean_source,
        site=site,
        target_site="" if target == site else target,
        model=model.name,
        model_fingerprint=model.fingerprint,
        source=source_name(rows),
        source_fingerprint=source_fingerprint(rows),
        rows=describe_rows(rows),
        sae=dictionary_name(sae),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        sae_fingerprint=dictionary_fingerprint(sae),
    )


@torch.no_grad()
def site_mean(
    model: Model, rows: Rows, site: str, *, max_tokens: int | None = None, rows_per_batch: int = 16
) -> Float[Tensor, " d"]:
    """Mean activation at a site over the kept tokens, float64; only the layers up to the site run."""
    moments = Moments(model.width(site))
    with progress("site mean", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            x = read_site(model, piece.tokens, site)
            require_finite(x, piece, site)
            moments.update(x[piece.keep.to(x.device)].float())
            bar.advance(piece.n_kept)
    return moments.mean


def _require_target(model: Model, sae: Dictionary, target: str) -> int:
    """Return the width of the site to replace; :class:`ActivationError` when reconstructions have another."""
    width, made = model.width(target), sae.W_dec.shape[1]
    if width != made:
        raise ActivationError(
            f"the SAE makes activations of width {made}, but {target} of {model.name} has width {width}; "
            "a transcoder needs the target_site it was trained on"
        )
    return width


def _split(piece: Piece, d_vocab: int) -> list[Piece]:
    """Cut a piece by rows so that its logits stay below ``LOGIT_BYTES``."""
    step = max(1, LOGIT_BYTES // (4 * d_vocab * piece.tokens.shape[1]))
    return [
        Piece(piece.first_row + i, piece.tokens[i : i + step], piece.keep[i : i + step])
        for i in range(0, piece.tokens.shape[0], step)
    ]


class _Run:
    """Everything accumulated over the pieces of one evaluation."""

    def __init__(
        self,
        model: Model,
        sae: Dictionary,
        sites: tuple[str, str],
        *,
        splice: str,
        mean: Float[Tensor, " d"],
        trained_batch: int,
    ) -> None:
        self.model, self.sae, self.splice, self.mean = model, sae, splice, mean
        self.site, self.target = sites
        self.reconstruction = Reconstruction(mean)
        self.l0 = IntegerCounts()
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.by_gradient = bool(getattr(sae, "needs_gradient", False)) and hasattr(model, "read_with_gradient")
        can = hasattr(sae, "encode_as_trained") and (self.by_gradient or not getattr(sae, "needs_gradient", False))
        self.trained_batch = trained_batch
        self.trained = TrainedMode(sae, mean, trained_batch) if can else None
        self.ce = dict.fromkeys(("clean", *VARIANTS), 0.0)
        self.kl = dict.fromkeys(VARIANTS, 0.0)
        self.n_predictions = 0
        self.n_rows = 0

    def update(self, piece: Piece) -> None:
        """Run the model on some rows: untouched, spliced and ablated."""
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Replace:
            def visit(x: Tensor) -> Tensor:
                seen[name] = x
                return x

            return visit

        clean = self.model.logits(piece.tokens, replace={name: look(name) for name in (self.site, self.target)})
        x, y = seen[self.site], seen[self.target]
        require_finite(x, piece, self.site)
        require_finite(y, piece, self.target)
        keep = piece.keep.to(x.device)
        where = keep if self.splice == "kept" else torch.ones_like(keep)
        gradient = self._gradient(piece)
        self._note_trained(x, y, gradient, keep)
        replaced = {
            "sae": self.reconstruct(x, y, keep, where),
            "zero": torch.zeros_like(y[where]),
            "mean": self.mean.to(y).expand_as(y[where]),
        }
        if gradient is not None:
            code = self.sae.encode_as_trained(Batch(x[where].float(), None, gradient[where]))  # type: ignore[attr-defined]
            replaced["trained"] = rebuild(self.sae, x[where].float(), code).to(y)
        scored = torch.zeros_like(piece.keep)
        scored[:, :-1] = piece.keep[:, 1:]
        scored = scored.to(clean.device)
        targets = piece.tokens[:, 1:][piece.keep[:, 1:]].to(clean.device)
        self.n_predictions += targets.numel()
        self.n_rows += piece.tokens.shape[0]
        log_p = log_softmax(clean[scored])
        del clean
        self.ce["clean"] += summed_cross_entropy(log_p, targets)
        for name, values in replaced.items():
            logits = self.model.logits(piece.tokens, replace={self.target: put(values, where)})
            log_q = log_softmax(logits[scored])
            self.ce[name] = self.ce.get(name, 0.0) + summed_cross_entropy(log_q, targets)
            self.kl[name] = self.kl.get(name, 0.0) + summed_divergence(log_p, log_q)

    def _gradient(self, piece: Piece) -> Float[Tensor, "b t d"] | None:
        """Gradient of the summed next-token loss at the site, for an SAE that chooses by it."""
        if not self.by_gradient:
            return None
        with torch.enable_grad():
            _, gradients = self.model.read_with_gradient(piece.tokens, piece.keep, [self.site])  # type: ignore[attr-defined]
        found: Tensor = gradients[self.site]
        return found

    def _note_trained(self, x: Tensor, y: Tensor, gradient: Tensor | None, keep: Bool[Tensor, "b t"]) -> None:
        if self.trained is not None:
            target = None if self.target == self.site else y[keep].float().to(self.sae.W_dec.device)
            x = x[keep].to(self.sae.W_dec.device, torch.float32)
            self.trained.update(x, target, None if gradient is None else gradient[keep].to(x))

    def reconstruct(
        self,
        x: Float[Tensor, "b t d_in"],
        y: Float[Tensor, "b t d"],
        keep: Bool[Tensor, "b t"],
        where: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "n d"]:
        """Reconstruct the positions ``where``, and count the kept ones among them."""
        code = encode_in_parts(self.sae, x[where], self.site)
        x_hat = rebuild(self.sae, x[where].float(), code)
        kept = keep[where].to(x_hat.device)
        self.reconstruction.update(y[where].to(x_hat)[kept], x_hat[kept])
        self.l0.update(code.l0()[kept].cpu().numpy())
        active = kept[code.rows()] & (code.values > 0)
        self.fired += torch.bincount(code.indices[active].cpu(), minlength=self.sae.d_sae)
        return x_hat.to(y)

    def result(self, density_dense: float) -> dict[str, Any]:
        """Return the measured fields of an :class:`Evaluation`."""
        rebuilt = self.reconstruction.result()
        ce = {name: ratio(total, self.n_predictions) for name, total in self.ce.items()}
        kl = {name: ratio(total, self.n_predictions) for name, total in self.kl.items()}
        return {
            "fvu": rebuilt.fvu,
            "explained_variance": 1 - rebuilt.fvu,
            "mse": rebuilt.mse,
            "nmse": rebuilt.nmse,
            "cosine": rebuilt.cosine,
            "shrinkage": rebuilt.shrinkage,
            "l0": self.l0.mean,
            "l0_std": self.l0.std,
            "l0_percentiles": {str(q): self.l0.percentile(q) for q in (0, 5, 25, 50, 75, 95, 100)},
            "l0_counts": np.trim_zeros(self.l0.counts, "b").tolist(),
            "dead_fraction": float((self.fired == 0).double().mean()),
            "dense_fraction": float((self.fired > density_dense * rebuilt.n).double().mean()),
            **{f"ce_{name}": value for name, value in ce.items()},
            "ce_recovered": ratio(ce["zero"] - ce["sae"], ce["zero"] - ce["clean"]),
            "ce_recovered_mean": ratio(ce["mean"] - ce["sae"], ce["mean"] - ce["clean"]),
            **{f"kl_{name}": kl[name] for name in VARIANTS},
            "kl_score": ratio(kl["zero"] - kl["sae"], kl["zero"]),
            "kl_score_mean": ratio(kl["mean"] - kl["sae"], kl["mean"]),
            "n_tokens": rebuilt.n,
            "n_predictions": self.n_predictions,
            "n_rows": self.n_rows,
            **self._trained_result(ce),
        }

    def _trained_result(self, ce: dict[str, float]) -> dict[str, Any]:
        """Return the measured fields about the code as training chooses it."""
        if self.trained is None:
            return {}
        found = self.trained.result()
        fields = {"fvu_trained": found.fvu, "l0_trained": found.l0}
        if self.by_gradient:
            fields["ce_recovered_trained"] = ratio(ce["zero"] - ce["trained"], ce["zero"] - ce["clean"])
        return fields | {"trained_batch": self.trained_batch, "trained_tokens": found.n_tokens}
