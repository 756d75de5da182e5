import multiprocessing
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab.activations import harvest as harvest_module
from saelab.activations import shards as shards_module
from saelab.activations.harvest import HarvestConfig, estimate_bytes, harvest
from saelab.activations.store import open_store
from saelab.core import artifacts
from saelab.core.errors import (
    ActivationError,
    CorruptError,
    OutputError,
    OutputExistsError,
    ResumeError,
    SiteError,
    TextError,
)
from saelab.core.progress import set_progress
from tests.activations.fakes import FakeBatch, FakeModel, FakeRows

CONFIG = HarvestConfig(max_tokens=5000, rows_per_batch=7, shard_bytes=20_000, outlier_norm=1.4, gradients=True)
KILLS = int(os.environ.get("SAELAB_KILLS", "3"))
"""How many times kill -9 is tried; each time at four random points."""


def contents(folder: Path) -> dict[str, int]:
    return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(folder.iterdir())}


def run(out: Path, delay: float = 0.0, resume: bool = False) -> None:
    set_progress(False)
    torch.set_num_threads(1)
    harvest(FakeModel(), FakeRows(400, 20, delay=delay), ["a", "b"], out, CONFIG, resume=resume)


# --- what is in a store ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_dtype_is_kept_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, rows = FakeModel(dtype), FakeRows(10, 8)
    store = harvest(model, rows, ["a"], tmp_path / "s", HarvestConfig(rows_per_batch=10))
    (batch,) = rows.batches(10)
    expected = model.read(batch.tokens, ["a"])["a"][batch.keep]
    found = store.read_rows("a", torch.arange(store.n_rows))
    assert store.dtype == found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    config = HarvestConfig(dtype="float16", rows_per_batch=10)
    store = harvest(FakeModel(), FakeRows(10, 8), ["a"], tmp_path / "s", config)
    assert store.read_rows("a", torch.tensor([0])).dtype == torch.float16


def test_max_tokens_and_end_of_text(tmp_path: Path) -> None:
    for max_tokens, expected in [(1, 1), (37, 37), (70, 70), (71, 70), (10**6, 70)]:
        config = HarvestConfig(max_tokens=max_tokens, rows_per_batch=3, shard_bytes=300)
        store = harvest(FakeModel(), FakeRows(10, 8), ["a"], tmp_path / str(max_tokens), config)
        assert store.n_rows == expected
        assert store.report is not None
        assert store.report.tokens == expected
    assert store.manifest["text_rows"] == 10


def test_excluded_positions_are_counted_by_reason(tmp_path: Path) -> None:
    rows = FakeRows(6, 10, packing="documents")
    rows.keep[:, 7:] = False  # padding
    rows.keep[2, 4] = False  # a special token
    store = harvest(FakeModel(), rows, ["a"], tmp_path / "s", HarvestConfig(gradients=True))
    assert store.manifest["excluded"] == {"bos": 6, "padding": 18, "special": 1, "last": 6}
    assert store.n_rows == 60 - 31
    assert 6 not in store.read_rows("position", torch.arange(store.n_rows))  # the last kept position has no loss


def test_outlier_norms_are_left_out_at_every_site(tmp_path: Path) -> None:
    model, rows = FakeModel(), FakeRows(40, 10)
    model.tables["b"][17] *= 50  # token 17 is an outlier at site b only
    assert (rows.tokens == 17).any()
    store = harvest(model, rows, ["a", "b"], tmp_path / "s", HarvestConfig(outlier_norm=8.0))
    assert store.manifest["excluded"]["outlier_norm"] == int((rows.tokens == 17).sum())
    assert 17 not in store.read_rows("token_id", torch.arange(store.n_rows))
    assert set(store.manifest["median_norms"]) == {"a", "b"}


def test_gradients_are_kept_in_float32_beside_their_rows(tmp_path: Path) -> None:
    store = harvest(FakeModel(torch.bfloat16), FakeRows(9, 7), ["b"], tmp_path / "s", HarvestConfig(gradients=True))
    rows = torch.arange(store.n_rows)
    assert store.has_gradients
    assert store.read_rows("b.grad", rows).dtype == torch.float32
    assert torch.equal(store.read_rows("b.grad", rows), store.read_rows("b", rows).float() * 2)


