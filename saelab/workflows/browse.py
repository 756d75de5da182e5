"""What the feature browser shows: finding the stores, SAEs, evaluations and training logs below some folders.

The app draws; everything it needs to know it asks here, of :mod:`saelab.workflows.live`, or of the feature store.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.artifacts import MANIFEST, read_json, read_manifest
from saelab.core.errors import ConfigError, CorruptError, MissingFileError, SaelabError
from saelab.features.explanations import Explanations, attach_explanations
from saelab.features.notes import Notes
from saelab.features.store import KIND, FeatureStore, open_features
from saelab.features.table import quoted
from saelab.workflows.directions import weights_fingerprint

if TYPE_CHECKING:
    import pandas as pd

    from saelab.analysis.evaluation import Evaluation
    from saelab.features.query import Context

DEPTH = 4
"""Folders below a given one that are looked into."""
MOST_FOLDERS = 5000
"""Folders looked into in all; a home directory given by mistake ends soon."""
LOG = "training.jsonl"
EVALUATION, DARK_MATTER, COMPARISON, CIRCUIT = "evaluation", "dark-matter", "comparison", "circuit"
RESULTS = (EVALUATION, DARK_MATTER, COMPARISON, CIRCUIT)
"""Kinds of folders with results of one analysis."""

SCORES = {
    "detection": "Does it tell windows where the feature fires from others? Balanced accuracy, chance 0.5.",
    "fuzzing": "Does it tell right from wrong highlighted tokens? Balanced accuracy, chance 0.5.",
    "intruder": "Is the odd window found among those that fire? Accuracy; needs no explanation.",
    "embedding": "AUC of similarity between explanation and window, firing against not; chance 0.5.",
    "example_embedding": "AUC: are held-out firing windows more like other firing windows? Needs no explanation.",
    "surprisal": "AUC of how much the explanation lowers a language model's loss on windows; chance 0.5.",
    "simulation": "Correlation of simulated with true activations.",
    "intervention": "What steering the feature adds to log p(explanation), nats per token; chance 0.",
    "surface": "AUC of a classifier on characters alone, trained for this feature: what the surface gives away.",
}
"""What the scores of explanations mean."""

MEANING = {
    **SCORES,
    "count": "Tokens on which the feature fires.",
    "density": "Share of the encoded tokens on which the feature fires.",
    "dead": "Never fires on this text.",
    "max": "Largest activation, in the SAE's scaled units.",
    "mean": "Mean of the activations that are not 0.",
    "q10": "10 % of the nonzero activations are smaller.",
    "q25": "25 % of the nonzero activations are smaller.",
    "q50": "Median of the nonzero activations.",
    "q75": "75 % of the nonzero activations are smaller.",
    "q90": "90 % of the nonzero activations are smaller.",
    "rows": "Rows of text in which the feature fires.",
    "distinct_tokens": "Different tokens on which the feature fires.",
    "token_entropy": "Entropy (nats) of the tokens it fires on: 0 for a feature of a single token.",
    "top_token": "Number of the token on which it fires most often.",
    "top_token_share": "Share of its firings that are on that token.",
    "decoder_norm": "Length of the decoder direction.",
    "encoder_decoder_cosine": "Cosine between the direction it reads and the one it writes.",
    "nearest": "The feature with the closest decoder direction.",
    "nearest_cosine": "Cosine of the decoder directions of the feature and its nearest one.",
}
"""What the columns of a store mean."""

METRICS = {
    "fvu": ("FVU", "Fraction of variance unexplained: 0 is perfect, 1 is as good as always predicting the mean."),
    "l0": ("L0", "Mean number of active features per token."),
    "ce_recovered": (
        "CE recovered",
        "(CE zero - CE SAE) / (CE zero - CE clean): share of the next-token loss that zeroing the site would cost and "
        "the reconstruction avoids.",
    ),
    "ce_clean": ("CE clean", "Next-token loss (nats) of the untouched model on the held-out text."),
    "ce_sae": ("CE SAE", "The same loss with the site replaced by the SAE's reconstruction."),
    "dead_fraction": ("dead", "Share of features that never fired on the held-out text."),
    "dense_fraction": ("dense", "Share of features that fire on more than 10 % of the tokens."),
    "cosine": ("cosine", "Mean cosine between activation and reconstruction."),
}
"""Title and meaning of the metrics of an evaluation."""


@dataclass(frozen=True)
class Place:
    """One SAE to look at; whatever was not found is None."""

    key: str
    """Short and unique; stands in links."""
    store: Path | None = None
    """Its feature store."""
    sae: Path | None = None
    """Its SAE folder."""
    evaluation: Path | None = None
    """Its newest evaluation."""
    log: Path | None = None
    """Its training log."""


@dataclass(frozen=True)
class Library:
    """Everything that was found."""

    places: tuple[Place, ...] = ()
    """The SAEs, those with a feature store first."""
    logs: tuple[Path, ...] = ()
    """All training logs, the one written to last first."""
    results: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Folders of saved results by kind (``RESULTS``), the one written last first."""
    problems: tuple[str, ...] = ()
    """One line for each folder that could not be used."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An open feature store and what goes with it. Read-only but for its notes."""

    place: Place
    """Where everything is."""
    store: FeatureStore
    """The feature store."""
    said: Explanations
    """Explanations of its features, and their scores."""
    notes: Notes
    """Stars, labels and notes on its features."""


