"""A selection of features for other programs, as the browser offers it for download."""

import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saelab.core.errors import ConfigError
from saelab.features.store import FeatureStore

MOST_FEATURES = 1000
"""Features in one download; ``saelab explain export`` has no such limit."""


def neuronpedia_zip(store: FeatureStore, features: Sequence[int] | np.ndarray) -> bytes:
    """Return the first ``MOST_FEATURES`` live features of a selection as a zipped Neuronpedia export.

    Raises :class:`ConfigError` when none of them ever fires: there is nothing to show of such a feature.
    """
    from saelab.features.neuronpedia import ExportSettings, export_neuronpedia

    chosen = np.asarray(features, np.int64)
    live = chosen[np.asarray(store.column("count"))[chosen] > 0][:MOST_FEATURES]
    if not len(live):
        raise ConfigError("no feature of this selection ever fires; choose others")
    site = str(store.manifest["site"])
    layer = site.split(".")[1] if site.startswith("blocks.") else "0"
    name = site.rsplit(".", 1)[-1].removeprefix("hook_").replace("_", "-")
    settings = ExportSettings(Path(str(store.manifest["model"])).name, f"{layer}-{name}-saelab")
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_neuronpedia(store, folder, settings, live.tolist())
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # its files are compressed already
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(folder))
    return packed.getvalue()