# --- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_site_and_text_rows(tmp_path: Path, value: float) -> None:
    rows = FakeRows(30, 10)
    rows.tokens[rows.tokens == 23] = 24
    rows.tokens[11, 4] = rows.tokens[11, 6] = rows.tokens[27, 2] = 23

    class Broken(FakeModel):
        def __init__(self) -> None:
            super().__init__()
            self.tables["b"][23, 3] = value

    with pytest.raises(ActivationError, match=r"at b hold NaN or infinity in text rows 11, 27 \(first at row 11, pos"):
        harvest(Broken(), rows, ["a", "b"], tmp_path / "s", HarvestConfig(rows_per_batch=30))
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_large_finite_values_are_not_taken_for_infinity(tmp_path: Path) -> None:
    model = FakeModel()
    model.tables["a"] *= 1e37  # their sum overflows
    assert harvest(model, FakeRows(300, 20), ["a"], tmp_path / "s").n_rows == 300 * 19


def test_nothing_to_keep_and_no_or_unknown_site(tmp_path: Path) -> None:
    rows = FakeRows(3, 4)
    rows.keep[:] = False
    with pytest.raises(TextError, match="no token to keep"):
        harvest(FakeModel(), rows, ["a"], tmp_path / "s")
    assert not any((tmp_path / "s").iterdir())
    with pytest.raises(SiteError, match="no site"):
        harvest(FakeModel(), rows, [], tmp_path / "t")
    with pytest.raises(SiteError, match="no site 'nowhere'"):
        harvest(FakeModel(), rows, ["nowhere"], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    run(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(OutputExistsError, match="--force"):
        run(tmp_path / "s")
    assert contents(tmp_path / "s") == before
    config = HarvestConfig(max_tokens=10)
    assert harvest(FakeModel(), FakeRows(5, 8), ["a"], tmp_path / "s", config, force=True).n_rows == 10
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_what_would_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    told: list[int] = []
    config = HarvestConfig(max_tokens=10**15)
    with pytest.raises(OutputError, match=r"the harvest needs .* TiB but only .* are free"):
        harvest(FakeModel(), FakeRows(5, 8), ["a"], tmp_path / "s", config, on_estimate=told.append)
    assert told == [estimate_bytes(FakeModel(), ["a"], config)]
    assert told[0] > 10**15 * 16
    assert not (tmp_path / "s").exists()


def test_the_estimate_is_a_tight_upper_bound(tmp_path: Path) -> None:
    config = HarvestConfig(max_tokens=7000, shard_bytes=100_000)
    told: list[int] = []
    store = harvest(FakeModel(), FakeRows(400, 20), ["a", "b"], tmp_path / "s", config, on_estimate=told.append)
    used = sum(path.stat().st_size for path in store.path.iterdir())
    assert used <= told[0] <= used * 1.01 + (80 << 10)


def test_a_disk_that_fills_up_is_one_line_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    real, calls = artifacts.os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", full)
        with pytest.raises(OutputError, match="no space left on the disk while writing"):
            run(tmp_path / "s")
    run(tmp_path / "s", resume=True)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        run(tmp_path / "s")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("x")
    with pytest.raises(OutputExistsError, match="is a file"):
        run(tmp_path / "s")


# --- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every file of a harvest that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    run(folder)
    assert len(list(folder.iterdir())) > 20
    return contents(folder)


def test_the_same_harvest_twice_is_byte_identical(tmp_path: Path, whole: dict[str, int]) -> None:
    run(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


class Stop(Exception):
    pass


class StoppingRows(FakeRows):
    """Stops like Ctrl-C after some batches."""

    def __init__(self, batches: int, error: BaseException) -> None:
        super().__init__(400, 20)
        self.left, self.error = batches, error

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[FakeBatch]:
        for batch in super().batches(rows_per_batch, start_row):
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


@pytest.mark.parametrize("batches", [0, 1, 2, 7, 18])
def test_resume_after_an_interrupt_is_byte_identical(tmp_path: Path, whole: dict[str, int], batches: int) -> None:
    for _ in range(2):
        rows = StoppingRows(batches, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(FakeModel(), rows, ["a", "b"], tmp_path / "s", CONFIG, resume=True)
        assert not (tmp_path / "s" / "manifest.json").exists()
    run(tmp_path / "s", resume=True)
    assert contents(tmp_path / "s") == whole


def test_resume_does_not_repeat_what_is_on_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(FakeModel(), StoppingRows(30, KeyboardInterrupt()), ["a", "b"], tmp_path / "s", CONFIG)
    store = harvest(FakeModel(), FakeRows(400, 20), ["a", "b"], tmp_path / "s", CONFIG, resume=True)
    assert store.report is not None
    assert store.report.resumed_from > 2000
    assert store.report.tokens == store.n_rows - store.report.resumed_from


def killed_harvest(context: multiprocessing.context.BaseContext, out: Path, after: float) -> bool:
    """Run a harvest in another process and kill -9 it ``after`` seconds from its first file on; say if it was alive."""
    child = context.Process(target=run, args=(out, 0.02, True))  # type: ignore[attr-defined]
    child.start()
    deadline = time.monotonic() + 60
    while not out.is_dir() and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.join(after)
    alive = child.exitcode is None
    if alive:
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return alive


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("seed", range(KILLS))
def test_kill_9_at_random_points_then_resume_is_byte_identical(
    tmp_path: Path, whole: dict[str, int], seed: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saelab.activations.harvest", "tests.activations.fakes"])
    generator = torch.Generator().manual_seed(seed)
    kills = 0
    for _ in range(4):
        after = float(torch.rand(1, generator=generator)) * 0.12
        kills += killed_harvest(context, tmp_path / "s", after)
    assert kills >= 3, "the harvest was over before it could be killed"
    run(tmp_path / "s", resume=True)
    assert contents(tmp_path / "s") == whole


def test_half_written_files_of_a_killed_process_are_swept_away(tmp_path: Path, whole: dict[str, int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(FakeModel(), StoppingRows(9, KeyboardInterrupt()), ["a", "b"], tmp_path / "s", CONFIG)
    for name in (".shard-00099.safetensors.123.tmp", ".progress.json.7.tmp", ".probe.55"):
        (tmp_path / "s" / name).write_bytes(b"half")
    run(tmp_path / "s", resume=True)
    assert contents(tmp_path / "s") == whole


def test_killed_between_manifest_and_end(tmp_path: Path, whole: dict[str, int]) -> None:
    run(tmp_path / "s")
    (tmp_path / "s" / "progress.json").write_text("{}")
    run(tmp_path / "s", resume=True)
    assert contents(tmp_path / "s") == whole
    store = harvest(FakeModel(), FakeRows(400, 20), ["a", "b"], tmp_path / "s", CONFIG, resume=True)
    assert store.report is not None
    assert (store.report.tokens, store.report.resumed_from) == (0, store.n_rows)


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(FakeModel(), StoppingRows(9, KeyboardInterrupt()), ["a", "b"], tmp_path / "s", CONFIG)
    run(tmp_path / "done")
    other = CONFIG.model_copy(update={"outlier_norm": 2.0})
    for folder in (tmp_path / "s", tmp_path / "done"):
        with pytest.raises(ResumeError, match=r"another config \(outlier_norm: then 1\.4, now 2\.0\)"):
            harvest(FakeModel(), FakeRows(400, 20), ["a", "b"], folder, other, resume=True)
        with pytest.raises(ResumeError, match="another text"):
            harvest(FakeModel(), FakeRows(400, 20, seed=1), ["a", "b"], folder, CONFIG, resume=True)
        with pytest.raises(ResumeError, match="another model"):
            harvest(FakeModel(fingerprint="x"), FakeRows(400, 20), ["a", "b"], folder, CONFIG, resume=True)
        with pytest.raises(ResumeError, match="another sites"):
            harvest(FakeModel(), FakeRows(400, 20), ["a"], folder, CONFIG, resume=True)


def test_resume_in_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="no interrupted harvest"):
        run(tmp_path, resume=True)
    assert contents(tmp_path) == {"notes.txt": zlib.crc32(b"mine")}


def test_resume_notices_a_damaged_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(FakeModel(), StoppingRows(20, KeyboardInterrupt()), ["a", "b"], tmp_path / "s", CONFIG)
    shard = tmp_path / "s" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="shard-00001"):
        run(tmp_path / "s", resume=True)


def test_an_error_of_the_writing_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise Stop

    monkeypatch.setattr("saelab.activations.writer.write_shard", broken)
    with pytest.raises(Stop):
        run(tmp_path / "s")
    assert harvest_module.PROGRESS in contents(tmp_path / "s")
    assert shards_module.HEADER not in contents(tmp_path / "s")


def test_a_finished_store_opens(tmp_path: Path) -> None:
    run(tmp_path / "s")
    open_store(tmp_path / "s").verify()
