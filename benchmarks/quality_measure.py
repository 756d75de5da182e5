"""What ``quality.py`` measures of an SAE: held-out FVU, L0, dead and under-used features, CE recovered.

The definitions are those of ``saelab eval`` (a test compares the two); here the held-out activations are in a store and
the model's untouched and ablated losses are taken once, because hundreds of SAEs are measured on the same text.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from saelab.activations.store import ActivationStore
from saelab.analysis.reconstruction import Reconstruction, ratio
from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.models.subject import SubjectModel
from saelab.models.tokens import TokenRows
from saelab.sae import SAE
from saelab.sae.gradient import GradientSAE
from saelab.sae.zipf import zipf_shares

CHUNK = 4096
ROWS_PER_BATCH = 16
VALIDATION = 0.25
"""Last part of the held-out rows, by which learning rates are chosen and nothing is reported."""
ZIPF_SHIFT, UNDERUSED = 20.0, 0.5
"""Law and fraction below which a feature counts as under-used: the defaults of aux_zipf."""

Encode = Callable[[Batch], SparseCode]


class HeldOut:
    """Held-out activations, their gradients where the store has them, and the text rows that they came from."""

    def __init__(self, model: SubjectModel, store: ActivationStore, rows: TokenRows, site: str, ce_rows: int) -> None:
        everything = torch.arange(store.n_rows)
        self.model, self.site = model, site
        self.x: Float[Tensor, "n d"] = store.read_rows(site, everything).float()
        self.gradient: Float[Tensor, "n d"] | None = None
        if store.has_gradients:
            self.gradient = store.read_rows(f"{site}.grad", everything).float()
        self.row: Int[Tensor, " n"] = store.read_rows("row", everything)
        self.position: Int[Tensor, " n"] = store.read_rows("position", everything).long()
        first = int(self.row[int(len(self.row) * (1 - VALIDATION))])
        self.test: Bool[Tensor, " n"] = self.row < first
        self.ce_rows = min(ce_rows, first)
        tokens, keep = [], []
        for batch in rows.batches(ROWS_PER_BATCH):
            tokens.append(batch.tokens)
            keep.append(batch.keep)
            if len(tokens) * ROWS_PER_BATCH >= self.ce_rows:
                break
        self.tokens, self.keep = torch.cat(tokens)[: self.ce_rows], torch.cat(keep)[: self.ce_rows]
        self.in_ce: Bool[Tensor, " n"] = self.row < self.ce_rows
        self.ce_clean = self.cross_entropy(None)
        n = int(self.in_ce.sum())
        self.ce_zero = self.cross_entropy(torch.zeros(n, self.x.shape[1]))
        self.ce_mean = self.cross_entropy(self.x[self.in_ce].mean(0).expand(n, -1))

    def about(self) -> dict[str, Any]:
        """Return what the numbers are of."""
        return {
            "test_tokens": int(self.test.sum()),
            "validation_tokens": int((~self.test).sum()),
            "ce_rows": self.ce_rows,
            "ce_clean": self.ce_clean,
            "ce_zero": self.ce_zero,
            "ce_mean": self.ce_mean,
        }

    @torch.no_grad()
    def cross_entropy(self, values: Float[Tensor, "n d"] | None) -> float:
        """Return the mean next-token loss over the first rows with the stored positions' activations replaced."""
        total, count = 0.0, 0
        row, position = self.row[self.in_ce], self.position[self.in_ce]
        for start in range(0, self.ce_rows, ROWS_PER_BATCH):
            end = min(start + ROWS_PER_BATCH, self.ce_rows)
            mine = (row >= start) & (row < end)
            tokens, scored = self.tokens[start:end], self.keep[start:end, 1:]
            replace = None
            if values is not None:
                where = (row[mine] - start, position[mine])
                replace = {self.site: _putting(where, values[mine])}
            logits = self.model.logits(tokens, replace=replace)[:, :-1][scored]
            total += float(nn.functional.cross_entropy(logits.float(), tokens[:, 1:][scored], reduction="sum"))
            count += int(scored.sum())
        return ratio(total, count)

    def recovered(self, ce: float) -> float:
        """Return the share of the loss that zero ablation costs and the reconstruction does not."""
        return ratio(self.ce_zero - ce, self.ce_zero - self.ce_clean)

    def batches(self, which: Bool[Tensor, " n"], size: int, shuffled: bool) -> Iterator[tuple[Tensor, Batch]]:
        """Yield places and activations of some tokens."""
        places = which.nonzero().squeeze(1)
        if shuffled:
            places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
        for part in torch.split(places, size):
            yield part, Batch(self.x[part], gradient=None if self.gradient is None else self.gradient[part])


