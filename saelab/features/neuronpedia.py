"""A feature store in the formats of SAEDashboard and Neuronpedia, out and in.

* SAEDashboard: ``batch-N.json``, one object with a list of features, each with its activations.
* Neuronpedia: the tree of its exports, ``{model}/{source}/`` with ``features/``, ``activations/`` and ``explanations/``
  in ``batch-N.jsonl.gz``, ``BATCH`` features each, and ``model.jsonl``, ``source.jsonl``, ``sourceset.jsonl``,
  ``release.jsonl``.

In both, contexts of the strongest activations come first (``bin_min = bin_contains = -1``), then contexts from parts of
the range. The fields named ``*_l1`` of correlated neurons hold cosines in SAEDashboard's own files; they are left empty
here, as is everything that the store does not know. Reading back: :mod:`saelab.features.dashboard_import`.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saelab.core.artifacts import atomic_writer
from saelab.core.progress import progress
from saelab.features.explanations import Explanation, Explanations
from saelab.features.query import Context
from saelab.features.store import FeatureStore

BATCH = 1024
"""Features in a file of a Neuronpedia export."""
DASHBOARD_BATCH = 128
"""Features in a file of SAEDashboard."""
BINS = 50
"""Bins of the histograms."""


@dataclass(frozen=True)
class ExportSettings:
    """What is written."""

    model_id: str
    """Neuronpedia's name of the model, such as gpt2-small."""
    source_id: str
    """Neuronpedia's name of the SAE: layer and set, such as 2-res-mine."""
    top: int = 20
    """Contexts of the strongest activations."""
    intervals: int = 10
    """Parts of the range that contexts are drawn from."""
    per_interval: int = 5
    """Contexts from each."""
    before: int = 20
    """Tokens before the strongest one."""
    after: int = 10
    """Tokens after it."""


@dataclass(frozen=True, eq=False)
class Shown:
    """A context as both formats have it."""

    context: Context
    """The text and its values."""
    low: float
    """Lower end of the part of the range; -1 for the strongest."""
    high: float
    """Upper end; for the strongest, the largest value."""
    contains: float
    """Share of the feature's activations in that part; -1 for the strongest."""


def shown_contexts(store: FeatureStore, feature: int, settings: ExportSettings) -> list[Shown]:
    """Return the contexts that are exported of a feature."""
    around: dict[str, Any] = {"before": settings.before, "after": settings.after}
    largest = float(store.column("max")[feature])
    count = max(int(store.column("count")[feature]), 1)
    found = [Shown(c, -1.0, largest, -1.0) for c in store.top_contexts(feature, settings.top, **around)]
    if settings.per_interval:
        parts = store.interval_samples(feature, settings.intervals, settings.per_interval, by="value", **around)
        found += [Shown(c, part.low, part.high, part.count / count) for part in parts for c in part.contexts]
    return found


def dashboard_feature(store: FeatureStore, feature: int, settings: ExportSettings) -> dict[str, Any]:
    """Return a feature as SAEDashboard's ``batch-N.json`` has it."""
    activations = [
        {
            "bin_min": shown.low,
            "bin_max": shown.high,
            "bin_contains": shown.contains,
            "tokens": list(shown.context.tokens),
            "values": [float(v) for v in shown.context.values],
            "qualifying_token_index": shown.context.peak,
            "dfa_values": [],
            "dfa_maxValue": 0,
            "dfa_targetIndex": -1,
        }
        for shown in shown_contexts(store, feature, settings)
    ]
    return {
        "feature_index": feature,
        **_statistics(store, feature),
        "n_prompts_total": store.n_rows,
        "n_tokens_in_prompt": int(store.manifest.get("rows", {}).get("context") or 0),
        "dataset": str(store.manifest["source"]),
        "vector": [],
        "activations": activations,
    }


def _statistics(store: FeatureStore, feature: int) -> dict[str, Any]:
    histogram = store.histogram(feature, BINS)
    nothing: dict[str, Any] = {
        name: []
        for name in (
            *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
            *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
            *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
            *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
        )
    }
    logits: dict[str, Any] = {"neg_str": [], "neg_values": [], "pos_str": [], "pos_values": []}
    if "logit_top_ids" in store.columns:
        for sign, name in (("pos", "top"), ("neg", "bottom")):
            logits[f"{sign}_str"] = store.vocabulary.strings(store.column(f"logit_{name}_ids")[feature])
            logits[f"{sign}_values"] = [float(v) for v in store.column(f"logit_{name}")[feature]]
    return {
        **nothing,
        **logits,
        "frac_nonzero": float(store.column("density")[feature]),
        "freq_hist_data_bar_values": ((histogram.edges[:-1] + histogram.edges[1:]) / 2).tolist(),
        "freq_hist_data_bar_heights": histogram.counts.tolist(),
    }


