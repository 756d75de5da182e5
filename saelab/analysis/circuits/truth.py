"""Known circuits as data (``data/tasks/truth.yaml``), turned into edges and heads of a model's graph."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from pydantic import Field

from saelab.analysis.circuits.graph import EdgeGraph, Reader
from saelab.core.assets import asset
from saelab.core.config import Config, load_yaml, parse_config
from saelab.core.errors import ConfigError, nearest


class TruthSpec(Config):
    """One known circuit."""

    model: str
    """Model it is known for: a name that users know, or a model that saelab sets by hand."""
    source: str
    """Who says so."""
    groups: dict[str, list[str]]
    """Heads ``layer.head`` and MLPs ``m3`` by role."""
    group_edges: list[tuple[list[str], list[str], list[str]]] = Field(default_factory=list)
    """(sources, targets, slots) between groups; INPUT, EMBED, OUTPUT and LOGITS are groups too."""
    edges: list[str] = Field(default_factory=list)
    """Edges by name, where they are known one by one."""


@dataclass(frozen=True, eq=False)
class Truth:
    """A known circuit in the graph of a model."""

    name: str
    source: str
    edges: Bool[np.ndarray, "r w"]
    """True edges; all False when only heads are known."""
    nodes: Bool[np.ndarray, " w"]
    """True heads and MLPs among the writers."""


def truth_names() -> list[str]:
    """Names of the known circuits."""
    return sorted(load_yaml(asset("data", "tasks", "truth.yaml")))


def truth_spec(name: str) -> TruthSpec:
    """Return one known circuit as it is written down."""
    data = load_yaml(asset("data", "tasks", "truth.yaml"))
    if name not in data:
        raise ConfigError(f"no known circuit '{name}'{nearest(name, data)} (known: {', '.join(sorted(data))})")
    return parse_config(TruthSpec, data[name], f"truth.yaml: {name}")


def truth_for(name: str, graph: EdgeGraph) -> Truth:
    """Return a known circuit in a model's graph; :class:`ConfigError` when the graph has not its heads."""
    spec = truth_spec(name)
    nodes = np.zeros(len(graph.writers), bool)
    for member in (m for group in spec.groups.values() for m in group):
        nodes[_writer(member, graph, name)] = True
    edges = graph.mask(spec.edges)
    for sources, targets, slots in spec.group_edges:
        froms = [w for s in sources for w in _writers(s, spec, graph, name)]
        for r, reader in enumerate(graph.readers):
            if any(_is_target(t, reader, slots, spec, graph) for t in targets):
                edges[r, froms] = True
    return Truth(name, spec.source, edges & graph.valid & _earlier(graph, bool(spec.group_edges)), nodes)


def _earlier(graph: EdgeGraph, by_group: bool) -> Bool[np.ndarray, "r w"]:
    """The literature's rule for groups: the source's layer is below the target's, or a head's MLP follows it."""
    if not by_group:
        return graph.valid
    layers = np.array([_layer(name) for name in graph.writers])
    heads = np.array([name.startswith("a") for name in graph.writers])
    allowed = np.zeros_like(graph.valid)
    for r, reader in enumerate(graph.readers):
        allowed[r] = (layers < reader.layer) | ((layers == reader.layer) & heads & (reader.slot == "mlp"))
    return allowed


def _layer(writer: str) -> int:
    found = re.match(r"[am](\d+)", writer)
    return int(found[1]) if found else -1


def _writer(member: str, graph: EdgeGraph, name: str) -> int:
    full = member if member.startswith("m") else "a{}.h{}".format(*member.split("."))
    if full not in graph.writers:
        raise ConfigError(
            f"the known circuit {name} has {full}, the model has {graph.n_layers} layers of {graph.n_heads} heads; "
            f"it is known for {truth_spec(name).model}"
        )
    return graph.writers.index(full)


def _writers(group: str, spec: TruthSpec, graph: EdgeGraph, name: str) -> list[int]:
    if group in ("INPUT", "EMBED"):
        mlps = [graph.mlp(layer) for layer in range(graph.n_layers)] if group == "INPUT" else []
        return [*range(graph.n_embeddings), *mlps]
    return [_writer(member, graph, name) for member in spec.groups[group]]


def _is_target(target: str, reader: Reader, slots: list[str], spec: TruthSpec, graph: EdgeGraph) -> bool:
    if target in ("OUTPUT", "LOGITS"):
        return reader.slot == "logits" or (target == "OUTPUT" and reader.slot == "mlp")
    if reader.slot not in (*slots, "mlp"):
        return False
    return any(w in reader.owners for w in _writers(target, spec, graph, spec.model))


def describe_truth(name: str) -> dict[str, Any]:
    """Plain values of a known circuit."""
    return truth_spec(name).model_dump()
