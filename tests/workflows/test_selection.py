"""A selection as a zipped Neuronpedia export."""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest

from saelab.core.errors import ConfigError
from saelab.features.store import open_features
from saelab.workflows.selection import neuronpedia_zip
from tests.app.planted import plant


def test_zip_holds_the_live_features_of_the_selection(tmp_path):
    store = plant(tmp_path / "features")
    assert np.asarray(store.column("count")).tolist() == [0, 10, 110, 0]
    with zipfile.ZipFile(io.BytesIO(neuronpedia_zip(store, np.array([2, 0, 1])))) as archive:
        (name,) = [n for n in archive.namelist() if "/features/" in n]
        lines = [json.loads(line) for line in gzip.decompress(archive.read(name)).splitlines()]
    assert [line["index"] for line in lines] == ["2", "1"]
    assert [line["frac_nonzero"] for line in lines] == [pytest.approx(1), pytest.approx(10 / 110)]
    with pytest.raises(ConfigError, match="no feature of this selection ever fires"):
        neuronpedia_zip(open_features(tmp_path / "features"), [0, 3])