def export_dashboard(
    store: FeatureStore, folder: Path, settings: ExportSettings, features: Sequence[int]
) -> list[Path]:
    """Write SAEDashboard's ``batch-N.json`` files to a folder and return their paths."""
    layer, _, name = settings.source_id.partition("-")
    paths = []
    with progress("export", len(features), unit="features") as bar:
        for number, part in enumerate(_parts(features, DASHBOARD_BATCH)):
            made = []
            for feature in part:
                made.append(dashboard_feature(store, feature, settings))
                bar.advance(1)
            batch = {
                "model_id": settings.model_id,
                "layer": int(layer) if layer.isdecimal() else layer,
                "sae_set": name or settings.source_id,
                "sae_id_suffix": None,
                "features": made,
            }
            paths.append(folder / f"batch-{number}.json")
            with atomic_writer(paths[-1]) as file:
                file.write(json.dumps(batch, ensure_ascii=False).encode())
    return paths


def export_neuronpedia(store: FeatureStore, folder: Path, settings: ExportSettings, features: Sequence[int]) -> Path:
    """Write Neuronpedia's tree below a folder and return ``folder/{model}/{source}``."""
    root = folder / settings.model_id / settings.source_id
    for name in ("features", "activations", "explanations"):
        (root / name).mkdir(parents=True, exist_ok=True)
    here = {"modelId": settings.model_id, "layer": settings.source_id}
    texts: dict[int, list[Explanation]] = {}
    for explanation in Explanations(store).explanations():
        texts.setdefault(explanation.feature, []).append(explanation)
    with progress("export", len(features), unit="features") as bar:
        for number, part in enumerate(_parts(features, BATCH)):
            rows: list[dict[str, Any]] = []
            contexts: list[dict[str, Any]] = []
            for feature in part:
                rows.append(_neuronpedia_feature(store, feature, here))
                contexts += _neuronpedia_activations(store, feature, here, settings)
                bar.advance(1)
            said = [_neuronpedia_explanation(e, here) for feature in part for e in texts.get(feature, [])]
            for name, lines in (("features", rows), ("activations", contexts), ("explanations", said)):
                _write_lines(root / name / f"batch-{number}.jsonl.gz", lines)
    _, _, set_name = settings.source_id.partition("-")
    about = {"modelId": settings.model_id, "releaseName": set_name or settings.source_id}
    for name, line in (
        ("model", {"id": settings.model_id, "displayName": settings.model_id}),
        ("source", {"id": settings.source_id, "setName": set_name or settings.source_id, **about}),
        ("sourceset", {"name": set_name or settings.source_id, **about, "type": str(store.manifest["sae"])}),
        ("release", {"name": about["releaseName"], "description": f"made with saelab from {store.manifest['source']}"}),
    ):
        with atomic_writer(root / f"{name}.jsonl") as file:
            file.write(_line(line))
    return root


def _neuronpedia_feature(store: FeatureStore, feature: int, here: Mapping[str, str]) -> dict[str, Any]:
    nearest = {}
    if "nearest" in store.columns:
        nearest = {
            "topkCosSimIndices": [int(store.column("nearest")[feature])],
            "topkCosSimValues": [float(store.column("nearest_cosine")[feature])],
        }
    statistics = {k: v for k, v in _statistics(store, feature).items() if not k.startswith("correlated_features")}
    return {
        **here,
        "index": str(feature),
        "maxActApprox": float(store.column("max")[feature]),
        "hasVector": False,
        "vector": [],
        "vectorDefaultSteerStrength": None,
        "hookName": str(store.manifest["site"]),
        **nearest,
        **statistics,
    }


def _neuronpedia_activations(
    store: FeatureStore, feature: int, here: Mapping[str, str], settings: ExportSettings
) -> list[dict[str, Any]]:
    found = []
    for number, shown in enumerate(shown_contexts(store, feature, settings)):
        values = [float(v) for v in shown.context.values]
        found.append(
            {
                "id": f"{here['modelId']}-{here['layer']}-{feature}-{number}",
                **here,
                "index": str(feature),
                "tokens": list(shown.context.tokens),
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": int(np.argmax(values)),
                "minValue": min(values),
                "binMin": shown.low,
                "binMax": shown.high,
                "binContains": shown.contains,
                "qualifyingTokenIndex": shown.context.peak,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
            }
        )
    return found


def _neuronpedia_explanation(explanation: Explanation, here: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": f"{here['modelId']}-{here['layer']}-{explanation.feature}-{explanation.author}",
        **here,
        "index": str(explanation.feature),
        "description": explanation.text,
        "typeName": explanation.explainer,
        "explanationModelName": explanation.model or None,
        "authorId": explanation.author,
        "scoreV1": None,
        "scoreV2": None,
        "notes": f"prompt version {explanation.prompt}" if explanation.prompt else "",
    }


def _parts(features: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for k in range(0, len(features), size):
        yield features[k : k + size]


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with atomic_writer(path) as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        for line in lines:
            packed.write(_line(line))


def _line(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()
