import pytest

from tests.analysis.autointerp.planted import corpus, plant


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted") / "features")


@pytest.fixture(scope="session")
def small(store):
    return corpus(store)
