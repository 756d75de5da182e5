import filecmp
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.code import SparseCode
from saelab.core.errors import (
    ActivationError,
    ConfigError,
    FormatError,
    OutputExistsError,
    SiteError,
    TextError,
)
from saelab.features import transpose
from saelab.features.build import build_features
from saelab.features.encode import encoder
from saelab.features.rows import Piece
from saelab.features.store import open_features
from saelab.features.transpose import BYTES_PER_ENTRY, Transposer, bucket_bounds
from tests.features.fakes import SITE, FakeModel, FakeRows, Oracle, constant, identity, random_rows


def random_dictionary(d_sae=40, seed=0, bias=-2.0):
    generator = torch.Generator().manual_seed(seed)
    return Oracle(
        torch.randn(6, d_sae, generator=generator),
        torch.randn(d_sae, 6, generator=generator),
        b_enc=torch.full((d_sae,), bias),
    )


class Planted:
    """Feature 0 never fires, feature 1 fires on token 7 with value 1 + number of times it fired before, feature 2
    always fires with value 0.5, feature 3 fires on even tokens with value token / 4."""

    d_in, d_sae = 6, 4
    W_enc, W_dec = torch.eye(4, 6).T, torch.eye(4, 6)

    def __init__(self, model):
        self.embed, self.fired = model.embed, 0

    def encode(self, x):
        tokens = torch.cdist(x, self.embed).argmin(1)
        dense = torch.zeros(len(x), 4)
        hit = tokens == 7
        dense[hit, 1] = 1.0 + self.fired + torch.arange(int(hit.sum()))
        self.fired += int(hit.sum())
        dense[:, 2] = 0.5
        dense[:, 3] = torch.where(tokens % 2 == 0, tokens / 4, 0.0)
        return SparseCode.from_dense(dense)

    def decode(self, code):
        return code.to_dense() @ self.W_dec


def test_planted_feature_is_found(tmp_path):
    model, rows = FakeModel(), random_rows(n_rows=30, length=20)
    store = build_features(model, Planted(model), rows, SITE, tmp_path / "f", rows_per_batch=4)
    flat = rows.tokens.flatten()
    where = (flat == 7).nonzero().flatten()
    n = len(where)
    assert n > 30
    tokens, values = store.feature(1)
    assert tokens.tolist() == where.tolist()
    assert values.tolist() == list(range(1, n + 1))
    summary = store.summary()
    assert summary["count"].tolist() == [0, n, 570, int(((flat % 2 == 0) & (flat > 0)).sum())]
    assert summary["density"][1] == n / 570
    assert summary["dead"].tolist() == [True, False, False, False]
    assert summary["max"].tolist()[:3] == [0, n, 0.5]
    assert summary["mean"][1] == (n + 1) / 2
    assert summary["q50"][1] == (n - 1) // 2 + 1
    assert summary["q90"][1] == int(0.9 * (n - 1)) + 1
    assert summary["top_token"].tolist()[:2] == [-1, 7]
    assert summary["top_token_text"].tolist()[:2] == ["", "<7>"]
    assert summary["top_token_share"].tolist()[:2] == [0, 1]
    assert summary["distinct_tokens"].tolist()[:2] == [0, 1]
    assert summary["token_entropy"].tolist()[:2] == [0, 0]
    counts = torch.bincount(flat[flat > 0]).double()
    share = counts[counts > 0] / counts.sum()
    assert summary["token_entropy"][2] == pytest.approx(float(-(share * share.log()).sum()), rel=1e-6)
    assert summary["rows"][2] == 30
    assert summary["rows"][1] == int((rows.tokens == 7).any(1).sum())
    top = store.top_contexts(1, n=5, distinct_rows=False)
    assert [context.value for context in top] == [n, n - 1, n - 2, n - 3, n - 4]
    assert all(context.tokens[context.peak] == "<7>" for context in top)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(2, 9),
    st.integers(1, 30),
    st.floats(-4, 1),
    st.integers(1, 7),
)
@settings(max_examples=15, deadline=None)
def test_by_token_and_by_feature_agree_with_dense(tmp_path_factory, seed, n_rows, length, d_sae, bias, batch):
    model, rows = FakeModel(), random_rows(n_rows, length, seed=seed)
    sae = random_dictionary(d_sae, seed, bias)
    store = build_features(
        model, sae, rows, SITE, tmp_path_factory.mktemp("f") / "f", rows_per_batch=batch, memory_bytes=1 << 12
    )
    code = sae.encode(model.embed[rows.tokens.flatten()]).to_dense()
    code[~rows.keep.flatten()] = 0
    got = store.activations(0, store.n_tokens).to_dense()
    torch.testing.assert_close(got, code, rtol=1e-5, atol=1e-6)
    assert torch.equal(got > 0, code > 0)
    for i in range(d_sae):
        tokens, values = store.feature(i)
        assert tokens.tolist() == got[:, i].nonzero().flatten().tolist()
        assert values.tolist() == got[tokens.astype(np.int64), i].tolist()
        assert store.column("count")[i] == len(tokens)
        assert store.column("max")[i] == (values.max() if len(values) else 0)
    store.verify()


