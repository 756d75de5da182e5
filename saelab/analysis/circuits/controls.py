"""Circuits by chance, as large as a given one: what its faithfulness has to beat.

* ``edges``: as many edges, drawn from all alike. They seldom lead from the tokens to the logits: an easy control.
* ``paths``: as many edges, on random paths from the embeddings to the logits, so that all of them carry something.
* ``parts``: as many heads and as many MLPs, drawn at random, with *all* the edges among them, the embeddings and the
  logits: usually many more edges than the circuit has.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from saelab.analysis.circuits.graph import EdgeGraph

Masks = Bool[np.ndarray, "n r w"]
ATTEMPTS = 200
"""Paths tried that are too long for what is left of a circuit before single edges fill it up."""


def random_edges(graph: EdgeGraph, circuit: Bool[np.ndarray, "r w"], n: int, seed: int) -> Masks:
    """Return n circuits of as many edges, drawn from all edges alike."""
    generator = np.random.default_rng(seed)
    places = np.flatnonzero(graph.valid)
    masks = np.zeros((n, graph.valid.size), bool)
    for row in masks:
        row[generator.choice(places, int(circuit.sum()), replace=False)] = True
    return masks.reshape(n, *graph.valid.shape)


def random_paths(graph: EdgeGraph, circuit: Bool[np.ndarray, "r w"], n: int, seed: int) -> Masks:
    """Return n circuits of as many edges, made of random paths from an embedding to the logits."""
    generator = np.random.default_rng(seed)
    return np.stack([_paths(graph, int(circuit.sum()), generator) for _ in range(n)])


def random_parts(graph: EdgeGraph, circuit: Bool[np.ndarray, "r w"], n: int, seed: int) -> Masks:
    """Return n circuits of as many heads and MLPs with all edges among them, the embeddings and the logits."""
    generator = np.random.default_rng(seed)
    inside = set(graph.nodes(circuit).tolist())
    heads, mlps = list(graph.heads), [graph.mlp(layer) for layer in range(graph.n_layers)]
    sizes = [(kind, len(inside & set(kind))) for kind in (heads, mlps)]
    drawn = [[w for kind, k in sizes for w in generator.choice(kind, k, replace=False).tolist()] for _ in range(n)]
    return np.stack([graph.of_nodes(writers) for writers in drawn])


CONTROLS: dict[str, Callable[[EdgeGraph, Bool[np.ndarray, "r w"], int, int], Masks]] = {
    "edges": random_edges,
    "paths": random_paths,
    "parts": random_parts,
}
"""The controls by name: (graph, circuit, number, seed) -> masks."""


def _paths(graph: EdgeGraph, n_edges: int, generator: np.random.Generator) -> Bool[np.ndarray, "r w"]:
    mask = np.zeros_like(graph.valid)
    failed = 0
    while failed < ATTEMPTS and mask.sum() < n_edges:
        tried = mask.copy()
        for place in _path(graph, generator):
            tried[place] = True
        if mask.sum() < tried.sum() <= n_edges:
            mask, failed = tried, 0
        else:
            failed += 1
    while mask.sum() < n_edges:
        left = _between(graph, mask) & ~mask
        places = np.argwhere(left if left.any() else graph.valid & ~mask)
        mask[tuple(places[generator.integers(len(places))])] = True
    return mask


def _path(graph: EdgeGraph, generator: np.random.Generator) -> list[tuple[int, int]]:
    """A random path from the logits down: a writer of all that the reader sees, one of its inputs, and so on."""
    places, reader = [], len(graph.readers) - 1
    while True:
        writer = int(generator.integers(graph.readers[reader].n_writers))
        places.append((reader, writer))
        if writer < graph.n_embeddings:
            return places
        inputs = [r for r, known in enumerate(graph.readers) if writer in known.owners]
        reader = int(generator.choice(inputs))


def _between(graph: EdgeGraph, mask: Bool[np.ndarray, "r w"]) -> Bool[np.ndarray, "r w"]:
    """All edges among the parts that a circuit has."""
    return graph.of_nodes(w for w in graph.nodes(mask).tolist() if w >= graph.n_embeddings)
