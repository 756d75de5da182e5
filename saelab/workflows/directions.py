"""The decoder directions of an SAE folder: neighbours, cosines with a named direction, and maps of them.

Weights are read from the file piece by piece and thrown away, so a page about 100k features neither loads torch nor
keeps 100 MB in memory.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab.core.artifacts import MANIFEST, atomic_writer
from saelab.core.errors import ConfigError, CorruptError, MissingFileError, OutputError
from saelab.features.table import quoted

if TYPE_CHECKING:
    import pandas as pd

    from saelab.features.store import FeatureStore
    from saelab.workflows.browse import Opened
    from saelab.workflows.live import Live

PIECE_BYTES = 4 << 20
"""Bytes of weights in memory at a time."""
MAP_FEATURES = 4000
"""Features on a t-SNE map; of more live ones, this many at even distances."""
MAP_DIMENSIONS = 50
"""t-SNE starts from this many principal axes of the directions."""
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def _entries(sae: Path) -> dict[str, _Entry]:
    """Read the header of an SAE folder's weights. Raises :class:`MissingFileError`, :class:`CorruptError`."""
    path = sae / WEIGHTS
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(size))
        entries = {
            name: _Entry(path, about["dtype"], tuple(about["shape"]), 8 + size + about["data_offsets"][0])
            for name, about in header.items()
            if name != "__metadata__"
        }
        end = max(8 + size + about["data_offsets"][1] for name, about in header.items() if name != "__metadata__")
        if end > path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {end}")
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; the SAE folder is not complete") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CorruptError(f"{path} is not a readable safetensors file ({error}); copy or make it again") from None
    return entries


def weights_fingerprint(sae: Path) -> str:
    """CRC-32 over the weights of an SAE folder: what a feature store made with it records as ``sae_fingerprint``."""
    entries = _entries(sae)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if any(name not in entries or entries[name].dtype != "F32" for name in names):
        from saelab.features.build import dictionary_fingerprint
        from saelab.sae.folder import load_sae

        return dictionary_fingerprint(load_sae(sae))
    value = 0
    for name in names:
        left = 4 * math.prod(entries[name].shape)
        with open(entries[name].path, "rb") as file:
            file.seek(entries[name].start)
            while left and (data := file.read(min(left, PIECE_BYTES))):
                value = zlib.crc32(data, value)
                left -= len(data)
    return f"{value:08x}"


def _decoder(sae: Path) -> _Entry:
    entry = _entries(sae).get("W_dec")
    if entry is None or len(entry.shape) != 2:
        raise CorruptError(f"{sae / WEIGHTS} holds no decoder matrix; copy or make it again")
    if entry.dtype != "F32":
        raise CorruptError(f"{sae / WEIGHTS} holds a {entry.dtype} decoder, expected F32; save the SAE again")
    return entry