def _putting(where: tuple[Tensor, Tensor], values: Tensor) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        return x.index_put(where, values.to(x))

    return replace


@torch.no_grad()
def measure(
    sae: SAE, heldout: HeldOut, *, encode: Encode | None = None, test: bool = True, ce: bool = True
) -> dict[str, Any]:
    """Measure an SAE in inference mode, or by another ``encode``, on the test tokens or the validation tokens."""
    which = heldout.test if test else ~heldout.test
    encode = encode or (lambda batch: sae.encode(batch.x))
    rebuilt = Reconstruction(heldout.x[which].mean(0))
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    l0: list[Tensor] = []
    x_hats = torch.zeros(int(heldout.in_ce.sum()), heldout.x.shape[1])
    for places, batch in heldout.batches(which, CHUNK, shuffled=False):
        code = encode(batch)
        x_hat = sae.decode(code)
        rebuilt.update(batch.x, x_hat)
        active = code.values > 0
        fired += torch.bincount(code.indices[active], minlength=sae.d_sae)
        l0.append(torch.bincount(code.rows()[active], minlength=code.n_tokens))
        inside = places < len(x_hats)  # rows are in order, so the CE rows come first
        x_hats[places[inside]] = x_hat[inside]
    result, counts = rebuilt.result(), torch.cat(l0).double()
    found = {
        "fvu": result.fvu,
        "l0": float(counts.mean()),
        "l0_std": float(counts.std()),
        "shrinkage": result.shrinkage,
        **usage(fired.double() / len(counts)),
    }
    if ce:
        loss = heldout.cross_entropy(x_hats)
        found |= {"ce": loss, "ce_recovered": heldout.recovered(loss)}
    return found


def usage(density: Float64[Tensor, " d_sae"]) -> dict[str, float]:
    """Return the share of features that never fired, and that fired less than half as often as a Zipf law expects.

    The law has the SAE's own L0 and compares each feature with its own rank, as aux_zipf does.
    """
    sizes = density.sort(descending=True).values
    law = (density.sum() * zipf_shares(len(sizes), 1.0, ZIPF_SHIFT)).clamp(max=1)
    return {
        "dead": float((density == 0).double().mean()),
        "underused": float((sizes < UNDERUSED * law).double().mean()),
    }


@torch.no_grad()
def measure_as_trained(sae: SAE, heldout: HeldOut, batch_size: int) -> dict[str, float]:
    """Return FVU and L0 of the choice that training makes, tokens competing in shuffled batches of its size."""
    rebuilt = Reconstruction(heldout.x[heldout.test].mean(0))
    active = tokens = 0
    for _, batch in heldout.batches(heldout.test, batch_size, shuffled=True):
        if len(batch.x) < batch_size:
            continue
        code = sae.encode_as_trained(batch)
        rebuilt.update(batch.x, sae.decode(code))
        active, tokens = active + int((code.values > 0).sum()), tokens + code.n_tokens
    return {"fvu_as_trained": rebuilt.result().fvu, "l0_as_trained": ratio(active, tokens)}


def by_gradient(sae: GradientSAE) -> Encode:
    """Return the encoder of a gradient SAE that sees the gradient of the true labels, and with it the labels."""
    return lambda batch: sae.encode_batch(batch, "grad")