@dataclass
class _Found:
    stores: dict[Path, dict[str, Any]] = field(default_factory=dict)
    saes: dict[Path, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, list[Path]] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def survey(paths: Sequence[str | Path]) -> Library:
    """Find what can be browsed below some folders: runs, feature stores, SAEs.

    For a feature store given by itself, its SAE and evaluation are looked for beside it. A folder that is broken or
    half-written becomes one line of ``problems``. Raises :class:`MissingFileError` for a path that does not exist.
    """
    found, beside = _Found(), _Found()
    for path in map(Path, paths):
        if not path.exists():
            raise MissingFileError(f"{path} does not exist; give the folder of a run, a feature store or an SAE")
        _look(path.resolve(), found, DEPTH)
        if path.resolve() in {*found.stores, *found.saes}:
            _look(path.resolve().parent, beside, 2)
            if path.resolve() in found.saes:
                _look(path.resolve().parent.parent, beside, 2)
    saes = {**beside.saes, **found.saes}
    results = {
        kind: tuple(sorted({*found.results.get(kind, []), *beside.results.get(kind, [])}, key=stamp, reverse=True))
        for kind in RESULTS
    }
    evaluations = [*dict.fromkeys(found.results.get(EVALUATION, []) + beside.results.get(EVALUATION, []))]
    used: set[Path] = set()
    places: list[Place] = []
    for store, about in found.stores.items():
        sae = _sae_of(store, about, saes)
        if sae is not None:
            used.add(sae)
        places.append(_place(_key(store, places), store, sae, about, evaluations))
    for sae, about in found.saes.items():
        if sae not in used:
            places.append(_place(_key(sae, places), None, sae, about, evaluations))
    logs = sorted(dict.fromkeys(found.logs), key=lambda log: -log.stat().st_mtime)
    return Library(tuple(places), tuple(logs), results, tuple(dict.fromkeys(found.problems)))


def find_store(path: str | Path) -> FeatureStore:
    """Open the feature store at a path: the folder itself, or the only store below it.

    Raises :class:`MissingFileError` when there is none, :class:`ConfigError` when there are several.
    """
    path = Path(path)
    if path.is_dir() and (path / MANIFEST).is_file() and read_manifest(path)["kind"] == KIND:
        return open_features(path)
    library = survey([path])
    stores = [place.store for place in library.places if place.store is not None]
    if len(stores) > 1:
        raise ConfigError(f"{path} holds {len(stores)} feature stores; give one: {', '.join(map(str, stores[:8]))}")
    if not stores:
        problem = f" ({library.problems[0]})" if library.problems else ""
        raise MissingFileError(f"no feature store in {path}{problem}; give the folder that 'saelab build' wrote")
    return open_features(stores[0])


