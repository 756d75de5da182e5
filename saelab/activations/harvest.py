"""Harvest: run the model over text once and keep the activations at some sites on disk.

The text is read in a fixed sequence of batches; kept tokens are appended, in text order, to shards of a fixed number of
rows. Where a shard ends therefore depends on nothing but text, model and config, and so do its bytes. After each shard,
``progress.json`` records the batch in which it ended: a resumed harvest runs that batch again in the same composition
(the last bits of a matrix product depend on it), drops the rows that are already in shards, and ends with the same
bytes as a harvest that was never interrupted. Nothing in the folder holds a time or a date. ``manifest.json`` is
written last.

The main thread runs the model; tokenising runs ahead of it (in ``TokenRows``) and shards are written behind it.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from saelab.activations.collect import Collector, ReadableModel, TextRows, is_padded
from saelab.activations.shards import ShardInfo
from saelab.activations.store import KIND, ActivationStore, HarvestReport, open_store
from saelab.activations.writer import ShardWriter
from saelab.core.artifacts import MANIFEST, prepare_output, read_json, require_disk, write_json, write_manifest
from saelab.core.config import Config
from saelab.core.errors import CorruptError, ResumeError, SiteError, TextError
from saelab.core.progress import Bar, progress

PROGRESS = "progress.json"


class HarvestConfig(Config):
    """How activations are harvested."""

    max_tokens: int = Field(default=1_000_000, gt=0)
    """Stop after this many kept tokens (or at the end of the text)."""
    rows_per_batch: int = Field(default=16, gt=0)
    """Text rows in one forward pass."""
    dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    """Dtype on disk; "model" keeps the model's activations bit for bit."""
    shard_bytes: int = Field(default=32 << 20, gt=0)
    """Size of one shard file; memory use is about twice that."""
    outlier_norm: float | None = Field(default=None, gt=1)
    """Leave out tokens whose norm at any site exceeds this many times the running median norm."""
    gradients: bool = False
    """Also keep the gradient of the summed next-token loss at each site (float32; needs a backward pass)."""
    execution: tuple[str, ...] = ()
    """Layers of a sparsified model that run on sparse kernels; ``sparse: auto`` fills it in, a resumed harvest reads
    it back (the last bits of an activation depend on the arithmetic)."""


def harvest(
    model: ReadableModel,
    rows: TextRows,
    sites: Sequence[str],
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    on_estimate: Callable[[int], None] | None = None,
    lossy: Mapping[str, Any] | None = None,
) -> ActivationStore:
    """Harvest the activations of ``model`` at ``sites`` over ``rows`` into the folder ``out``.

    ``resume`` goes on with an interrupted harvest (or starts one when there is none; a finished one is opened),
    ``force`` replaces an existing folder. ``on_estimate`` is told the bytes it may take before anything is written.
    ``lossy`` says what an inexact way of running the model costs; the manifest keeps it, so that nobody takes the
    store for the model's own activations. The returned store has a ``report``.

    Raises ``SiteError``, ``TextError`` (no token to keep), ``ActivationError`` (NaN), ``OutputExistsError``,
    ``OutputError`` (would not fit, full disk, not writable), ``ResumeError`` (other settings than the interrupted run).
    """
    config = config or HarvestConfig()
    names = list(dict.fromkeys(sites))
    if not names:
        raise SiteError("no site to harvest; give at least one, such as blocks.0.hook_resid_post")
    job = _Job(model, rows, names, Path(out), config, lossy)
    estimate = estimate_bytes(model, names, config)
    if on_estimate is not None:
        on_estimate(estimate)
    require_disk(out, estimate - (_used(Path(out)) if resume or force else 0), "the harvest")
    folder = prepare_output(out, force=force, resume=resume)
    if resume and (folder / MANIFEST).is_file():
        return job.finished()
    job.load()
    return job.run()


