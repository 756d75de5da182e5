"""Explanations and features to and from other programs, and two SAEs compared by what is said of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab.core.artifacts import atomic_writer, prepare_output, write_manifest
from saelab.core.errors import ConfigError, OutputExistsError
from saelab.features.explanations import Explanations
from saelab.features.store import FeatureStore, open_features

if TYPE_CHECKING:
    from saelab.analysis.autointerp.similarity import SemanticSimilarity

FORMATS = ("jsonl", "neuronpedia", "saedashboard")
"""What explanations and features can be written as."""


def run_export(
    store: str | Path,
    out: str | Path,
    *,
    form: str = "jsonl",
    model_id: str | None = None,
    source_id: str | None = None,
    count: int | None = None,
    force: bool = False,
) -> Path:
    """Write the explanations and scores (``jsonl``: one file) or features with them (a folder); returns its path.

    Raises :class:`ConfigError` for an unknown format, :class:`OutputExistsError`, :class:`OutputError`.
    """
    from saelab.features.neuronpedia import ExportSettings, export_dashboard, export_neuronpedia

    if form not in FORMATS:
        raise ConfigError(f"the format is '{form}', expected one of {', '.join(FORMATS)}")
    opened = open_features(store)
    if form == "jsonl":
        return _jsonl(opened, Path(out), force)
    live = np.flatnonzero(np.asarray(opened.column("count")) > 0)[:count]
    site = str(opened.manifest["site"])
    layer = site.split(".")[1] if site.startswith("blocks.") else "0"
    settings = ExportSettings(
        model_id=model_id or Path(str(opened.manifest["model"])).name,
        source_id=source_id or f"{layer}-{site.rsplit('.', 1)[-1].removeprefix('hook_').replace('_', '-')}-saelab",
    )
    folder = prepare_output(out, force=force)
    write_manifest(folder, "export", {"format": form, "store": str(opened.path), "features": len(live)})
    if form == "saedashboard":
        export_dashboard(opened, folder, settings, live.tolist())
        return folder
    return export_neuronpedia(opened, folder, settings, live.tolist())


def _jsonl(store: FeatureStore, path: Path, force: bool) -> Path:
    if path.exists() and not force:
        raise OutputExistsError(f"{path} already exists; add --force to replace it")
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; give a file for jsonl")
    with atomic_writer(path) as file:
        for line in Explanations(store).jsonl():
            file.write(line)
    return path


def run_import(path: str | Path, out: str | Path, *, force: bool = False) -> FeatureStore:
    """Make a feature store of SAEDashboard's or Neuronpedia's files."""
    from saelab.features.dashboard_import import import_dashboards

    return import_dashboards(path, out, force=force)


def run_compare(a: str | Path, b: str | Path, *, embedder: str = "characters") -> "SemanticSimilarity":
    """Compare two stores by their explanations; decoders are looked for beside them."""
    from saelab.analysis.autointerp.embedders import open_embedder
    from saelab.analysis.autointerp.similarity import semantic_similarity
    from saelab.sae.folder import load_sae
    from saelab.workflows.browse import survey

    stores = [open_features(path) for path in (a, b)]
    places = [
        next((place.sae for place in survey([store.path]).places if place.store == store.path.resolve()), None)
        for store in stores
    ]
    decoders = None
    if places[0] is not None and places[1] is not None:
        decoders = (load_sae(places[0]).W_dec, load_sae(places[1]).W_dec)
    corpus = [text for store in stores for text in Explanations(store).texts().values()]
    return semantic_similarity(stores[0], stores[1], open_embedder(embedder, corpus), decoders)
