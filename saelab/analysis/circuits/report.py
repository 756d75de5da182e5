"""The HTML report of a circuit of edges: figure, judgement, edges."""

from typing import TYPE_CHECKING

from saelab.analysis.circuits.figure import circuit_figure, page, table_html

if TYPE_CHECKING:
    from saelab.analysis.circuits.circuit import Circuit


def circuit_report(circuit: "Circuit") -> str:
    """Return a self-contained HTML page about a circuit."""
    import pandas as pd

    setting = circuit.setting
    facts = pd.DataFrame(
        [
            ("edges", f"{circuit.n_edges} of {circuit.graph.n_edges} ({circuit.share:.1%})"),
            ("heads", " ".join(circuit.heads) or "none"),
            ("MLPs", " ".join(circuit.mlps) or "none"),
            ("faithfulness", f"{circuit.faithfulness:.3f} on {circuit.n_heldout} held-out prompts"),
            ("on the prompts it was found on", f"{circuit.faithfulness_train:.3f} ({circuit.n_train} prompts)"),
            ("all other edges", f"{circuit.completeness:.3f}"),
            *circuit.control_lines().items(),
            ("metric", setting.metric),
            ("ablation", setting.ablation),
            ("positions", setting.positions),
            ("method", circuit.method),
            ("seed", str(circuit.seed)),
        ],
        columns=["", "value"],
    )
    note = (
        "<p>Faithfulness is (m(C) - m(nothing)) / (m(model) - m(nothing)), with every edge outside the circuit "
        "carrying the ablation's value. Random edges: as many, drawn from all. Random paths: as many, on paths from "
        "the embeddings to the logits. Random heads and MLPs: as many of each, with all the edges among them.</p>"
    )
    sections = [("Judgement", table_html(facts) + note), ("Edges", table_html(circuit.to_frame()))]
    return page(f"{circuit.task} on {circuit.model}", circuit_figure(circuit)[0], sections)
