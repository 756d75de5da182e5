import pytest

from saelab.core.progress import set_progress


@pytest.fixture(autouse=True)
def _no_progress_bars():
    set_progress(False)
    yield
    set_progress(True)
