"""A prompt through the model and the SAE: which features fire on which token, how surprising, and with what effect."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError, TextError
from saelab.features.protocols import Dictionary, Model
from saelab.features.rows import encode_in_parts, read_site, require_fit
from saelab.features.weights import unembedding

if TYPE_CHECKING:
    import pandas as pd

LOGIT_BYTES = 128 << 20
"""Ablated copies of a prompt run in batches whose float32 logits stay below this."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model and the SAE make of a prompt of T tokens."""

    tokens: Int[Tensor, " t"]
    """Token ids, BOS first where the model has one."""
    keep: Bool[Tensor, " t"]
    """False at BOS and other special tokens, which are not encoded."""
    code: SparseCode
    """Active features of each token (none where ``keep`` is False), values in scaled units."""
    loss: Float32[np.ndarray, " t"]
    """``-log p(token | tokens before)`` in nats; nan at position 0."""
    unexplained: Float32[np.ndarray, " t"]
    """``||x - x_hat||^2 / ||x||^2`` at each token; nan where ``keep`` is False."""

    def feature(self, i: int) -> Float32[np.ndarray, " t"]:
        """Values of one feature at each token, 0 where it does not fire."""
        code = self.code
        values = np.zeros(len(self.tokens), np.float32)
        mine = code.indices == i
        values[code.rows()[mine].numpy()] = code.values[mine].numpy()
        return values

    def to_frame(
        self, density: np.ndarray | None = None, maximum: np.ndarray | None = None, n_kept: int = 1
    ) -> "pd.DataFrame":
        """One row for each active feature of each token: ``position``, ``feature``, ``value``.

        With the ``density`` and ``maximum`` of every feature on a corpus of ``n_kept`` tokens (the columns of a feature
        store) also ``relative`` = value / maximum and ``surprise`` = relative * -log2(density), in bits: a feature
        that fires strongly and seldom comes first. A feature never seen on the corpus counts as seen half a time, its
        ``relative`` as 1.
        """
        import pandas as pd

        features, values = self.code.indices.numpy(), self.code.values.numpy()
        frame = pd.DataFrame({"position": self.code.rows().numpy(), "feature": features, "value": values})
        if density is not None and maximum is not None:
            highest = np.asarray(maximum)[features]
            frame["relative"] = np.where(highest > 0, values / np.where(highest > 0, highest, 1), 1.0)
            seen = np.maximum(np.asarray(density, np.float64)[features], 0.5 / n_kept)
            frame["density"] = np.asarray(density)[features]
            frame["surprise"] = frame["relative"] * -np.log2(np.minimum(seen, 1.0))
        return frame


def tokenise(model: Any, text: str, bos: bool = True) -> Int[Tensor, " t"]:
    """Token ids of a text, with the BOS token first if ``bos`` and the tokenizer has one.

    Raises :class:`TextError` for an empty text and for one longer than the model's context.
    """
    tokenizer = model.tokenizer
    # A lone surrogate is no Unicode text and no tokenizer takes it.
    clean = text.encode("utf-8", "replace").decode("utf-8")
    ids = list(tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise TextError("the prompt is empty; type some text")
    if bos and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if len(ids) > model.n_ctx:
        raise TextError(f"the prompt has {len(ids)} tokens, the model reads at most {model.n_ctx}; shorten it")
    return torch.tensor(ids, dtype=torch.int64)


def kept(model: Any, tokens: Int[Tensor, " t"]) -> Bool[Tensor, " t"]:
    """Return which tokens are no special tokens of the model's tokenizer."""
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int64)
    return ~torch.isin(tokens, special)


@torch.no_grad()
def read_prompt(
    model: Model, sae: Dictionary, site: str, tokens: Int[Tensor, " t"], keep: Bool[Tensor, " t"]
) -> Reading:
    """Run a prompt through the model and encode the tokens ``keep`` at the site."""
    require_fit(model, sae, site)
    x = read_site(model, tokens[None], site)[0].float().cpu()
    some = encode_in_parts(sae, x[keep], site).positive()
    x_hat = sae.decode(some).float().cpu()
    counts = torch.zeros(len(tokens), dtype=torch.int64)
    counts[keep] = some.offsets.diff().cpu()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    unexplained = np.full(len(tokens), np.nan, np.float32)
    share = (x[keep] - x_hat).square().sum(1) / x[keep].square().sum(1).clamp_min(1e-30)
    unexplained[keep.numpy()] = share.numpy()
    return Reading(
        tokens=tokens,
        keep=keep,
        code=SparseCode(some.indices.cpu(), some.values.float().cpu(), offsets, sae.d_sae),
        loss=_losses(model.logits(tokens[None]), tokens[None])[0].numpy(),
        unexplained=unexplained,
    )


@torch.no_grad()
def ablation_effects(
    model: Model, sae: Dictionary, site: str, reading: Reading, features: Sequence[int]
) -> Float32[np.ndarray, "n t"]:
    """How much the loss of each token rises (nats) when one feature is taken out of the whole prompt.

    For each feature the model runs again with ``f_i v_i`` subtracted at the site, ``v_i`` what the SAE writes for an
    activation of 1: an exact intervention, which keeps the SAE's error. Position 0 has no loss: nan.
    """
    _known(sae, features)
    if not len(features):
        return np.zeros((0, len(reading.tokens)), np.float32)
    values = torch.from_numpy(np.stack([reading.feature(i) for i in features]))
    directions = write_directions(sae, features)
    step = max(1, LOGIT_BYTES // (4 * model.d_vocab * len(reading.tokens)))
    parts = []
    for k in range(0, len(features), step):
        taken = values[k : k + step, :, None] * directions[k : k + step, None]

        def without(x: Tensor, taken: Tensor = taken) -> Tensor:
            return x - taken.to(x)

        rows = reading.tokens.expand(len(taken), -1)
        parts.append(_losses(model.logits(rows, replace={site: without}), rows))
    return (torch.cat(parts) - torch.from_numpy(reading.loss)).numpy()


def write_directions(sae: Dictionary, features: Sequence[int]) -> Float[Tensor, "n d_in"]:
    """What the SAE adds to the activation, in the model's units, for an activation of 1 of each feature."""
    indices = torch.tensor(list(features), dtype=torch.int64, device=sae.W_dec.device)
    one = SparseCode.from_topk(indices[:, None], torch.ones(len(indices), 1, device=indices.device), sae.d_sae)
    none = SparseCode.from_topk(indices[:1, None][:, :0], torch.ones(len(indices[:1]), 0).to(indices.device), sae.d_sae)
    return (sae.decode(one) - sae.decode(none)).detach().float().cpu()


@torch.no_grad()
def logit_weights(model: Model, sae: Dictionary, site: str, feature: int) -> Float32[np.ndarray, " v"] | None:
    """``W_dec[i] w_U`` for every token of the vocabulary, the final norm's weight folded in and its scale left out.

    None when the site is not in the residual stream. The units are those of the store's logit columns.
    """
    _known(sae, [feature])
    to_logits = unembedding(model, site, sae.d_in)
    if to_logits is None:
        return None
    row = sae.W_dec[feature].detach().float()
    return (row.cpu() @ to_logits.cpu()).numpy()


def _losses(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Loss of each token given those before it; nan at position 0."""
    log_p = logits[:, :-1].float().cpu().log_softmax(-1)
    losses = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.full((len(tokens), 1), math.nan), losses], 1)


def _known(sae: Dictionary, features: Sequence[int]) -> None:
    for i in features:
        if not 0 <= i < sae.d_sae:
            raise ConfigError(f"feature {i} does not exist; the SAE has features 0 to {sae.d_sae - 1}")
