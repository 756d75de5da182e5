"""``ActivationStore``: the folder that a harvest wrote, for reading.

One row per kept token, in text order, cut into shards of equally many rows (the last may be shorter). Every site, the
gradients (``<site>.grad``) and the columns ``token_id``, ``row`` (of the text) and ``position`` share that row order.
Shuffling happens when reading (:mod:`saelab.activations.stream`), so one store serves any seed and number of epochs.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from saelab.activations.shards import ShardInfo, ShardReader
from saelab.activations.stream import StoreStream
from saelab.core.artifacts import read_manifest
from saelab.core.errors import CorruptError, SiteError, StoreError, nearest
from saelab.core.progress import progress
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

KIND = "activation-store"
COLUMNS = ("token_id", "row", "position")


@runtime_checkable
class HasFingerprint(Protocol):
    """What :meth:`ActivationStore.check_model` needs of a model."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class HarvestReport:
    """What a harvest did, beside the store itself (which holds no times)."""

    tokens: int
    """Kept tokens collected by this call (not counting what a resumed harvest found on disk)."""
    seconds: float
    """Wall-clock time."""
    resumed_from: int
    """Rows that were already on disk."""
    bytes: int
    """Size of all shards."""

    @property
    def tokens_per_second(self) -> float:
        """Kept tokens per second of this call."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def open_store(path: str | Path) -> "ActivationStore":
    """Open a finished activation store. Raises ``MissingFileError``, ``FormatError`` or :class:`CorruptError`."""
    return ActivationStore(path)


class ActivationStore(Result):
    """A finished activation store on disk (:func:`open_store`)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        """Its folder."""
        self.manifest: dict[str, Any] = read_manifest(self.path, KIND)
        """Model, text, config, sites, counts and checksums, as in ``manifest.json``."""
        self.report: HarvestReport | None = None
        """What the harvest did, on the object that :func:`saelab.activations.harvest.harvest` returns."""
        try:
            self.n_rows = int(self.manifest["n_rows"])
            self._rows_per_shard = int(self.manifest["rows_per_shard"])
            self._shards = [ShardReader(self.path, ShardInfo.from_dict(shard)) for shard in self.manifest["shards"]]
            self._widths = {str(name): int(site["width"]) for name, site in self.manifest["sites"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.path}/manifest.json lacks or garbles {error}; harvest again") from None
        if sum(shard.info.rows for shard in self._shards) != self.n_rows:
            raise CorruptError(f"{self.path}/manifest.json: its shards do not add up to {self.n_rows} rows")

    def __repr__(self) -> str:
        model, text = self.manifest["model"], self.manifest["text"]
        return (
            f"ActivationStore({str(self.path)!r}: {self.n_rows:,} tokens of {text.get('source')}, {model['name']} at "
            f"{', '.join(self.sites)}, {self.manifest['dtype']})"
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row per site: width, rows, dtype, and megabytes of its activations."""
        import pandas as pd

        size = self.n_rows * self.dtype.itemsize / 1e6
        rows = [
            {"site": site, "width": width, "rows": self.n_rows, "dtype": self.manifest["dtype"], "MB": width * size}
            for site, width in self._widths.items()
        ]
        return pd.DataFrame(rows)

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``norms``: histogram of the activations' norms at each site."""
        from saelab.activations.figures import norm_histogram

        return {"norms": norm_histogram(self)}

    @property
    def sites(self) -> list[str]:
        """Names of the sites it holds."""
        return list(self._widths)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations on disk."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.manifest["dtype"]]

    @property
    def has_gradients(self) -> bool:
        """Whether each site's gradient was harvested as well."""
        return bool(self.manifest["gradients"])

    @property
    def fingerprint(self) -> str:
        """Checksum of its content (of the shards' checksums)."""
        return str(self.manifest["content"])

    def d_in(self, site: str) -> int:
        """Width of the activations at ``site``; :class:`SiteError` for a site it does not hold."""
        if site not in self._widths:
            raise SiteError(
                f"{self.path} does not hold site '{site}'{nearest(site, self._widths)} (it holds "
                f"{', '.join(self._widths)}); harvest it, or choose one of those"
            )
        return self._widths[site]

    def check_model(self, model: HasFingerprint) -> None:
        """Raise :class:`StoreError` when ``model`` is not the one this store was harvested from."""
        made_by = self.manifest["model"]
        if made_by["fingerprint"] != model.fingerprint:
            raise StoreError(
                f"{self.path} was harvested from {made_by['name']} ({made_by['fingerprint']}), not from {model.name} "
                f"({model.fingerprint}); harvest again with that model, or name the other one"
            )

    def verify(self) -> None:
        """Read every byte and compare checksums; :class:`CorruptError` names every damaged shard."""
        problems = []
        with progress("verifying", len(self._shards), "shards") as bar:
            for shard in self._shards:
                problem = shard.problem()
                if problem:
                    problems.append(problem)
                bar.advance(1)
        if problems:
            more = f" (and {len(problems) - 1} more: {', '.join(_name(p) for p in problems[1:])})"
            raise CorruptError(problems[0] + (more if len(problems) > 1 else ""))

    def read_rows(self, name: str, rows: Int64[Tensor, " n"]) -> Shaped[Tensor, "n ..."]:
        """Return rows of a site, of ``<site>.grad`` or of a column (``token_id``, ``row``, ``position``).

        In the dtype on disk, bit for bit, in the order asked for. Raises :class:`CorruptError` when a shard touched
        for the first time is damaged, :class:`StoreError` for a row number out of range.
        """
        self._check_name(name)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.n_rows):
            raise StoreError(f"row {int(rows.max())} is not in {self.path}, which has rows 0 to {self.n_rows - 1}")
        return self.gather(name, rows)

    def gather(self, name: str, rows: Int64[Tensor, " n"]) -> Shaped[Tensor, "n ..."]:
        """:meth:`read_rows` without its checks, for streams."""
        if len(self._shards) == 1:
            return self._shards[0].tensor(name).index_select(0, rows)
        shard_of, order = rows.div(self._rows_per_shard, rounding_mode="floor").sort()
        local = rows[order] - shard_of * self._rows_per_shard
        ends = torch.bincount(shard_of, minlength=len(self._shards)).cumsum(0).tolist()
        example = self._shards[0].tensor(name)
        out = example.new_empty((rows.numel(), *example.shape[1:]))
        for shard, (begin, end) in enumerate(pairwise([0, *ends])):
            if end > begin:
                part = self._shards[shard].tensor(name).index_select(0, local[begin:end])
                out.index_copy_(0, order[begin:end], part)
        return out

    def stream(
        self,
        site: str,
        batch_size: int,
        seed: int = 0,
        *,
        target_site: str | None = None,
        gradient: bool = False,
        epochs: int | None = None,
    ) -> StoreStream:
        """Return a batch source over the whole store, globally shuffled (:class:`StoreStream`).

        ``target_site`` fills ``Batch.target``, ``gradient`` fills ``Batch.gradient``. Endless unless ``epochs``.
        """
        d_in = self.d_in(site)
        if target_site is not None:
            self.d_in(target_site)
        if gradient and not self.has_gradients:
            raise StoreError(f"{self.path} holds no gradients; harvest again with gradients=true")
        return StoreStream(
            self.gather,
            n_rows=self.n_rows,
            d_in=d_in,
            site=site,
            batch_size=batch_size,
            seed=seed,
            target_site=target_site,
            gradient=gradient,
            epochs=epochs,
            identity=self.fingerprint,
        )

    def _check_name(self, name: str) -> None:
        if name in COLUMNS:
            return
        site = name.removesuffix(".grad")
        self.d_in(site)
        if site != name and not self.has_gradients:
            raise StoreError(f"{self.path} holds no gradients; harvest again with gradients=true")


def _name(problem: str) -> str:
    return Path(problem.split()[1]).name
