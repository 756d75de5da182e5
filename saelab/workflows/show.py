"""Show: what is in a folder that saelab wrote, and what a feature looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.artifacts import human_bytes, read_json, read_manifest
from saelab.core.errors import CorruptError, FormatError

if TYPE_CHECKING:
    from saelab.features.query import Context
    from saelab.features.store import FeatureStore


@dataclass(frozen=True)
class FeatureCard:
    """What one looks at first in a feature."""

    index: int
    """Number of the feature."""
    density: float
    """Share of encoded tokens on which it fires."""
    max: float
    """Largest activation, in scaled units."""
    promotes: list[str]
    """Tokens whose logit its decoder direction raises most (empty when the site is not in the residual stream)."""
    contexts: "list[Context]"
    """Strongest activations, at most one per row of text."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: each context as tokens, values and the place of the peak."""
        contexts = [
            {"tokens": list(c.tokens), "values": [float(v) for v in c.values], "peak": c.peak, "row": c.row}
            for c in self.contexts
        ]
        return {
            "feature": self.index,
            "density": self.density,
            "max": self.max,
            "promotes": self.promotes,
            "contexts": contexts,
        }


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a folder holds: its manifest without file lists, its size, and what its kind adds."""
    folder = Path(path)
    manifest = read_manifest(folder)
    files = [f for f in folder.rglob("*") if f.is_file()]
    result: dict[str, Any] = {"path": str(folder), "size": human_bytes(sum(f.stat().st_size for f in files))}
    result |= {key: value for key, value in manifest.items() if key not in ("files", "shards", "checksums", "columns")}
    if manifest["kind"] == "sae":
        from saelab.sae.folder import load_meta

        result |= {"config": read_json(folder / "config.json"), **load_meta(folder)}
    if manifest["kind"] == "activation-store":
        result["n_shards"] = len(manifest["shards"])
    return result


def verify_folder(path: str | Path) -> int:
    """Check every file of a folder against its checksum; return how many there are. Raises :class:`CorruptError`."""
    kind = read_manifest(path)["kind"]
    if kind == "activation-store":
        from saelab.activations.store import open_store

        store = open_store(path)
        store.verify()
        return len(store.manifest["shards"])
    if kind == "feature-store":
        from saelab.features.store import open_features

        features = open_features(path)
        features.verify()
        return len(features.manifest["files"])
    if kind == "sae":
        from saelab.sae.folder import load_sae

        load_sae(path)
        return 1
    raise FormatError(f"{path} is a {kind} folder, which has no checksums; expected a store or an SAE")


def feature_cards(path: str | Path, features: Sequence[int], n_contexts: int) -> list[FeatureCard]:
    """Return the cards of some features of a feature store."""
    from saelab.features.store import open_features

    store = open_features(path)
    return [_card(store, index, n_contexts) for index in features]


def _card(store: "FeatureStore", index: int, n_contexts: int) -> FeatureCard:
    contexts = store.top_contexts(index, n_contexts, before=18, after=6)
    promotes: list[str] = []
    if "logit_top_ids" in store.columns:
        promotes = store.vocabulary.strings(store.column("logit_top_ids")[index][:6])
    return FeatureCard(
        index=index,
        density=float(store.column("density")[index]),
        max=float(store.column("max")[index]),
        promotes=promotes,
        contexts=contexts,
    )


def example_features(store: "FeatureStore", n: int = 3) -> list[int]:
    """Choose features worth a first look: alive, neither rare nor dense, from single-token to many-token ones.

    Among features firing on 0.05 % to 2 % of the tokens, those at evenly spaced quantiles of the entropy of the tokens
    they fire on; all live features when none is in that range.
    """
    density = np.asarray(store.column("density"))
    good = np.flatnonzero((density >= 5e-4) & (density <= 2e-2))
    if len(good) < n:
        good = np.flatnonzero(density > 0)
    if not len(good):
        raise CorruptError(f"no feature of {store.path} ever fires; train longer or build on more text")
    order = good[np.argsort(np.asarray(store.column("token_entropy"))[good], kind="stable")]
    places = np.linspace(0.1, 0.9, n) * (len(order) - 1)
    return [int(order[round(p)]) for p in places]