def write_code(folder, dense, length, memory_bytes):
    """Write a given code matrix, all tokens kept, rows of ``length`` tokens."""
    folder.mkdir()
    n = len(dense)
    tokens = torch.arange(n).reshape(-1, length) % 13
    with encoder(folder, dense.shape[1]) as writer:
        writer.add(Piece(0, tokens, torch.ones_like(tokens, dtype=torch.bool)), SparseCode.from_dense(dense))
    return Transposer(folder, writer.totals, 13, memory_bytes).run()


@pytest.mark.parametrize("ties", [True, False])
def test_little_memory_gives_the_same_bits(tmp_path, ties):
    """Down to pieces of 7 entries; feature 0 fires always (a bucket of its own), feature 3 never."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(2000, 30, generator=generator)
    if ties:
        dense = (dense * 8).ceil() / 8
    dense *= torch.rand(2000, 30, generator=generator) < torch.linspace(0, 0.3, 30) ** 2
    dense[:, 0] = torch.rand(2000, generator=generator).clamp_min(1e-3)
    dense[:, 3] = 0
    whole = write_code(tmp_path / "whole", dense, 10, 1 << 30)
    for capacity in (7, 100, 1999):
        part = write_code(tmp_path / str(capacity), dense, 10, capacity * BYTES_PER_ENTRY)
        for name, column in whole.items():
            assert column.tobytes() == part[name].tobytes(), name
        names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.npy"))
        assert len(names) == 13
        assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / str(capacity), names, shallow=False)[0] == names
        assert not (tmp_path / str(capacity) / transpose.SCRATCH).exists()


@pytest.mark.parametrize("megabytes", [6, 24])
def test_memory_of_the_transposition_is_bounded(tmp_path, megabytes):
    """600,000 entries need 60 MB at once; feature 0 alone has 100,000 of them."""
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    blocks = torch.randint(0, 100, (n, 5), generator=generator) + 100 * torch.arange(5) + 1
    indices = torch.cat([torch.zeros(n, 1, dtype=torch.int64), blocks], 1)
    code = SparseCode.from_topk(indices, torch.rand(n, 6, generator=generator) + 0.1, 501)
    tokens = torch.arange(n).reshape(-1, 100) % 13
    with encoder(tmp_path, 501) as writer:
        writer.add(Piece(0, tokens, torch.ones_like(tokens, dtype=torch.bool)), code)
    transposer = Transposer(tmp_path, writer.totals, 13, megabytes << 20)
    tracemalloc.start()
    transposer.run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (megabytes + 5) << 20  # 5 MiB: the two-pass quantiles of a large feature, whatever its size
    assert peak > (megabytes << 20) / 3  # and the memory that is allowed is used


def test_summary_of_a_given_code_equals_numpy(tmp_path):
    generator = torch.Generator().manual_seed(5)
    dense = torch.rand(600, 9, generator=generator) * (torch.rand(600, 9, generator=generator) < 0.4)
    columns = write_code(tmp_path / "f", dense, 6, 4 * 1024)
    ids = np.arange(600) % 13
    for i in range(9):
        active = dense[:, i].numpy() > 0
        values = dense[:, i].numpy()[active]
        for q in (10, 25, 50, 75, 90):
            assert columns[f"q{q}"][i] == np.quantile(values, q / 100, method="lower")
        assert columns["rows"][i] == len(np.unique(np.flatnonzero(active) // 6))
        counts = np.bincount(ids[active])
        share = counts[counts > 0] / counts.sum()
        assert columns["token_entropy"][i] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)
        assert columns["top_token"][i] == counts.argmax()
        assert columns["top_token_share"][i] == pytest.approx(counts.max() / counts.sum())
        assert columns["distinct_tokens"][i] == (counts > 0).sum()


def test_bucket_bounds():
    count = np.array([0, 3, 2, 9, 0, 0, 5, 1])
    bounds = bucket_bounds(count, 5).tolist()
    assert bounds == [0, 3, 4, 7, 8]  # 3 + 2, the 9 alone, 0 + 0 + 5, and 1
    assert bucket_bounds(np.zeros(4, np.int64), 5).tolist() == [0, 4]


def test_folder_is_deterministic_whatever_the_memory(tmp_path):
    for name, memory in (("a", 1 << 30), ("b", 1 << 12)):
        build_features(
            FakeModel(), random_dictionary(), random_rows(40, 12), SITE, tmp_path / name, memory_bytes=memory
        )
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    assert Path("manifest.json") in files
    assert not any("progress" in str(f) for f in files)


def test_timings_are_returned_and_not_stored(tmp_path):
    store = build_features(FakeModel(), identity(), random_rows(), SITE, tmp_path / "f")
    assert store.timings["tokens_per_second"] == pytest.approx(56 / store.timings["seconds"])
    assert open_features(tmp_path / "f").timings == {}
    assert store.manifest["source"] == "fake-text"
    assert store.manifest["n_kept"] == 56
    assert store.n_tokens == 63


def test_padding_is_cut_and_special_tokens_stay(tmp_path):
    rows = FakeRows(torch.tensor([[0, 3, 0, 4, 0, 0], [0, 0, 0, 0, 0, 0], [0, 5, 6, 7, 8, 9]]))
    store = build_features(FakeModel(), identity(), rows, SITE, tmp_path / "f")
    assert store.tokens(0, store.n_tokens) == [f"<{i}>" for i in (0, 3, 0, 4, 0, 5, 6, 7, 8, 9)]
    assert store.row_of(3) == (0, 0, 4)
    assert store.row_of(4) == (2, 4, 10)
    assert store.activations(0, 10).l0().tolist() == [0, 6, 0, 6, 0, 6, 6, 6, 6, 6]
    assert store.n_rows == 3


def test_everything_dead(tmp_path):
    store = build_features(FakeModel(), constant(torch.zeros(6)), random_rows(), SITE, tmp_path / "f")
    assert store.column("dead").all()
    assert store.manifest["nnz"] == 0
    assert store.top_contexts(1) == []
    assert store.interval_samples(1) == []
    assert store.histogram(1).counts.sum() == 0
    assert len(store.co_active(1)) == 0
    assert len(store.feature(2)[0]) == 0
    assert store.activations(0, 63).nnz == 0
    assert len(store.summary()) == 3
    store.verify()


def test_max_tokens(tmp_path):
    store = build_features(FakeModel(), identity(), random_rows(20), SITE, tmp_path / "f", max_tokens=30)
    assert (store.n_rows, store.n_kept) == (4, 32)


def test_bad_input(tmp_path):
    model, rows, out = FakeModel(), random_rows(), tmp_path / "f"
    with pytest.raises(ActivationError, match="width 5"):
        build_features(model, identity(5), rows, SITE, out)
    with pytest.raises(SiteError):
        build_features(model, identity(), rows, "nowhere", out)
    with pytest.raises(ConfigError, match="memory_bytes"):
        build_features(model, identity(), rows, SITE, out, memory_bytes=1)
    assert not out.exists()
    with pytest.raises(TextError):
        build_features(model, identity(), FakeRows(torch.zeros(2, 3, dtype=torch.int64)), SITE, out)
    build_features(model, identity(), rows, SITE, out, force=True)
    with pytest.raises(OutputExistsError, match="--force"):
        build_features(model, identity(), rows, SITE, out)
    model.embed[3, 2] = float("inf")
    with pytest.raises(ActivationError, match="NaN or infinity"):
        build_features(model, identity(), rows, SITE, tmp_path / "g")
    broken = identity()
    broken.W_enc = broken.W_enc * float("nan")
    with pytest.raises(ActivationError, match="weights are broken"):
        build_features(FakeModel(), broken, rows, SITE, tmp_path / "h")


KILLED = """
import sys, torch
from saelab.features.build import build_features
from tests.features.fakes import FakeModel, identity, random_rows, SITE
from saelab.core.progress import set_progress
set_progress(False)
rows = random_rows(3000, 50)
class Slow(FakeModel):
    def read(self, tokens, sites):
        print("reading", flush=True)
        return super().read(tokens, sites)
