"""End-to-end training: an SAE is judged by what the frozen model makes of its reconstruction.

Braun et al. 2024, "Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning"
(arXiv 2405.12241); a short fine-tuning of an SAE that was trained on reconstruction is enough by Karvonen 2025,
"Revisiting End-To-End Sparse Autoencoder Training" (arXiv 2503.17272). With x_hat in the place of the activation at
the kept positions of a text,

    KL    mean over predictions of KL(p_clean || p_spliced), or (``loss: ce``) the next-token cross-entropy
    NMSE  mean over later sites of sum ||a - a_spliced||^2 / sum ||a - mean a||^2 there
    L     = d_in (weight KL + downstream NMSE) + reconstruction MSE + the architecture's other terms

The MSE is in scaled units, about d_in when nothing is explained: the factor d_in brings all terms to one scale (ours),
so that sparsity penalties and the gradient's clipping mean what they mean in ordinary training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.config import Config
from saelab.models.sites import Replacement
from saelab.sae import SAE, StepContext, TrainingPass

__all__ = ["EndToEnd", "EndToEndConfig", "TextBatch"]


class EndToEndConfig(Config):
    """What an SAE is judged by when the model runs in the loop."""

    loss: Literal["kl", "ce"] = "kl"
    """Divergence from the clean model's predictions, or the loss on the text itself."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of that loss."""
    reconstruction: float = Field(default=1.0, ge=0)
    """Weight of the reconstruction at the site itself (0: purely end to end)."""
    downstream: float = Field(default=0.0, ge=0)
    """Weight of the reconstruction at later sites."""
    downstream_sites: list[str] = Field(default_factory=list)
    """Those sites; empty: the residual stream after every later block."""


@dataclass(frozen=True, eq=False)
class TextBatch(Batch):
    """Activations of the kept tokens of some rows of text, with the text and the untouched model's predictions."""

    tokens: Int[Tensor, "b t"] | None = None
    """Token ids."""
    keep: Bool[Tensor, "b t"] | None = None
    """Which positions ``x`` holds, in row order."""
    clean: Float[Tensor, "b t vocab"] | None = None
    """Logits of the untouched model."""
    later: Mapping[str, Tensor] | None = None
    """Activations (B, T, d) of the untouched model at the downstream sites."""


@runtime_checkable
class SpliceableModel(Protocol):
    """What end-to-end training needs of ``saelab.models.subject.SubjectModel``."""

    def logits(
        self, tokens: Int[Tensor, "b t"], replace: Mapping[str, Replacement] | None = None, grad: bool = False
    ) -> Tensor:
        """Logits, differentiable in what the replacements bring in."""


class EndToEnd:
    """The objective: losses of an SAE with the model in the loop. The model's weights are left alone."""

    def __init__(self, model: SpliceableModel, site: str, sites: Sequence[str], config: EndToEndConfig) -> None:
        """``site`` is where the reconstruction is put in, ``sites`` are the downstream ones."""
        self.model, self.site, self.sites, self.config = model, site, list(sites), config

    def __call__(self, sae: SAE, batch: Batch, context: StepContext) -> TrainingPass:
        """Return the losses of a raw batch, which must be a :class:`TextBatch`."""
        assert isinstance(batch, TextBatch)
        passed = sae.training_pass(sae.scale_batch(batch), context)
        assert passed.x_hat is not None
        logits, later = self._spliced(batch, passed.x_hat / sae.input_scale)
        losses = {**passed.losses, "mse": self.config.reconstruction * passed.losses["mse"]}
        losses[self.config.loss] = sae.d_in * self.config.weight * self._prediction_loss(batch, logits)
        if self.config.downstream and self.sites:
            losses["downstream"] = sae.d_in * self.config.downstream * _missed(batch, later)
        return replace(passed, losses=losses, mse=passed.losses["mse"].detach())

    def _spliced(self, batch: TextBatch, x_hat: Float[Tensor, "n d"]) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.tokens is not None
        assert batch.keep is not None
        keep, later = batch.keep, {}

        def put(x: Tensor) -> Tensor:
            return x.detach().masked_scatter(keep.to(x.device).unsqueeze(-1), x_hat.to(x))

        def look(name: str) -> Replacement:
            def visit(x: Tensor) -> Tensor:
                later[name] = x
                return x

            return visit

        replacements = {self.site: put, **{name: look(name) for name in self.sites}}
        return self.model.logits(batch.tokens, replacements, grad=True), later

    def _prediction_loss(self, batch: TextBatch, logits: Float[Tensor, "b t vocab"]) -> Float[Tensor, ""]:
        """Mean over the predictions of kept tokens."""
        assert batch.tokens is not None
        assert batch.keep is not None
        scored = batch.keep[:, 1:].to(logits.device)
        log_q = _log_softmax(logits[:, :-1][scored])
        n = max(log_q.shape[0], 1)
        if self.config.loss == "ce":
            targets = batch.tokens[:, 1:].to(logits.device)[scored]
            return -log_q.gather(1, targets[:, None]).sum() / n
        assert batch.clean is not None
        log_p = _log_softmax(batch.clean[:, :-1][scored])
        return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / n


def _log_softmax(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _missed(batch: TextBatch, later: Mapping[str, Float[Tensor, "b t d"]]) -> Float[Tensor, ""]:
    """Mean over the downstream sites of the share of their variance that the splice changes."""
    assert batch.later is not None
    assert batch.keep is not None
    shares = []
    for name, spliced in later.items():
        keep = batch.keep.to(spliced.device)
        clean = batch.later[name][keep].float()
        spread = (clean - clean.mean(0)).square().sum()
        shares.append((spliced[keep].float() - clean).square().sum() / spread.clamp(min=1e-12))
    return torch.stack(shares).mean()
