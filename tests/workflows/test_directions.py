"""Decoder directions read from the file: fingerprints, cosines, named directions, maps."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from saelab.core.errors import ConfigError, CorruptError
from saelab.features.build import dictionary_fingerprint
from saelab.features.store import open_features
from saelab.features.weights import unembedding
from saelab.sae import load_sae, save_sae
from saelab.sae.topk import TopKConfig, TopKSAE
from saelab.workflows import directions
from saelab.workflows.directions import (
    cosines,
    feature_direction,
    keep_map,
    load_map,
    map_file,
    token_direction,
    tsne_map,
    weights_fingerprint,
)
from saelab.workflows.live import open_live


def test_fingerprint_is_the_one_of_the_build(made, monkeypatch):
    sae = made / "train" / "sae"
    assert weights_fingerprint(sae) == dictionary_fingerprint(load_sae(sae))
    monkeypatch.setattr(directions, "PIECE_BYTES", 1000)
    assert weights_fingerprint(sae) == open_features(made / "features").manifest["sae_fingerprint"]


def test_cosines_in_pieces_are_those_of_the_matrix(made, monkeypatch):
    sae = made / "train" / "sae"
    rows = load_sae(sae).W_dec.double().numpy()
    vector = np.random.default_rng(0).normal(size=rows.shape[1])
    expected = rows @ vector / np.linalg.norm(rows, axis=1) / np.linalg.norm(vector)
    monkeypatch.setattr(directions, "PIECE_BYTES", 5000)
    np.testing.assert_allclose(cosines(sae, vector), expected, atol=1e-6)
    assert cosines(sae, feature_direction(sae, 9).vector)[9] == pytest.approx(1)
    with pytest.raises(ConfigError, match="feature 256 does not exist; the SAE has features 0 to 255"):
        feature_direction(sae, 256)
    with pytest.raises(ConfigError, match="the direction has 3 numbers"):
        cosines(sae, np.ones(3))


def test_token_directions(made):
    live = open_live(made / "train" / "sae")
    named = token_direction(live, " def", "unembedding")
    (token,) = live.model.tokenizer(" def", add_special_tokens=False)["input_ids"]
    assert np.array_equal(named.vector, unembedding(live.model, live.site, live.sae.d_in)[:, token].numpy())
    assert named.name == "cosine to “ def” (unembedding)"
    with pytest.raises(ConfigError, match="exactly one token"):
        token_direction(live, "several words here", "embedding")
    with pytest.raises(ConfigError, match="the text is 0"):
        token_direction(live, "", "embedding")


def test_truncated_weights_are_one_line(made, tmp_path):
    shutil.copytree(made / "train" / "sae", tmp_path / "sae")
    weights = tmp_path / "sae" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CorruptError, match="bytes instead of"):
        cosines(tmp_path / "sae", np.ones(3))


def test_tsne_keeps_planted_groups_together(tmp_path):
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:4]
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=80, k=2), seed=0)
    groups = np.arange(80) % 4
    sae.W_dec.data[:] = sae.W_dec.data.new_tensor(centres[groups] + 0.05 * rng.normal(size=(80, 16)))
    save_sae(sae, tmp_path / "sae")

    class Store:
        path, manifest, n_features = tmp_path / "features", {"sae_fingerprint": "0"}, 80

        def column(self, name):
            density = np.full(80, 0.1)
            density[7] = 0
            return density

    made = tsne_map(tmp_path / "sae", Store())
    assert made.features.tolist() == [i for i in range(80) if i != 7]
    distance = np.linalg.norm(made.points[:, None] - made.points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (groups[made.features][distance.argmin(1)] == groups[made.features]).all()
    assert load_map(Store()) is None
    assert keep_map(Store(), made)
    assert np.array_equal(load_map(Store()).points, made.points)
    map_file(Store()).write_bytes(map_file(Store()).read_bytes()[:100])
    assert load_map(Store()) is None


def test_browsing_does_not_import_torch(made):
    """What is read for a page without the live model stays small: torch alone would be 200 MB and seconds."""
    code = (
        "import sys; from saelab.workflows import browse, directions, live, results, runs;"
        "from saelab.core import plotting;"
        f"(place,) = browse.survey([{str(made)!r}]).places; opened = browse.open_place(place);"
        "browse.card(place, opened.store); directions.nearest_features(opened, 3); plotting.template();"
        "opened.store.histogram(3);"
        "browse.distinct_contexts(opened.store, 3, 5, before=3, after=3, distinct_rows=True);"
        "directions.decoder_plane(place.sae); assert place.sae is not None; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
