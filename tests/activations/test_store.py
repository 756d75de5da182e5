from pathlib import Path

import pytest
import torch

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.activations.store import ActivationStore, open_store
from saelab.core.artifacts import write_json
from saelab.core.errors import CorruptError, FormatError, MissingFileError, SiteError, StoreError
from tests.activations.fakes import FakeModel, FakeRows


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    config = HarvestConfig(shard_bytes=4000, rows_per_batch=4)
    return harvest(FakeModel(), FakeRows(30, 20), ["a", "b"], tmp_path / "store", config)


def test_what_it_says_about_itself(store: ActivationStore) -> None:
    again = open_store(store.path)
    assert again.n_rows == 30 * 19
    assert again.sites == ["a", "b"]
    assert (again.d_in("a"), again.d_in("b")) == (4, 6)
    assert again.dtype == torch.float32
    assert not again.has_gradients
    assert again.manifest["kind"] == "activation-store"
    assert again.fingerprint == store.fingerprint
    assert again.report is None
    assert len(again.manifest["shards"]) > 5
    again.verify()


def test_read_rows_in_any_order_across_shards(store: ActivationStore) -> None:
    everything = torch.arange(store.n_rows)
    rows = torch.randint(0, store.n_rows, (300,), generator=torch.Generator().manual_seed(1))
    for name in ("a", "b", "token_id", "row", "position"):
        assert torch.equal(store.read_rows(name, rows), store.read_rows(name, everything)[rows])
    assert store.read_rows("a", rows[:0]).shape == (0, 4)


def test_rows_are_in_text_order_and_share_it(store: ActivationStore) -> None:
    rows, model = FakeRows(30, 20), FakeModel()
    every = torch.arange(store.n_rows)
    row, position = store.read_rows("row", every), store.read_rows("position", every).long()
    assert torch.equal(row * 20 + position, rows.keep.flatten().nonzero()[:, 0])
    assert torch.equal(store.read_rows("token_id", every).long(), rows.tokens[row, position])
    for number, batch in enumerate(rows.batches(4)):
        here = (row >= 4 * number) & (row < 4 * number + 4)
        for site, value in model.read(batch.tokens, ["a", "b"]).items():
            assert torch.equal(store.read_rows(site, every[here]), value[batch.keep])


def test_bad_questions_are_one_line_errors(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"does not hold site 'blocks\.0' .*it holds a, b"):
        store.d_in("blocks.0")
    with pytest.raises(SiteError):
        store.stream("c", 8)
    with pytest.raises(SiteError):
        store.stream("a", 8, target_site="c")
    with pytest.raises(StoreError, match="no gradients"):
        store.stream("a", 8, gradient=True)
    with pytest.raises(StoreError, match="no gradients"):
        store.read_rows("a.grad", torch.tensor([0]))
    for bad in (-1, store.n_rows):
        with pytest.raises(StoreError, match="rows 0 to 569"):
            store.read_rows("a", torch.tensor([0, bad]))
    with pytest.raises(MissingFileError):
        open_store(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="no manifest"):
        open_store(tmp_path)


def test_another_model_is_refused(store: ActivationStore) -> None:
    store.check_model(FakeModel())
    with pytest.raises(StoreError, match=r"harvested from fake \(crc32:00000000\), not from fake \(crc32:11111111\)"):
        store.check_model(FakeModel(fingerprint="crc32:11111111"))


def test_verify_and_reading_name_every_damaged_shard(store: ActivationStore) -> None:
    shards = [store.path / shard["file"] for shard in store.manifest["shards"]]
    flipped = bytearray(shards[2].read_bytes())
    flipped[len(flipped) // 2] ^= 16
    shards[2].write_bytes(flipped)
    shards[4].write_bytes(shards[4].read_bytes()[:-7])
    with pytest.raises(CorruptError, match=r"shard-00002\.safetensors is corrupt.*1 more: shard-00004\.safetensors"):
        open_store(store.path).verify()
    fresh = open_store(store.path)
    per_shard = store.manifest["rows_per_shard"]
    assert fresh.read_rows("row", torch.arange(per_shard)).shape == (per_shard,)
    with pytest.raises(CorruptError, match="shard-00004"):
        fresh.read_rows("row", torch.tensor([4 * per_shard]))
    with pytest.raises(CorruptError, match="shard-0000"):
        for _ in open_store(store.path).stream("b", 64, epochs=1):
            pass


def test_a_garbled_manifest_is_found(store: ActivationStore) -> None:
    manifest = dict(store.manifest)
    del manifest["rows_per_shard"]
    write_json(store.path / "manifest.json", manifest)
    with pytest.raises(CorruptError, match="rows_per_shard"):
        open_store(store.path)
    write_json(store.path / "manifest.json", {**store.manifest, "n_rows": 3})
    with pytest.raises(CorruptError, match="do not add up to 3"):
        open_store(store.path)
    (store.path / "manifest.json").write_text('{"kind":')
    with pytest.raises(CorruptError, match="not valid JSON"):
        open_store(store.path)