def _look(root: Path, found: _Found, depth: int) -> None:
    for number, folder in enumerate(_folders(root, depth)):
        if number >= MOST_FOLDERS:
            found.problems.append(f"{root} holds more than {MOST_FOLDERS} folders; the rest was not looked at")
            return
        if (folder / LOG).is_file() and folder / LOG not in found.logs:
            found.logs.append(folder / LOG)
        try:
            _note(folder, found)
        except SaelabError as error:
            found.problems.append(str(error))


def _note(folder: Path, found: _Found) -> None:
    if not (folder / MANIFEST).is_file():
        if (folder / "progress.json").is_file() and read_json(folder / "progress.json").get("kind") == "feature-store":
            found.problems.append(f"{folder} is a feature store still being built, or whose build was interrupted")
        return
    manifest = read_manifest(folder)
    if manifest["kind"] == "feature-store":
        found.stores[folder] = manifest
    elif manifest["kind"] == "sae":
        found.saes[folder] = manifest
    elif manifest["kind"] in RESULTS:
        found.results.setdefault(manifest["kind"], []).append(folder)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield folders from the top down; the insides of stores, which are many files, are left out."""
    if not root.is_dir():
        return
    yield root
    if depth == 0 or ((root / MANIFEST).is_file() and (root / "tokens").is_dir()):
        return
    try:
        below = sorted(e.name for e in os.scandir(root) if e.is_dir(follow_symlinks=False) and e.name[0] not in "._")
    except OSError:
        return
    for name in below:
        yield from _folders(root / name, depth - 1)


def _sae_of(store: Path, about: dict[str, Any], saes: dict[Path, dict[str, Any]]) -> Path | None:
    """Return the SAE that a store was made with: same sizes, and same weights by fingerprint."""
    alike = [
        sae
        for sae, manifest in saes.items()
        if (manifest.get("d_in"), manifest.get("d_sae")) == (about.get("d_in"), about.get("n_features"))
    ]
    alike.sort(key=lambda sae: -len(os.path.commonpath([sae, store])))
    for sae in alike:
        try:
            if _fingerprint(sae, (sae / MANIFEST).stat().st_mtime_ns) == about.get("sae_fingerprint"):
                return sae
        except SaelabError:
            continue
    return None


@lru_cache(maxsize=256)
def _fingerprint(sae: Path, mtime: int) -> str:
    return weights_fingerprint(sae)


def _place(key: str, store: Path | None, sae: Path | None, about: dict[str, Any], evaluations: list[Path]) -> Place:
    """Complete a place with the evaluation of the same SAE (as far as it says) that is nearest on the disk."""
    here = store or sae
    assert here is not None
    size = about.get("n_features", about.get("d_sae"))
    fitting = []
    for folder in evaluations:
        manifest = read_manifest(folder)
        own, its = about.get("sae_fingerprint"), manifest.get("sae_fingerprint")
        same = own == its if own and its else manifest.get("d_sae") == size
        if same and about.get("site", manifest.get("site")) == manifest.get("site"):
            fitting.append(folder)
    fitting.sort(key=lambda folder: (len(os.path.commonpath([folder, here])), folder.stat().st_mtime))
    log = sae / LOG if sae is not None and (sae / LOG).is_file() else None
    return Place(key=key, store=store, sae=sae, evaluation=fitting[-1] if fitting else None, log=log)


def _key(folder: Path, places: Sequence[Place]) -> str:
    """Return a short name: the folder's own and its parent's, with a number when that is taken."""
    name = "/".join(folder.parts[-2:]).strip("/")
    taken = {place.key for place in places}
    return next(k for k in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if k not in taken)


def open_place(place: Place) -> Opened:
    """Open the feature store of a place. Raises :class:`CorruptError` and the like."""
    assert place.store is not None, "a place without a store has no features"
    store = open_features(place.store)
    attach_explanations(store)
    return Opened(place, store, Explanations(store), Notes(store))


def stamp(folder: Path) -> int:
    """Return a number that changes when the folder is written anew."""
    try:
        return (folder / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def load_evaluation_of(place: Place) -> "Evaluation | None":
    """Return the evaluation of a place, if there is one."""
    if place.evaluation is None:
        return None
    from saelab.analysis.evaluation import load_evaluation

    return load_evaluation(place.evaluation)


def _mapping(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise CorruptError(f"{path} must hold a mapping; make the folder again")
    return data


def activation_store_of(place: Place) -> Path | None:
    """Return the activation store that an SAE was trained on, if that is still where it was."""
    if place.sae is None:
        return None
    store = _mapping(place.sae / "meta.json").get("provenance", {}).get("store")
    return Path(store) if store is not None and (Path(store) / MANIFEST).is_file() else None


def card(place: Place, store: FeatureStore | None) -> dict[str, str]:
    """Return what an SAE is, as names and texts."""
    about: dict[str, Any] = {}
    if place.sae is not None:
        config, meta = (_mapping(place.sae / name) for name in ("config.json", "meta.json"))
        trained = meta.get("provenance", {})
        about["architecture"] = config.get("architecture")
        about |= {name: config[name] for name in ("k", "budget") if name in config}
        about["size"] = f"{config.get('d_in'):,} → {config.get('d_sae'):,}"
        about |= {"model": trained.get("model"), "site": trained.get("site"), "trained on": trained.get("text")}
        about["training tokens"] = f"{meta['tokens']:,}" if "tokens" in meta else None
        about["SAE folder"] = place.sae
    if store is not None:
        manifest = store.manifest
        fresh = {"architecture": manifest["sae"], "size": f"{manifest['d_in']:,} → {manifest['n_features']:,}"}
        about = {**fresh, "model": manifest["model"], "site": manifest["site"], **{k: v for k, v in about.items() if v}}
        about["text in the store"] = f"{manifest['source']}, {store.n_kept:,} tokens"
        about["feature store"] = store.path
    return {name: str(value) for name, value in about.items() if value is not None}


# features as tables and texts ----------------------------------------------------------------------------------------


def describe_features(opened: Opened, features: np.ndarray) -> "pd.DataFrame":
    """Return ``label`` and ``fires on`` (the most frequent token) of some features."""
    import pandas as pd

    notes, store = opened.notes.all(), opened.store
    tops = np.asarray(store.column("top_token"))[np.asarray(features, np.int64)].tolist()
    texts = ["" if top < 0 else quoted(store.vocabulary.strings([top])[0]) for top in tops]
    labels = [notes[int(i)].label if int(i) in notes else "" for i in features]
    return pd.DataFrame({"fires on": texts, "label": labels})


def with_descriptions(opened: Opened, frame: "pd.DataFrame") -> "pd.DataFrame":
    """Add ``fires on`` and ``label`` to a frame that has a column ``feature``."""
    about = describe_features(opened, frame["feature"].to_numpy(np.int64))
    return frame.reset_index(drop=True).join(about)


def distinct_contexts(
    store: FeatureStore, i: int, n: int, *, before: int, after: int, distinct_rows: bool
) -> tuple[list["Context"], int]:
    """Return the n strongest contexts of feature i that differ in their text, and how many alike were left out.

    Looked at are the 2 n + 24 strongest, so a feature that fires on nothing but copies may have fewer than n.
    """
    kept: list[Context] = []
    seen: set[bytes] = set()
    left_out = 0
    for context in store.top_contexts(i, min(2 * n + 24, 10 * n), before, after, distinct_rows):
        if len(kept) == n:
            break
        text = context.token_ids.tobytes() + context.peak.to_bytes(4, "little")
        if text in seen:
            left_out += 1
        else:
            seen.add(text)
            kept.append(context)
    return kept, left_out