build_features(Slow(), identity(), rows, SITE, sys.argv[1], rows_per_batch=1, memory_bytes=1 << 12)
"""


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_killed_build_leaves_no_store(tmp_path, wait):
    out = tmp_path / "f"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=root, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(wait)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert out.is_dir()
    with pytest.raises(FormatError, match="interrupted"):
        open_features(out)
    with pytest.raises(OutputExistsError, match="--force"):
        build_features(FakeModel(), identity(), random_rows(), SITE, out)
    again = build_features(FakeModel(), identity(), random_rows(), SITE, out, force=True)
    again.verify()
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *again.manifest["files"]}


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("saelab.features.arrays.os.fsync", full)
    from saelab.core.errors import OutputError

    with pytest.raises(OutputError, match="no space left on the disk while writing"):
        build_features(FakeModel(), identity(), random_rows(), SITE, tmp_path / "f")
    assert not (tmp_path / "f" / "manifest.json").exists()


def test_manifest_is_json_with_checksums(tmp_path):
    build_features(FakeModel(), random_dictionary(), random_rows(), SITE, tmp_path / "f")
    manifest = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert manifest["kind"] == "feature-store"
    on_disk = {p.relative_to(tmp_path / "f").as_posix() for p in (tmp_path / "f").rglob("*.npy")}
    assert set(manifest["files"]) == on_disk
    assert np.load(tmp_path / "f" / "by_token" / "values.npy").dtype == np.float32
