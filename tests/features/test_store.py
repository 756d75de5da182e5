import shutil

import numpy as np
import pytest
import torch

from saelab.core.errors import ConfigError, CorruptError, FormatError, MissingFileError, StoreError
from saelab.features.build import build_features
from saelab.features.store import open_features
from tests.features.fakes import SITE, FakeModel, Oracle, identity, random_rows


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "f"
    build_features(FakeModel(), identity(), random_rows(30), SITE, path)
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "f")


def test_opens_and_describes_itself(path):
    store = open_features(str(path))
    assert (store.n_features, store.n_tokens, store.n_kept, store.n_rows) == (12, 270, 240, 30)
    assert "12 features of fake at" in repr(store)
    assert "\n" not in repr(store)
    store.verify()


def test_released_parts_are_read_again(path):
    store = open_features(path)
    tokens, values = store.feature(3)
    before = tokens.tolist(), values.tolist(), store.column("max").tolist()
    store.release()
    assert (tokens.tolist(), values.tolist(), store.column("max").tolist()) == before


@pytest.mark.parametrize("name", ["by_feature/values.npy", "tokens/ids.npy", "summary/max.npy", "vocabulary/bytes.npy"])
def test_a_truncated_or_missing_file_is_named(path, name):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-3])
    with pytest.raises(CorruptError, match=f"{name} has {len(data) - 3} bytes instead of {len(data)}"):
        open_features(path)
    (path / name).unlink()
    with pytest.raises(CorruptError, match=f"{name} is missing"):
        open_features(path)


def test_every_flipped_bit_is_found_and_named(path):
    store = open_features(path)
    generator = np.random.default_rng(0)
    for name in store.manifest["files"]:
        data = bytearray((path / name).read_bytes())
        at = int(generator.integers(len(data)))
        data[at] ^= 4
        (path / name).write_bytes(data)
        with pytest.raises(CorruptError, match=name):
            store.verify()
        data[at] ^= 4
        (path / name).write_bytes(data)
    store.verify()


def test_other_folders_are_refused(tmp_path, path):
    with pytest.raises(MissingFileError):
        open_features(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="feature-store"):
        open_features(tmp_path / "empty")
    (path / "manifest.json").write_text('{"kind": "sae"}')
    with pytest.raises(FormatError, match="expected feature-store"):
        open_features(path)
    (path / "manifest.json").write_text('{"kind": "feature-store"')
    with pytest.raises(CorruptError):
        open_features(path)
    (path / "manifest.json").write_text('{"kind": "feature-store"}')
    with pytest.raises(CorruptError, match="lists no files"):
        open_features(path)


def test_a_broken_array_header_is_named(path):
    store = open_features(path)
    data = bytearray((path / "summary" / "max.npy").read_bytes())
    data[:6] = b"BROKEN"
    (path / "summary" / "max.npy").write_bytes(data)
    with pytest.raises(CorruptError, match=r"summary/max\.npy"):
        store.column("max")


def test_nothing_is_read_before_it_is_asked_for(path):
    store = open_features(path)
    assert store._arrays == {}
    store.top_contexts(0)
    assert not any(name.startswith("summary/") for name in store._arrays)
    assert all(isinstance(array.base, np.memmap) for array in store._arrays.values())
    assert not store.feature(0)[1].flags.owndata


def test_arrays_cannot_be_written(path):
    with pytest.raises(ValueError, match="read-only"):
        open_features(path).feature(0)[1][0] = 1


def test_slices_of_the_code(path):
    store = open_features(path)
    whole = store.activations(0, 270).to_dense()
    part = store.activations(100, 133)
    assert part.n_tokens == 33
    assert torch.equal(part.to_dense(), whole[100:133])
    assert store.activations(5, 5).n_tokens == 0
    with pytest.raises(StoreError):
        store.activations(0, 271)
    with pytest.raises(StoreError):
        store.row_of(270)


def test_summary_frame(path):
    store = open_features(path)
    frame = store.summary()
    assert frame.index.name == "feature"
    assert len(frame) == 12
    assert {"count", "density", "dead", "max", "mean", "q50", "top_token_text", "nearest", "decoder_norm"} <= set(frame)
    assert frame["nearest_cosine"].max() <= 1
    wide = store.summary(["density", "logit_top_ids", "logit_bottom"])
    assert list(wide) == ["density", "logit_top_tokens", "logit_bottom"]
    assert len(wide["logit_top_tokens"][0]) == 10
    with pytest.raises(ConfigError, match="did you mean density"):
        store.column("densty")


def test_more_features_than_16_bits(tmp_path):
    d_sae = (1 << 16) + 5
    sae = Oracle(torch.zeros(6, d_sae), torch.ones(d_sae, 6), b_enc=-torch.ones(d_sae))
    sae.b_enc[[0, 1 << 16, d_sae - 1]] = 2.0
    store = build_features(FakeModel(), sae, random_rows(), SITE, tmp_path / "f", nearest=False)
    assert np.flatnonzero(store.column("count")).tolist() == [0, 1 << 16, d_sae - 1]
    assert store.array("by_token/indices.npy").dtype == np.uint32
    assert len(store.top_contexts(1 << 16)) == 7
    assert "nearest" not in store.columns
