"""Intervention: what the feature *does*, against what its explanation says.

The feature is steered (``h + strength v``, v what it writes) at the strength at which the next token's distribution
after each beginning is ``kl`` nats from the clean one, found by bisection and the same for all features, so that a
feature with a long decoder row has no advantage. Beginnings are continued steered and clean with the same noise.

* Without a judge, a language model (the one under study will do) scores
  ``log p(explanation | steered text) - log p(explanation | clean text)``, in nats per token of the explanation.
* With a judge, it is asked which of the two continuations shows what the explanation says: accuracy, chance 0.5.

The paper's own form (an explainer describes the generations first) costs one more call; this is a simplification.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.intervals import Estimate, mean, proportion
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.parse import parse_index
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, draws, make_score
from saelab.analysis.autointerp.scorers.losses import mean_losses
from saelab.analysis.prompt import write_directions
from saelab.features.explanations import Score
from saelab.features.protocols import Dictionary

BISECTIONS = 9
"""Steps in which the strength is found, to a factor of about 1.02."""
WEAKEST, STRONGEST = 1e-3, 30.0
"""Strengths tried, in lengths of a typical activation at the site."""
BATCH = 256
"""Rows that are continued at once."""
BEGINNING_TOKENS = 16
"""Tokens of a beginning: those before a negative window's middle."""
ABOUT = "\n# This text is about: "
"""What stands between a text and the explanation whose probability is taken."""