def decoder_pieces(sae: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the decoder's rows from the first on, (some, d_out) float32, with the number of the first of each piece."""
    entry = _decoder(sae)
    n, width = entry.shape
    step = max(1, PIECE_BYTES // (4 * max(width, 1)))
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start)
        for first in range(0, n, step):
            rows = min(step, n - first)
            yield first, np.fromfile(file, np.float32, rows * width).reshape(rows, width)


def decoder_rows(sae: Path, features: np.ndarray | None = None) -> np.ndarray:
    """Read the decoder rows of some features (all of them by default), (n, d_out) float32."""
    entry = _decoder(sae)
    mapped = np.memmap(entry.path, np.float32, "r", entry.start, entry.shape)
    return np.array(mapped if features is None else mapped[features])


def cosines(sae: Path, direction: np.ndarray) -> np.ndarray:
    """Cosine of every decoder direction with a vector: (d_sae,) float32; 0 for a row of zeros."""
    direction = np.asarray(direction, np.float32)
    width = _decoder(sae).shape[1]
    if direction.shape != (width,):
        raise ConfigError(f"the direction has {direction.shape[-1]} numbers, the decoder rows have {width}")
    length = max(float(np.linalg.norm(direction)), 1e-30)
    parts = [
        rows @ (direction / length) / np.maximum(np.sqrt(np.einsum("nd,nd->n", rows, rows)), 1e-30)
        for _, rows in decoder_pieces(sae)
    ]
    result: np.ndarray = np.concatenate(parts).astype(np.float32)
    return result


@lru_cache(maxsize=512)
def _neighbours(sae: Path, changed: int, i: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n directions closest to that of feature i, and their cosines; ``changed`` tells states apart."""
    cosine = cosines(sae, decoder_rows(sae, np.array([i]))[0])
    cosine[i] = -np.inf
    n = min(n, len(cosine) - 1)
    best = np.argpartition(-cosine, n - 1)[:n] if n > 0 else np.zeros(0, np.int64)
    found = best[np.lexsort((best, -cosine[best]))].astype(np.int64)
    return found, cosine[found]


def nearest_features(opened: "Opened", i: int, n: int = 10) -> "pd.DataFrame":
    """Return the n features whose decoder directions are closest to that of feature i, closest first.

    Columns ``feature``, ``cosine``, and what ``describe_features`` adds. Needs the SAE folder; without it the one
    neighbour that the store has.
    """
    import pandas as pd

    from saelab.workflows.browse import with_descriptions

    store, sae = opened.store, opened.place.sae
    if sae is not None:
        found, cosine = _neighbours(sae, (sae / MANIFEST).stat().st_mtime_ns, int(i), n)
    elif {"nearest", "nearest_cosine"} <= set(store.columns):
        found = np.asarray(store.column("nearest")[i : i + 1], np.int64)
        cosine = np.asarray(store.column("nearest_cosine")[i : i + 1])
    else:
        return pd.DataFrame({"feature": [], "cosine": []})
    return with_descriptions(opened, pd.DataFrame({"feature": found, "cosine": cosine}))


# named directions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector that has a name, in the space of an SAE's decoder rows."""

    name: str
    """What it is called, such as ``cosine to “ def” (unembedding)``."""
    vector: np.ndarray
    """The vector, (d_out,)."""


def feature_direction(sae: Path, i: int) -> Direction:
    """Return the decoder row of a feature."""
    n = _decoder(sae).shape[0]
    if not 0 <= i < n:
        raise ConfigError(f"feature {i} does not exist; the SAE has features 0 to {n - 1}")
    return Direction(f"cosine to feature {i}", decoder_rows(sae, np.array([i]))[0])


def token_direction(live: "Live", text: str, kind: str) -> Direction:
    """Return what reads (``unembedding``) or writes (``embedding``) a token that a person has typed.

    The unembedding direction is the one that the logit columns of the store are made with: final norm folded in,
    centred. Raises :class:`ConfigError` for a text that is not one token and for a site outside the residual stream.
    """
    token = live.one_token(text)
    vector = live.token_vector(token, kind)
    shown = quoted(live.pieces([token])[0].decode("utf-8", "backslashreplace"))
    return Direction(f"cosine to {shown} ({kind})", vector)


# maps ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features as points on a plane."""

    features: np.ndarray
    """Numbers of the features, rising."""
    points: np.ndarray
    """Their places, (n, 2) float32."""
    method: str
    """``PCA`` or ``t-SNE``."""


@lru_cache(maxsize=4)
def decoder_plane(sae: Path, changed: int = 0) -> FeatureMap:
    """Project unit decoder directions onto their two main axes (PCA about the mean).

    The signs are fixed so that the same weights give the same picture. ``changed``, which tells states of the folder
    apart, is only there for the cache.
    """
    mean, axes = _axes(sae, 2)
    parts = [(_unit(rows) - mean) @ axes for _, rows in decoder_pieces(sae)]
    points = np.concatenate(parts).astype(np.float32)
    return FeatureMap(np.arange(len(points)), points, "PCA")


def tsne_map(sae: Path, store: "FeatureStore", seed: int = 0) -> FeatureMap:
    """Lay decoder directions out by t-SNE (van der Maaten and Hinton 2008), so that neighbours lie together.

    Live features, at most ``MAP_FEATURES`` of them, as unit vectors on their first ``MAP_DIMENSIONS`` principal axes;
    scikit-learn's Barnes-Hut implementation, started from PCA, perplexity 30 (less for few features).
    """
    from sklearn.manifold import TSNE

    live = np.flatnonzero(np.asarray(store.column("density")) > 0)
    if len(live) > MAP_FEATURES:
        live = live[np.linspace(0, len(live) - 1, MAP_FEATURES).astype(np.int64)]
    if len(live) < 4:
        raise ConfigError(f"only {len(live)} features fire on this text; a map needs at least 4")
    mean, axes = _axes(sae, MAP_DIMENSIONS)
    start = (_unit(decoder_rows(sae, live)) - mean) @ axes
    perplexity = min(30.0, (len(live) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(start.astype(np.float32))
    return FeatureMap(live, np.asarray(points, np.float32), "t-SNE")


def map_file(store: "FeatureStore") -> Path:
    """Where the t-SNE map of a store is kept: beside it, for the SAE it was made with."""
    folder = store.path.resolve()
    return folder.with_name(f"{folder.name}.map-{store.manifest.get('sae_fingerprint', '')}.npz")


def load_map(store: "FeatureStore") -> FeatureMap | None:
    """Return the t-SNE map that is kept beside a store, None when there is none (or it cannot be read)."""
    try:
        with open(map_file(store), "rb") as file, np.load(file, allow_pickle=False) as data:
            features, points = np.array(data["features"], np.int64), np.array(data["points"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return None
    fits = points.shape == (len(features), 2) and (not len(features) or int(features.max()) < store.n_features)
    return FeatureMap(features, points, "t-SNE") if fits else None


def keep_map(store: "FeatureStore", made: FeatureMap) -> bool:
    """Write a map beside the store; False where nothing can be written, and the map is just not kept."""
    try:
        with atomic_writer(map_file(store)) as file:
            np.savez(file, features=made.features, points=made.points)
    except OutputError:
        return False
    return True


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit


def _axes(sae: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the unit directions and their n main axes, (d_out, n), of fixed sign."""
    count, width = _decoder(sae).shape
    mean = sum(_unit(rows).sum(0, dtype=np.float64) for _, rows in decoder_pieces(sae)) / max(count, 1)
    scatter = np.zeros((width, width))
    for _, rows in decoder_pieces(sae):
        part = _unit(rows) - mean
        scatter += part.T @ part
    axes = np.linalg.eigh(scatter)[1][:, ::-1][:, :n]
    if axes.shape[1] < n:
        axes = np.pad(axes, ((0, 0), (0, n - axes.shape[1])))
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return mean, axes * np.where(signs == 0, 1, signs)
