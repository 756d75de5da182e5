"""From a batch of text to the rows that are kept: read the sites, leave out what is excluded, refuse NaN.

Shared by the harvest to disk and by the stream straight from the model, so that both see the same rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from saelab.core.errors import ActivationError


@runtime_checkable
class TextBatch(Protocol):
    """Some rows of token ids."""

    @property
    def tokens(self) -> Int[Tensor, "b t"]:
        """Token ids."""

    @property
    def keep(self) -> Bool[Tensor, "b t"]:
        """False at BOS, padding and other special tokens."""


@runtime_checkable
class TextRows(Protocol):
    """What activations are harvested from (``saelab.models.tokens.TokenRows``)."""

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[TextBatch]:
        """Yield rows ``start_row``, ``start_row + 1`` ..., ``rows_per_batch`` at a time; always the same."""

    def describe(self) -> dict[str, Any]:
        """Say what text and which tokenisation this is (JSON-able)."""


@runtime_checkable
class ReadableModel(Protocol):
    """What a harvest needs of ``saelab.models.subject.SubjectModel``."""

    name: str
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""

    def width(self, site: str) -> int:
        """Width of a site; ``SiteError`` for an unknown one."""

    def read(self, tokens: Int[Tensor, "b t"], sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations (B, T, d) at each site."""

    def read_with_gradient(
        self, tokens: Int[Tensor, "b t"], keep: Bool[Tensor, "b t"], sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations, and the gradient of the summed loss with respect to them."""


def is_padded(rows: TextRows) -> bool:
    """Say whether rows end in padding: one document per row."""
    return rows.describe().get("packing") == "documents"


class Collector:
    """Reads text batch by batch and returns the kept tokens' rows, one row order for all sites.

    Excluded are: positions with ``keep=False`` ("bos" at position 0, "padding" after the last kept position when the
    text is ``padded``, else "special"); with ``gradients``, the last kept position of each text
    row, after which there is no loss ("last"); with ``outlier_norm=c``, tokens whose norm at any of the sites exceeds
    c times that site's running median norm ("outlier_norm"). The running median moves a tenth of the way to each
    batch's own median, starting from the first batch's.
    """

    def __init__(
        self,
        model: ReadableModel,
        sites: Sequence[str],
        *,
        dtype: torch.dtype,
        outlier_norm: float | None,
        gradients: bool,
        padded: bool,
    ) -> None:
        self._padded = padded
        self._model, self._sites, self._dtype = model, list(sites), dtype
        self._outlier_norm, self._gradients = outlier_norm, gradients
        self.excluded: dict[str, int] = {"bos": 0, "padding": 0, "special": 0}
        """Number of positions left out so far, by reason."""
        if gradients:
            self.excluded["last"] = 0
        if outlier_norm is not None:
            self.excluded["outlier_norm"] = 0
        self.medians: dict[str, float] = {}
        """Running median norm of each site (empty without ``outlier_norm``)."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one row, and dtype, of every tensor that :meth:`collect` returns."""
        widths = {site: self._model.width(site) for site in self._sites}
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {s: ((w,), self._dtype) for s, w in widths.items()}
        if self._gradients:
            found |= {f"{site}.grad": ((width,), torch.float32) for site, width in widths.items()}
        return found | {"token_id": ((), torch.int32), "row": ((), torch.int64), "position": ((), torch.int32)}

    def state(self) -> dict[str, Any]:
        """Return the counts and running medians (JSON-able, exact)."""
        return {"excluded": dict(self.excluded), "medians": dict(self.medians)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Return to a :meth:`state`."""
        self.excluded, self.medians = dict(state["excluded"]), dict(state["medians"])

    def collect(self, batch: TextBatch, numbers: Int64[Tensor, " b"]) -> dict[str, Shaped[Tensor, "n ..."]]:
        """Run the model on a batch made of the text rows ``numbers``; return the kept tokens' rows.

        Raises :class:`ActivationError` for NaN or infinity, naming site and text rows.
        """
        keep = self._kept_positions(batch.keep)
        gradients: dict[str, Tensor] = {}
        if self._gradients:
            values, gradients = self._model.read_with_gradient(batch.tokens, batch.keep, self._sites)
        else:
            values = self._model.read(batch.tokens, self._sites)
        row, position = keep.nonzero(as_tuple=True)
        row = numbers[row]
        columns = {site: values[site].cpu()[keep].to(self._dtype) for site in self._sites}
        columns |= {f"{site}.grad": gradients[site].cpu()[keep].float() for site in gradients}
        for name, value in columns.items():
            _require_finite(name, value, row, position)
        columns |= {"token_id": batch.tokens[keep].int(), "row": row, "position": position.int()}
        if self._outlier_norm is None:
            return columns
        typical = self._typical(columns)
        self.excluded["outlier_norm"] += int((~typical).sum())
        return {name: value[typical] for name, value in columns.items()}

    def _kept_positions(self, keep: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        kept_after = keep.flip(1).cumsum(1).flip(1) - keep.long()
        left_out = ~keep
        left_out[:, 0] = False
        padding = left_out & (kept_after == 0) if self._padded else torch.zeros_like(keep)
        self.excluded["bos"] += int((~keep[:, 0]).sum())
        self.excluded["padding"] += int(padding.sum())
        self.excluded["special"] += int((left_out & ~padding).sum())
        if not self._gradients:
            return keep
        with_loss = keep & (kept_after > 0)
        self.excluded["last"] += int((keep & ~with_loss).sum())
        return with_loss

    def _typical(self, columns: dict[str, Tensor]) -> Bool[Tensor, " n"]:
        typical = torch.ones(columns["row"].shape[0], dtype=torch.bool)
        if not typical.numel():
            return typical
        for site in self._sites:
            norms: Float[Tensor, " n"] = columns[site].float().norm(dim=1)
            median = float(norms.median())
            before = self.medians.get(site, median)
            self.medians[site] = before + 0.1 * (median - before)
            assert self._outlier_norm is not None
            typical &= norms <= self._outlier_norm * self.medians[site]
        return typical


def _require_finite(name: str, value: Tensor, row: Tensor, position: Tensor) -> None:
    # The sum is finite only if every entry is; it costs one pass and no memory. Overflow is told apart below.
    if bool(value.sum(dtype=torch.float32).isfinite()):
        return
    bad = ~value.isfinite().all(dim=1)
    if not bool(bad.any()):
        return
    rows = sorted(set(row[bad].tolist()))
    shown = ", ".join(str(r) for r in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    raise ActivationError(
        f"the activations at {name} hold NaN or infinity in text rows {shown} (first at row {int(row[bad][0])}, "
        f"position {int(position[bad][0])}); try float32, or leave that text out"
    )
