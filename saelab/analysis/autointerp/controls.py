"""Controls: what a score is when there is nothing to be found. No score is worth more than its distance from these.

* ``shuffled``: the SAE's features, each with the explanation of another: what any text about the corpus scores.
* ``random-directions``: random directions at the site, each cut off so that it fires as often as one of the features.
* ``untrained``: the SAE as it was before training, with the same number of active features on each token.
* ``neurons``: the MLP neurons of the same layer, the same number of active ones on each token.

The last three are dictionaries of their own; their features are found, explained and scored by the same code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.features import layout
from saelab.features.explanations import SHUFFLED, Explanation
from saelab.features.protocols import Dictionary, Model
from saelab.features.rows import read_site
from saelab.features.store import FeatureStore

RANDOM, UNTRAINED, NEURONS = "random-directions", "untrained", "neurons"
CONTROLS = (SHUFFLED, RANDOM, UNTRAINED, NEURONS)
"""Names of the controls, in the order of the report."""
WIDEST = 4096
"""Features of a control's dictionary at most: enough for its neighbours to be near."""
SAMPLE_TOKENS = 20_000
"""Tokens on which means and cut-offs are measured."""


def shuffled(explanations: Sequence[Explanation], seed: int) -> list[Explanation]:
    """Give each feature the explanation of another one, a permutation without fixed points.

    An explanation that happens to be word for word the feature's own counts as another's only if all are the same.
    """
    count = len(explanations)
    if count < 2:
        return []
    order = np.random.default_rng([seed, 7]).permutation(count)
    texts = [e.text for e in explanations]
    giver = order[(np.arange(count) + 1) % count]
    for k in range(count):  # swap away the few pairs whose texts are equal
        if texts[giver[k]] == texts[order[k]]:
            for j in range(count):
                if texts[giver[j]] != texts[order[k]] and texts[giver[k]] != texts[order[j]]:
                    giver[k], giver[j] = giver[j], giver[k]
                    break
    found: dict[int, Explanation] = {}
    for taker, source in zip(order.tolist(), giver.tolist(), strict=True):
        found[taker] = replace(explanations[source], feature=explanations[taker].feature, control=SHUFFLED)
    return [found[k] for k in range(count)]


@dataclass(frozen=True, eq=False)
class StoreRows:
    """The text of a feature store as rows of tokens, so that a control sees exactly the same text."""

    store: FeatureStore
    """Whose text."""

    @property
    def name(self) -> str:
        """Name of the text."""
        return str(self.store.manifest["source"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the text."""
        return str(self.store.manifest["source_fingerprint"])

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[Any]:
        """Yield the rows; shorter ones are filled up with excluded tokens."""
        offsets = self.store.array(layout.ROW_OFFSETS)
        ids, keep = self.store.array(layout.IDS), self.store.array(layout.KEEP)
        for first in range(start_row, self.store.n_rows, rows_per_batch):
            spans = [
                slice(int(offsets[r]), int(offsets[r + 1]))
                for r in range(first, min(first + rows_per_batch, self.store.n_rows))
            ]
            width = max(1, *(span.stop - span.start for span in spans))
            tokens = torch.zeros(len(spans), width, dtype=torch.int64)
            kept = torch.zeros(len(spans), width, dtype=torch.bool)
            for r, span in enumerate(spans):
                tokens[r, : span.stop - span.start] = torch.from_numpy(ids[span].astype(np.int64))
                kept[r, : span.stop - span.start] = torch.from_numpy(np.array(keep[span]))
            yield SimpleNamespace(tokens=tokens, keep=kept)


class ControlDictionary:
    """Directions read from centred activations; on each token the k largest positive are kept (``k=None``: all)."""

    def __init__(
        self,
        name: str,
        directions: Float[Tensor, "d_in d_sae"],
        centre: Float[Tensor, " d_in"],
        *,
        cut: Float[Tensor, " d_sae"] | None = None,
        k: int | None = None,
    ) -> None:
        self.config = SimpleNamespace(architecture=name)
        self.W_enc, self.W_dec = directions, directions.T.contiguous()
        self.d_in, self.d_sae = directions.shape
        self.b_dec = centre
        self.b_enc = torch.zeros(self.d_sae, device=directions.device) if cut is None else -cut
        self.k = k

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the code of n tokens."""
        values = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.k is None:
            return SparseCode.from_dense(values.relu())
        best = values.topk(min(self.k, self.d_sae), dim=1)
        return SparseCode.from_topk(best.indices, best.values.relu(), self.d_sae).positive()

    def decode(self, code: SparseCode) -> Float[Tensor, "n d_in"]:
        """Return the activations that a code stands for."""
        return code.to_dense() @ self.W_dec + self.b_dec


def site_sample(model: Model, store: FeatureStore, site: str, tokens: int = SAMPLE_TOKENS) -> Float[Tensor, "n d"]:
    """Activations at a site on the first kept tokens of a store's text."""
    parts: list[Tensor] = []
    for batch in StoreRows(store).batches(16):
        parts.append(read_site(model, batch.tokens, site)[batch.keep].float().cpu())
        if sum(map(len, parts)) >= tokens:
            break
    return torch.cat(parts)[:tokens]


def random_directions(sample: Float[Tensor, "n d"], density: Float[np.ndarray, " m"], seed: int) -> ControlDictionary:
    """Directions drawn uniformly; direction i fires on the share ``density[i]`` of the sample's tokens."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sample.shape[1], len(density), generator=generator)
    directions /= directions.norm(dim=0)
    centre = sample.mean(0)
    cut = torch.empty(len(density))
    for k in range(0, len(density), 512):
        ordered = ((sample - centre) @ directions[:, k : k + 512]).sort(0).values
        places = np.clip(np.ceil((1 - density[k : k + 512]) * len(sample)).astype(np.int64) - 1, 0, len(sample) - 1)
        cut[k : k + 512] = ordered[torch.from_numpy(places), torch.arange(ordered.shape[1])]
    return ControlDictionary(RANDOM, directions, centre, cut=cut)


def untrained(sae: Dictionary, sample: Float[Tensor, "n d"], l0: float, seed: int) -> ControlDictionary:
    """Decoder rows drawn uniformly and the encoder tied to them, as training begins; top k of each token, k the L0."""
    count = min(sae.d_sae, WIDEST)
    generator = torch.Generator().manual_seed(seed + 1)
    directions = torch.randn(sae.d_in, count, generator=generator)
    k = max(1, round(l0 * count / sae.d_sae))
    return ControlDictionary(UNTRAINED, directions / directions.norm(dim=0), sample.mean(0), k=k)


def neurons(width: int, l0: float) -> ControlDictionary:
    """The coordinates of an activation as features; top k of each token, k the L0."""
    k = min(max(1, round(l0)), width)
    return ControlDictionary(NEURONS, torch.eye(width), torch.zeros(width), k=k)


def neuron_site(model: Any, site: str) -> str | None:
    """Return the site of the MLP neurons of the layer that a site is in; None when the model has none."""
    names = model.sites() if hasattr(model, "sites") else []
    layer = site.split(".")[1] if site.startswith("blocks.") else "0"
    wanted = f"blocks.{layer}.mlp.hook_post"
    return wanted if wanted in names else None


def control_features(live: Int64[np.ndarray, " n"], count: int, seed: int) -> Int64[np.ndarray, " k"]:
    """Draw the features that controls are scored on."""
    chosen = np.random.default_rng([seed, 11]).choice(live, min(count, len(live)), replace=False)
    return np.sort(chosen)
