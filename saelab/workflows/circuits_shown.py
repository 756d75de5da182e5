"""Saved circuits as the browser shows them, whatever they are made of: a figure, numbers, a table of parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.core.artifacts import read_manifest
from saelab.core.errors import CorruptError
from saelab.workflows.browse import CIRCUIT

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

COMMANDS = {
    "edges": "saelab circuits find --task TASK --out circuit",
    "features": "saelab circuits features --task TASK --out circuit",
    "graph": "saelab circuits graph --out graph",
}
"""What makes a circuit of each content."""


@dataclass(frozen=True, eq=False)
class ShownCircuit:
    """One circuit."""

    title: str
    """What it is a circuit of."""
    about: str
    """Model, method, prompts: one line."""
    numbers: dict[str, tuple[str, str]]
    """Title to (number as text, meaning)."""
    figure: "Figure"
    """The graph; points that stand for features carry ``[site, feature]`` as their custom data."""
    table: "pd.DataFrame"
    """Its parts, strongest first; features of SAEs have columns ``site`` and ``feature``."""


def open_circuit(folder: Path) -> ShownCircuit:
    """Read a circuit folder of any content. Raises :class:`CorruptError` and the like."""
    content = str(read_manifest(folder, CIRCUIT).get("content"))
    try:
        return _edges(folder) if content == "edges" else _other(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptError(f"{folder} is not a circuit that this version can read ({error!r}); make it again") from None


def _edges(folder: Path) -> ShownCircuit:
    from saelab.analysis.circuits.circuit import load_circuit

    circuit = load_circuit(folder)
    chance = max(circuit.random_faithfulness, default=float("nan"))
    numbers = {
        "edges": (f"{circuit.n_edges:,}", f"Edges in the circuit: {circuit.share:.1%} of the model's."),
        "heads": (f"{len(circuit.heads)}", "Attention heads that something in the circuit reads."),
        "faithfulness": (
            f"{circuit.faithfulness:.3f}",
            "Share of the task that the circuit does alone, on prompts it was not found on: 1 is the whole model.",
        ),
        "by chance": (f"{chance:.3f}", "The best random circuit of as many edges."),
        "left outside": (
            f"{circuit.completeness:.3f}",
            "Share of the task that everything but the circuit does: near 0 when nothing is left outside.",
        ),
    }
    about = f"{circuit.model}, by {circuit.method}; {circuit.n_heldout:,} unseen prompts"
    return ShownCircuit(circuit.task, about, numbers, circuit.plot(), circuit.to_frame())


def _other(folder: Path, content: str) -> ShownCircuit:
    raise CorruptError(f"{folder} holds a circuit of '{content}', which this version cannot draw; update saelab")


def feature_of(point: Any) -> tuple[str, int] | None:
    """Return site and feature of a clicked point of the figure, None when it stands for something else."""
    if isinstance(point, list | tuple) and len(point) >= 2 and isinstance(point[0], str):
        try:
            return point[0], int(point[1])
        except (TypeError, ValueError):
            return None
    return None
