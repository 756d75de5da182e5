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
from saelab.analysis.autointerp.examples import Corpus
from saelab.analysis.autointerp.intervals import mean, proportion
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.parse import parse_index
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, make_score, wording
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
BEGINNING_TOKENS = 8
"""Tokens of a beginning."""
LONGEST = 32
"""Tokens of an explanation whose probability is taken."""
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
        self._shared: tuple[Tensor, list[Tensor]] | None = None

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations, many features in each forward pass."""
        if not items:
            return []
        beginnings, clean = self._beginnings(items[0][0].score.corpus)
        texts, rows = len(beginnings), len(items) * len(beginnings)
        directions = write_directions(self.sae, [examples.feature for examples, _ in items])
        steered, reached = [], []
        for k in range(0, rows, BATCH):
            part = np.arange(k, min(k + BATCH, rows))
            tokens, vectors = beginnings[part % texts], directions[part // texts]
            strengths, kls = self.strengths(tokens, vectors)
            reached += kls.tolist()
            steered += list(self._continued(tokens, strengths[:, None] * vectors))
        judged = self._judged if self.judge else self._by_model
        values = np.array(judged(items, beginnings, clean, steered)).reshape(len(items), texts)
        kl = np.array(reached).reshape(len(items), texts)
        return [
            self._score(item, found, float(of_feature.mean()))
            for item, found, of_feature in zip(items, values, kl, strict=True)
        ]

    def _score(self, item: Item, found: np.ndarray, kl: float) -> Score:
        estimate = proportion(float((found == 1).sum()), len(found)) if self.judge else mean(found)
        return make_score(
            estimate,
            item[0].feature,
            self.name,
            n=len(found),
            failures=int(np.isnan(found).sum()),
            author=item[1].author if item[1] else "",
            judge=self.judge_name,
            detail={"kl": kl},
        )

    def _beginnings(self, corpus: Corpus) -> tuple[Tensor, list[Tensor]]:
        """First tokens of some windows of the score half, the same for all features, and their clean continuations."""
        if self._shared is None:
            windows = corpus.windows
            long_enough = np.flatnonzero(windows.scored & (windows.stops - windows.starts >= BEGINNING_TOKENS))
            generator = np.random.default_rng([self.config.seed, 13])
            chosen = generator.choice(long_enough, min(self.config.texts, len(long_enough)), replace=False)
            bos = self.model.tokenizer.bos_token_id
            start = [] if bos is None else [bos]
            rows = [[*start, *corpus.window_ids(w)[:BEGINNING_TOKENS].tolist()] for w in chosen.tolist()]
            tokens = torch.tensor(rows)
            self._shared = tokens, list(self._continued(tokens, None))
        return self._shared

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
        log_p: Tensor = self.model.logits(tokens, replace=replace)[:, -1].float().cpu().log_softmax(-1)
        return log_p

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
        self, items: Sequence[Item], beginnings: Tensor, clean: list[Tensor], steered: list[Tensor]
    ) -> list[float]:
        """1 for right, 0 for wrong, nan for an answer that cannot be read (which counts as wrong)."""
        assert self.judge is not None, "asked without a judge"
        sides, requests, texts = [], [], len(beginnings)
        for k, written in enumerate(steered):
            examples, explanation = items[k // texts]
            side = int(np.random.default_rng([self.config.seed, examples.feature, k % texts]).integers(2))
            pair = (self._text(clean[k % texts]), self._text(written))
            first, second = pair if side else pair[::-1]
            said = explanation.text if explanation else ""
            messages = prompts.intervention_messages(said, self._text(beginnings[k % texts]), first, second)
            sides.append(side)
            requests.append(Request(messages, max_tokens=8))
        replies = ask_all(self.judge, requests)
        guesses = [None if r.refused or r.error else parse_index(r.text, 2) for r in replies]
        return [float("nan") if g is None else float(g == side) for g, side in zip(guesses, sides, strict=True)]

    @torch.no_grad()
    def _by_model(
        self, items: Sequence[Item], beginnings: Tensor, clean: list[Tensor], steered: list[Tensor]
    ) -> list[float]:
        about, texts = self._encode(ABOUT), len(beginnings)
        said = [self._encode(wording(item))[:LONGEST] or [0] for item in items]
        bos = self.model.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        rows = [([*start, *text.tolist(), *about], said[k // texts]) for k, text in enumerate(steered)]
        rows += [([*start, *clean[k % texts].tolist(), *about], said[k // texts]) for k in range(len(steered))]
        losses = mean_losses(self.model, rows)
        return [losses[len(steered) + k] - losses[k] for k in range(len(steered))]

    def _encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return list(self.model.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"])
