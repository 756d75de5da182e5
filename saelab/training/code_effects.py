"""What codes do: set the code that stands for a token at one position, and see whether that token gets likelier.

Tamkin et al. 2023 (arXiv 2310.17230, section 5) activate codes of a language model and count what it then writes. Here,
our design, with one number per token: a code *stands for* a next token when it is on where that token follows
(precision and recall, found on one half of the tokens and judged on the other, :mod:`saelab.training.code_metrics`). On
other text the code is set at one position of each row, in place of the codes that the head had chosen there, and the
log probability of the token after that position is compared with the unedited one, beside the same with random codes of
the same head: whatever any code does there is in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.core.errors import TextError
from saelab.core.progress import progress
from saelab.sae.codebook import CodeEdit
from saelab.training.code_metrics import match_codes
from saelab.training.codebook_model import CodebookModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CodeEffect:
    """What setting one token's code does to that token, means over rows of unseen text."""

    token: int
    """Id of the token that the code stands for, as the next one."""
    site: str
    """Where the code is."""
    group: int
    """Its head."""
    code: int
    """Its number."""
    precision: float
    """Share of the tokens where it is on that this token follows, on tokens it was not chosen on."""
    recall: float
    """Share of the places before this token where it is on, on these."""
    before: float
    """Log probability of the token, nothing set."""
    after: float
    """The same with the code set."""
    control: float
    """The same with a random code of the head set, mean over the random codes."""

    @property
    def gain(self) -> float:
        """Nats that setting the code adds."""
        return self.after - self.before

    @property
    def control_gain(self) -> float:
        """Nats that setting a random code adds."""
        return self.control - self.before


@dataclass(frozen=True)
class CodeEffects:
    """The effects of the codes that stand for a text's commonest tokens."""

    effects: list[CodeEffect]
    """One per token for which a code was found."""
    rows: int
    """Rows of text that codes were set in."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per token."""
        import pandas as pd

        return pd.DataFrame([{**vars(e), "gain": e.gain, "control_gain": e.control_gain} for e in self.effects])


@torch.no_grad()
def code_effects(
    model: CodebookModel,
    found_on: tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]],
    set_in: Int[Tensor, "rows length"],
    *,
    n_tokens: int = 20,
    n_random: int = 3,
    least_recall: float = 0.1,
    seed: int = 0,
) -> CodeEffects:
    """Find the codes that stand for the commonest next tokens of a text, and set each at the end of other rows.

    ``found_on``: tokens, and which of them count. ``set_in``: whole rows without padding; codes are set at their last
    position. A code must have ``least_recall`` on the tokens it is found on (among tens of thousands of codes some are
    precise by luck, on few tokens); tokens for which none has are left out. Raises :class:`TextError` for a text of
    fewer than two rows of two tokens.
    """
    tokens, keep = found_on
    if tokens.shape[0] < 2 or tokens.shape[1] < 2:
        raise TextError(f"codes are found on rows of tokens, not on {tuple(tokens.shape)}; give more text")
    following = tokens[:, 1:][keep[:, 1:]]
    wanted = torch.bincount(following).topk(min(n_tokens, int(following.max()) + 1)).indices
    places = best_codes(model, tokens, keep, wanted, least_recall)
    generator = torch.Generator().manual_seed(seed)
    before = model.logits(set_in)[:, -1].float().log_softmax(1).mean(0)
    effects = []
    with progress("codes", len(places), "tokens") as bar:
        for token, site, group, code, precision, recall in places:
            n_codes = model.codebook(site).config.codes
            others = (code + 1 + torch.randperm(n_codes - 1, generator=generator)[:n_random]) % n_codes
            means = [_set(model, set_in, site, group, c)[token].item() for c in [code, *others.tolist()]]
            control = sum(means[1:]) / max(len(means) - 1, 1)
            plain = before[token].item()
            effects.append(CodeEffect(token, site, group, code, precision, recall, plain, means[0], control))
            bar.advance(1)
    return CodeEffects(effects, len(set_in))


def best_codes(
    model: CodebookModel,
    tokens: Int[Tensor, "b t"],
    keep: Bool[Tensor, "b t"],
    wanted: Sequence[int] | Tensor,
    least_recall: float = 0.1,
) -> list[tuple[int, str, int, int, float, float]]:
    """Return, for each wanted next token, the code of all sites and heads of the best precision.

    As (token, site, head, code, precision, recall); found on even tokens, the last two judged on odd ones.
    """
    counted = keep[:, 1:] & keep[:, :-1]
    ids = torch.as_tensor(wanted)
    has = tokens[:, 1:][counted][:, None] == ids
    best: dict[int, tuple[float, tuple[int, str, int, int, float, float]]] = {}
    chosen = _chosen(model, tokens)
    for site in model.sites:
        for group in range(model.codebook(site).groups):
            indices = chosen[site][:, :-1, group][counted]
            on = torch.zeros(len(indices), model.codebook(site).config.codes, dtype=torch.bool)
            on.scatter_(1, indices, True)
            found = match_codes(on, has, least_recall)
            # Chosen by the finding half: its precision, taken again for the code that was found there.
            for k, code in enumerate(found.code.tolist()):
                if code < 0:
                    continue
                first = (on[::2, code] & has[::2, k]).sum().item() / max(int(on[::2, code].sum()), 1)
                token = int(ids[k])
                if token not in best or first > best[token][0]:
                    judged = float(found.precision[k]), float(found.recall[k])
                    best[token] = first, (token, site, group, code, *judged)
    return [best[int(token)][1] for token in ids if int(token) in best]


def _chosen(model: CodebookModel, tokens: Int[Tensor, "b t"], rows: int = 16) -> dict[str, Int[Tensor, "b t groups k"]]:
    parts = [model.chosen(tokens[start : start + rows]) for start in range(0, len(tokens), rows)]
    return {site: torch.cat([part[site] for part in parts]).cpu() for site in model.sites}


def _set(
    model: CodebookModel, rows: Int[Tensor, "rows length"], site: str, group: int, code: int
) -> Float[Tensor, " vocab"]:
    """Mean log probabilities after the last position when the code alone is what the head has there."""
    edit = CodeEdit([code], "replace", group=group, positions=[-1])
    return model.logits(rows, {site: [edit]})[:, -1].float().log_softmax(1).mean(0)
