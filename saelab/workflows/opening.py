"""``open_result``: whatever saelab wrote in a folder, as the object that was returned when it was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelab.core.artifacts import read_json, read_manifest
from saelab.core.errors import FormatError
from saelab.workflows.trained import Training


def open_result(folder: str | Path) -> Any:
    """Open a folder that saelab wrote, by the kind in its manifest.

    An evaluation, comparison, dark-matter result or circuit of edges comes back as it was returned; a training as
    :class:`Training`; an SAE, a store and a model as ``load_sae``, ``open_store``, ``open_features`` and ``load_model``
    open them; another circuit as :class:`saelab.workflows.circuits.CircuitFolder`, its data and its figure.

    Raises ``MissingFileError``, ``FormatError`` (a kind that is only read as files), ``CorruptError``.
    """
    kind = read_manifest(folder)["kind"]
    if kind not in _OPENERS:
        raise FormatError(f"{folder} is a saelab {kind} folder; its JSON files and report are to be read directly")
    return _OPENERS[kind](Path(folder))


def _training(folder: Path) -> Training:
    from saelab.sae.folder import CONFIG, load_meta
    from saelab.training.loop import FitResult

    manifest = read_manifest(folder, "run")
    if manifest.get("job") != "train":
        raise FormatError(f"{folder} is the folder of a {manifest.get('job')}; open one of the folders in it")
    runs = []
    for run in manifest["runs"]:
        path = folder / run["name"]
        config = {"name": run["name"], "sae": read_json(path / CONFIG), "training": load_meta(path)["training"]}
        runs.append(FitResult(run["name"], path, config, run["steps"], run["tokens"], run["metrics"]))
    return Training(folder, tuple(runs))


def _sae(folder: Path) -> Any:
    from saelab.sae.folder import load_sae

    return load_sae(folder)


def _store(folder: Path) -> Any:
    from saelab.activations.store import open_store

    return open_store(folder)


def _features(folder: Path) -> Any:
    from saelab.features.store import open_features

    return open_features(folder)


def _evaluation(folder: Path) -> Any:
    from saelab.analysis.evaluation import load_evaluation

    return load_evaluation(folder)


def _comparison(folder: Path) -> Any:
    from saelab.analysis.compare.folder import load_comparison

    return load_comparison(folder)


def _dark_matter(folder: Path) -> Any:
    from saelab.analysis.dark_matter.result import load_dark_matter

    return load_dark_matter(folder)


def _circuit(folder: Path) -> Any:
    from saelab.analysis.circuits.circuit import load_circuit
    from saelab.workflows.circuits import open_circuit

    return load_circuit(folder) if read_manifest(folder).get("content") == "edges" else open_circuit(folder)


def _model(folder: Path) -> Any:
    from saelab.models.subject import load_model

    return load_model(str(folder))


def _codebook(folder: Path) -> Any:
    from saelab.training.codebook_model import load_codebook_model

    return load_codebook_model(folder)


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "run": _training,
    "sae": _sae,
    "activation-store": _store,
    "feature-store": _features,
    "evaluation": _evaluation,
    "comparison": _comparison,
    "dark-matter": _dark_matter,
    "circuit": _circuit,
    "model": _model,
    "codebook-model": _codebook,
}