def estimate_bytes(model: ReadableModel, sites: Sequence[str], config: HarvestConfig) -> int:
    """Disk space that a harvest of ``config.max_tokens`` tokens takes (an upper bound: the text may end earlier)."""
    row_bytes = _row_bytes(_collector(model, sites, config))
    shards = -(-config.max_tokens // _rows_per_shard(row_bytes, config))
    return config.max_tokens * row_bytes + shards * (1024 + 512 * len(sites)) + (64 << 10)


class _Job:
    """One harvest: what identifies it, where it stands, and how it goes on."""

    def __init__(  # noqa: PLR0917
        self,
        model: ReadableModel,
        rows: TextRows,
        sites: list[str],
        folder: Path,
        config: HarvestConfig,
        lossy: Mapping[str, Any] | None,
    ) -> None:
        self._rows, self._folder, self._config = rows, folder, config
        self._collector = _collector(model, sites, config, is_padded(rows))
        self._rows_per_shard = _rows_per_shard(_row_bytes(self._collector), config)
        self._identity: dict[str, Any] = {
            "model": {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "text": rows.describe(),
            "config": config.model_dump(mode="json"),
            "dtype": str(_dtype(model, config)).removeprefix("torch."),
            "gradients": config.gradients,
            "sites": {site: {"width": model.width(site)} for site in sites},
            "rows_per_shard": self._rows_per_shard,
            **({} if lossy is None else {"lossy": dict(lossy)}),
        }
        self.shards: list[ShardInfo] = []
        self._cursor: dict[str, Any] = {"start_row": 0, "skip": 0, **self._collector.state()}

    def load(self) -> None:
        """Take up an interrupted harvest, if there is one; sweep away what a killed process left half-written."""
        for pattern in (".*.tmp", ".probe.*"):
            for path in self._folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not (self._folder / PROGRESS).is_file():
            if any(self._folder.iterdir()):
                raise ResumeError(
                    f"{self._folder} holds no interrupted harvest (no {PROGRESS}); choose another --out or add --force"
                )
            write_json(self._folder / PROGRESS, {**self._identity, "shards": [], "cursor": self._cursor})
            return
        data = read_json(self._folder / PROGRESS)
        self._require_same(data)
        self.shards = [ShardInfo.from_dict(shard) for shard in data["shards"]]
        self._cursor = data["cursor"]
        for shard in self.shards:
            path = self._folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise CorruptError(f"shard {path} of the interrupted harvest is missing or truncated; use --force")

    def finished(self) -> ActivationStore:
        """Open the finished harvest found in place of an interrupted one."""
        store = open_store(self._folder)
        self._require_same(store.manifest)
        (self._folder / PROGRESS).unlink(missing_ok=True)
        store.report = HarvestReport(0, 0.0, store.n_rows, sum(int(s["bytes"]) for s in store.manifest["shards"]))
        return store

    def run(self) -> ActivationStore:
        """Collect to the end and write the manifest."""
        began = time.perf_counter()
        there = sum(shard.rows for shard in self.shards)
        tensors = self._collector.tensors()
        with (
            progress("harvest", self._config.max_tokens, "tokens", done=there) as bar,
            ShardWriter(
                self._folder, tensors, self._rows_per_shard, written=self.shards, on_shard=self._save_progress
            ) as writer,
        ):
            total, text_rows = self._collect(writer, there, bar)
            self.shards = writer.shards
        if total == 0:
            (self._folder / PROGRESS).unlink(missing_ok=True)
            raise TextError("the text has no token to keep; give more text, or check the tokenizer's special tokens")
        self._write_manifest(total, text_rows)
        store = open_store(self._folder)
        size = sum(shard.bytes for shard in self.shards)
        store.report = HarvestReport(total - there, time.perf_counter() - began, there, size)
        return store

    def _collect(self, writer: ShardWriter, total: int, bar: Bar) -> tuple[int, int]:
        """Feed the writer until ``max_tokens`` or the end of the text; return kept tokens and text rows read."""
        cursor = self._cursor
        self._collector.load_state(cursor)
        text_row, skip = int(cursor["start_row"]), int(cursor["skip"])
        for batch in self._rows.batches(self._config.rows_per_batch, start_row=text_row):
            cursor = {"start_row": text_row, **self._collector.state()}
            numbers = torch.arange(text_row, text_row + batch.tokens.shape[0])
            columns = self._collector.collect(batch, numbers)
            end = min(columns["row"].shape[0], skip + self._config.max_tokens - total)
            writer.add(columns, skip, end, cursor)
            total += end - skip
            bar.advance(end - skip)
            text_row += batch.tokens.shape[0]
            cursor, skip = {**cursor, "skip": end}, 0
            if total >= self._config.max_tokens:
                break
        writer.finish(cursor)
        return total, text_row

    def _save_progress(self, shards: list[ShardInfo], cursor: dict[str, Any]) -> None:
        data = {**self._identity, "shards": [shard.to_dict() for shard in shards], "cursor": cursor}
        write_json(self._folder / PROGRESS, data)

    def _write_manifest(self, n_rows: int, text_rows: int) -> None:
        sums = "".join(value for shard in self.shards for value in shard.checksums.values())
        data = {
            **self._identity,
            "n_rows": n_rows,
            "text_rows": text_rows,
            "excluded": self._collector.excluded,
            "median_norms": self._collector.medians,
            "content": f"crc32:{zlib.crc32(sums.encode()):08x}",
            "shards": [shard.to_dict() for shard in self.shards],
        }
        write_manifest(self._folder, KIND, data)
        (self._folder / PROGRESS).unlink(missing_ok=True)

    def _require_same(self, data: dict[str, Any]) -> None:
        for key, value in self._identity.items():
            if data.get(key) != value:
                raise ResumeError(
                    f"{self._folder} was harvested with another {key} ({_difference(data.get(key), value)}); resume "
                    "with the same settings, or add --force to start again"
                )


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"then {old}, now {new}"


def _dtype(model: ReadableModel, config: HarvestConfig) -> torch.dtype:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return named.get(config.dtype, model.dtype)


def _collector(model: ReadableModel, sites: Sequence[str], config: HarvestConfig, padded: bool = False) -> Collector:
    return Collector(
        model,
        sites,
        dtype=_dtype(model, config),
        outlier_norm=config.outlier_norm,
        gradients=config.gradients,
        padded=padded,
    )


def _row_bytes(collector: Collector) -> int:
    return sum(dtype.itemsize * (shape[0] if shape else 1) for shape, dtype in collector.tensors().values())


def _rows_per_shard(row_bytes: int, config: HarvestConfig) -> int:
    return max(1, config.shard_bytes // row_bytes)