class InterventionScorer:
    """``model`` runs the site; ``judge`` is optional."""

    name = "intervention"
    needs_explanation = True

    def __init__(
        self, config: ScoringConfig, model: Any, sae: Dictionary, site: str, judge: Judge | None = None
    ) -> None:
        self.config, self.model, self.sae, self.site, self.judge = config, model, sae, site, judge
        self.judge_name = judge.name if judge else str(model.name)

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations, many features in each forward pass."""
        rows: list[tuple[int, Tensor]] = []
        for number, (examples, _) in enumerate(items):
            rows += [(number, beginning) for beginning in self._beginnings(examples)]
        if not rows:
            return []
        clean, steered, reached = [], [], []
        features = [examples.feature for examples, _ in items]
        directions = write_directions(self.sae, features)
        for k in range(0, len(rows), BATCH):
            part = rows[k : k + BATCH]
            tokens = torch.stack([beginning for _, beginning in part])
            vectors = directions[[number for number, _ in part]]
            strengths, kls = self.strengths(tokens, vectors)
            reached += kls.tolist()
            clean += list(self._continued(tokens, None))
            steered += list(self._continued(tokens, strengths[:, None] * vectors))
        values = (
            self._judged(items, rows, clean, steered) if self.judge else self._by_model(items, rows, clean, steered)
        )
        scores = []
        for number, (examples, explanation) in enumerate(items):
            mine = [k for k, (owner, _) in enumerate(rows) if owner == number]
            if not mine:
                continue
            found = np.array([values[k] for k in mine], np.float64)
            estimate: Estimate = proportion(float((found == 1).sum()), len(found)) if self.judge else mean(found)
            scores.append(
                make_score(
                    estimate,
                    examples.feature,
                    self.name,
                    n=len(mine),
                    failures=int(np.isnan(found).sum()),
                    author=explanation.author if explanation else "",
                    judge=self.judge_name,
                    detail={"kl": float(np.mean([reached[k] for k in mine]))},
                )
            )
        return scores

    def _beginnings(self, examples: Any) -> list[Tensor]:
        """First tokens of negative windows: text to which the feature has nothing to say yet."""
        generator = draws(self.config, self.name, examples.feature)
        bos = self.model.tokenizer.bos_token_id
        order = generator.permutation(len(examples.negatives)).tolist()
        long_enough = [k for k in order if len(examples.negatives.ids(k)) >= BEGINNING_TOKENS]
        found = []
        for k in long_enough[: self.config.texts]:
            ids = examples.negatives.ids(k)[:BEGINNING_TOKENS].tolist()
            found.append(torch.tensor([*([] if bos is None else [bos]), *ids]))
        return found

    @torch.no_grad()
    def strengths(
        self, tokens: Int[Tensor, "b t"], vectors: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Strength for each row at which KL(steered || clean) of the next token is ``kl``, and the KL it gives.

        Where the KL is not reached at ``STRONGEST``, that.
        """
        clean = self._next(tokens, None)
        (x,) = self.model.read(tokens, [self.site]).values()
        unit = float(x.float().norm(dim=-1).median()) / vectors.norm(dim=1).clamp_min(1e-30)
        low, high = (torch.full((len(tokens),), math.log(end)) for end in (WEAKEST, STRONGEST))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            kl = self._kl(clean, self._next(tokens, (middle.exp() * unit)[:, None] * vectors))
            below = kl < self.config.kl
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        final = ((low + high) / 2).exp() * unit
        return final, self._kl(clean, self._next(tokens, final[:, None] * vectors))

    @staticmethod
    def _kl(clean: Tensor, steered: Tensor) -> Float[Tensor, " b"]:
        return (steered.exp() * (steered - clean)).sum(-1)

    def _next(self, tokens: Int[Tensor, "b t"], added: Float[Tensor, "b d"] | None) -> Float[Tensor, "b v"]:
        """Log-probabilities of the next token, with a vector added at every position of each row."""
        replace = None if added is None else {self.site: lambda x: x + added[:, None].to(x)}
        return self.model.logits(tokens, replace=replace)[:, -1].float().cpu().log_softmax(-1)

    @torch.no_grad()
    def _continued(self, tokens: Int[Tensor, "b t"], added: Float[Tensor, "b d"] | None) -> Int[Tensor, "b more"]:
        """Draw a continuation of each row; rows at the same place of a batch share their noise."""
        generator = torch.Generator().manual_seed(self.config.seed)
        text = tokens
        for _ in range(min(self.config.generated, self.model.n_ctx - tokens.shape[1])):
            logits = self._next(text, added)
            noise = torch.rand(logits.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
            text = torch.cat([text, (logits - noise.log().neg().log()).argmax(-1, keepdim=True)], 1)
        return text[:, tokens.shape[1] :]

    def _text(self, ids: Tensor) -> str:
        return str(self.model.tokenizer.decode(ids.tolist()))

    def _judged(
        self, items: Sequence[Item], rows: Sequence[tuple[int, Tensor]], clean: list[Tensor], steered: list[Tensor]
    ) -> list[float]:
        """1 for right, 0 for wrong, nan for an answer that cannot be read (which counts as wrong)."""
        assert self.judge is not None, "asked without a judge"
        sides, requests = [], []
        for k, (number, beginning) in enumerate(rows):
            examples, explanation = items[number]
            side = int(np.random.default_rng([self.config.seed, examples.feature, k - rows[0][0]]).integers(2))
            pair = (self._text(clean[k]), self._text(steered[k]))
            first, second = pair if side else pair[::-1]
            said = explanation.text if explanation else ""
            messages = prompts.intervention_messages(said, self._text(beginning), first, second)
            sides.append(side)
            requests.append(Request(messages, max_tokens=8))
        replies = ask_all(self.judge, requests)
        guesses = [None if r.refused or r.error else parse_index(r.text, 2) for r in replies]
        return [float("nan") if g is None else float(g == side) for g, side in zip(guesses, sides, strict=True)]

    @torch.no_grad()
    def _by_model(
        self, items: Sequence[Item], rows: Sequence[tuple[int, Tensor]], clean: list[Tensor], steered: list[Tensor]
    ) -> list[float]:
        about = self._encode(ABOUT)
        said = [self._encode(explanation.text if explanation else "")[:64] or [0] for _, explanation in items]
        sequences = [
            (list(text.tolist()) + about, said[number])
            for texts in (steered, clean)
            for (number, _), text in zip(rows, texts, strict=True)
        ]
        log_p = [-loss for loss in self._losses(sequences)]
        return [log_p[k] - log_p[len(rows) + k] for k in range(len(rows))]

    def _encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return list(self.model.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"])

    def _losses(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        bos = self.model.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        return mean_losses(self.model, [(start + before, after) for before, after in sequences])
