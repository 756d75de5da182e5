"""Circuits: the parts of a model, or the features of SAEs, that do a task together."""

import pandas as pd
import shell
import streamlit as st

from saelab.workflows.browse import CIRCUIT, stamp
from saelab.workflows.circuits_shown import HELP, feature_of, is_site, open_circuit
from saelab.workflows.results import short


@st.cache_resource(max_entries=8, show_spinner="Reading the circuit …")
def circuit_in(folder, changed):
    """Return a saved circuit; ``changed`` makes a new one in the same folder count as another."""
    return open_circuit(folder)


def open_in_site(site, feature):
    """Open a feature of the SAE at a site, if one with a feature store is among the folders given."""
    for place in shell.library().places:
        if place.store is not None and is_site(site, shell.opened_at(place).store.manifest):
            shell.open_feature(feature, place.key)
    st.info(shell.plain(f"No feature store of an SAE at {site} is among the folders given."))


st.title("Circuits")
found = shell.results(CIRCUIT)
if not found:
    st.info("No circuit in the folders given. This finds one; saelab circuits tasks lists the tasks:")
    st.code(f"saelab circuits find --task induction --out circuit\n{HELP}", language="bash")
    st.stop()
folder = shell.choose_result(found, "circuit")
with shell.guarded():
    circuit = circuit_in(folder, stamp(folder))
st.subheader(shell.plain(circuit.title))
st.caption(shell.plain(f"{circuit.about}; folder {short(folder)}."))
shell.metrics(circuit.numbers)
clicked = shell.chart_points(circuit.figure, "circuit_graph")
caption = "Blue: positive, orange: negative; the larger or wider, the stronger."
if "feature" in circuit.table:
    caption += " Triangles are errors of SAEs. Click a feature, here or in the table, to open it."
st.caption(caption)
if clicked and (target := feature_of(clicked[0])) is not None:
    open_in_site(*target)
table = circuit.table
if "feature" in table:  # parts that are no features have an empty cell, not "None"
    table = table.assign(feature=table["feature"].astype("string").fillna(""))
event = st.dataframe(
    table, key="circuit_table", hide_index=True, width="stretch", height=420, on_select="rerun",
    selection_mode="single-cell",
)  # fmt: skip
cells = event["selection"]["cells"]
if cells and {"site", "feature"} <= set(circuit.table.columns):
    row = circuit.table.iloc[cells[0][0]]
    if pd.notna(row["feature"]):
        open_in_site(str(row["site"]), int(row["feature"]))
