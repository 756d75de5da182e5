"""The edges of a transformer: which part writes to the residual stream, and which part reads what it wrote.

Writers: ``embed``, ``pos`` (learned positions), heads ``a3.h1``, MLPs ``m3``. Readers: the query, key and value input
of each head ``a3.h1<q>`` (key and value inputs belong to a key-value head, ``a3.kv0<k>`` where heads share them), the
MLPs, and ``logits``. An edge is a (reader, writer) pair with the writer earlier in the forward pass; sets of edges and
their scores are matrices (readers, writers). Names follow the circuit files of the EAP-IG and MIB repositories.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.core.errors import ConfigError, nearest
from saelab.models.components import Components


@dataclass(frozen=True)
class Reader:
    """One input of a part."""

    name: str
    layer: int
    """Block; the number of blocks for ``logits``."""
    slot: str
    """``q``, ``k``, ``v``, ``mlp`` or ``logits``."""
    index: int
    """Query head for ``q``, key-value head for ``k`` and ``v``, else 0."""
    n_writers: int
    """The writers before it are the first so many."""
    owners: tuple[int, ...]
    """Writers whose output depends on this input (the heads that share a key-value head; the MLP)."""


@dataclass(frozen=True)
class EdgeGraph:
    """All edges of a model of a given shape."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_positions: bool
    parallel: bool

    @staticmethod
    def of(parts: Components) -> "EdgeGraph":
        """The edges of a loaded model."""
        return EdgeGraph(
            parts.n_layers, parts.n_heads, parts.n_kv_heads, parts.positions is not None, bool(parts.parallel)
        )

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, in the order of the forward pass."""
        names = ["embed", "pos"] if self.has_positions else ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{h}" for h in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @property
    def n_embeddings(self) -> int:
        """Number of writers before the first block."""
        return 2 if self.has_positions else 1

    def head(self, layer: int, head: int) -> int:
        """Number of the writer ``a{layer}.h{head}``."""
        return self.n_embeddings + layer * (self.n_heads + 1) + head

    def mlp(self, layer: int) -> int:
        """Number of the writer ``m{layer}``."""
        return self.head(layer, self.n_heads)

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Numbers of all heads among the writers."""
        return tuple(self.head(layer, h) for layer in range(self.n_layers) for h in range(self.n_heads))

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """All readers, in the order of the forward pass."""
        found: list[Reader] = []
        group = self.n_heads // self.n_kv_heads
        shared = "h" if group == 1 else "kv"
        for layer in range(self.n_layers):
            before = self.head(layer, 0)
            found += [
                Reader(f"a{layer}.h{h}<q>", layer, "q", h, before, (self.head(layer, h),)) for h in range(self.n_heads)
            ]
            for slot in ("k", "v"):
                for g in range(self.n_kv_heads):
                    owners = tuple(self.head(layer, h) for h in range(g * group, (g + 1) * group))
                    found += [Reader(f"a{layer}.{shared}{g}<{slot}>", layer, slot, g, before, owners)]
            seen = before if self.parallel else self.mlp(layer)
            found.append(Reader(f"m{layer}", layer, "mlp", 0, seen, (self.mlp(layer),)))
        found.append(Reader("logits", self.n_layers, "logits", 0, len(self.writers), ()))
        return tuple(found)

    @cached_property
    def valid(self) -> Bool[np.ndarray, "r w"]:
        """True where a (reader, writer) pair is an edge."""
        mask = np.zeros((len(self.readers), len(self.writers)), bool)
        for r, reader in enumerate(self.readers):
            mask[r, : reader.n_writers] = True
        return mask

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.valid.sum())

    def slots(self, layer: int, slot: str) -> slice:
        """Numbers of a block's readers of one slot."""
        where = [r for r, reader in enumerate(self.readers) if (reader.layer, reader.slot) == (layer, slot)]
        return slice(where[0], where[-1] + 1)

    def edge(self, name: str) -> tuple[int, int]:
        """(reader, writer) of an edge's name ``embed->a0.h1<v>``."""
        writer, _, reader = name.partition("->")
        readers = [r.name for r in self.readers]
        for given, known in ((writer, list(self.writers)), (reader, readers)):
            if given not in known:
                raise ConfigError(f"edge '{name}': the model has no '{given}'{nearest(given, known)}")
        found = (readers.index(reader), self.writers.index(writer))
        if not self.valid[found]:
            raise ConfigError(f"edge '{name}': {writer} does not come before {reader}")
        return found

    def name(self, reader: int, writer: int) -> str:
        """Name of an edge."""
        return f"{self.writers[writer]}->{self.readers[reader].name}"

    def mask(self, names: Iterable[str]) -> Bool[np.ndarray, "r w"]:
        """Edges by name as a matrix."""
        mask = np.zeros_like(self.valid)
        for name in names:
            mask[self.edge(name)] = True
        return mask

    def names(self, mask: Bool[np.ndarray, "r w"]) -> list[str]:
        """Names of the edges in a matrix."""
        return [self.name(int(r), int(w)) for r, w in zip(*np.nonzero(mask & self.valid), strict=True)]

    def of_nodes(self, writers: Iterable[int]) -> Bool[np.ndarray, "r w"]:
        """All edges among a set of writers, the embeddings and the logits."""
        chosen = np.zeros(len(self.writers), bool)
        chosen[list(writers)] = True
        chosen[: self.n_embeddings] = True
        reads = np.array([not r.owners or any(chosen[w] for w in r.owners) for r in self.readers])
        found: np.ndarray = self.valid & reads[:, None] & chosen[None]
        return found

    def connected(self, mask: Bool[np.ndarray, "r w"]) -> Bool[np.ndarray, "r w"]:
        """Drop edges from parts that read nothing in the circuit, and into parts that nothing in it reads."""
        mask = np.asarray(mask & self.valid)
        while True:
            fed = np.zeros(len(self.writers), bool)
            fed[: self.n_embeddings] = True
            for r, reader in enumerate(self.readers):
                if mask[r].any():
                    fed[list(reader.owners)] = True
            used = np.asarray(mask.any(0))
            needed = np.array([not r.owners or bool(used[list(r.owners)].any()) for r in self.readers])
            kept: np.ndarray = mask & fed[None] & needed[:, None]
            if (kept == mask).all():
                return kept
            mask = kept

    def nodes(self, mask: Bool[np.ndarray, "r w"]) -> Int[np.ndarray, " n"]:
        """Writers that something in the circuit reads."""
        return np.flatnonzero((mask & self.valid).any(0))

    def node_scores(self, scores: Float[np.ndarray, "r w"]) -> Float[np.ndarray, " w"]:
        """Score of each writer: the largest absolute score among the edges that leave it."""
        found: np.ndarray = np.where(self.valid, np.abs(scores), 0).max(0)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "has_positions": self.has_positions,
            "parallel": self.parallel,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "EdgeGraph":
        """Undo :meth:`to_dict`."""
        return EdgeGraph(**{key: data[key] for key in EdgeGraph.__dataclass_fields__})
