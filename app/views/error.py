"""Error: what the SAE leaves out, its linear and nonlinear parts, and on which tokens."""

import numpy as np
import shell
import streamlit as st

from saelab.analysis.dark_matter.report import SECTIONS
from saelab.analysis.dark_matter.result import load_dark_matter
from saelab.workflows.browse import DARK_MATTER, activation_store_of, stamp
from saelab.workflows.results import sae_folder, short, worst_tokens

EXAMPLE = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n"
PARTS = {"total": "the whole error", "linear": "its linear part", "nonlinear": "its nonlinear part"}


@st.cache_resource(max_entries=4, show_spinner="Reading the result …")
def result_in(folder, changed):
    """Return a saved result; ``changed`` makes a new one in the same folder count as another."""
    return load_dark_matter(folder)


def vocabulary_of(model):
    """Return the vocabulary that a feature store of the same model holds, if one is among the folders given."""
    for place in shell.library().places:
        if place.store is not None:
            store = shell.opened_at(place).store
            if store.manifest.get("model") == model:
                return store.vocabulary
    return None


st.title("Error")
found = shell.results(DARK_MATTER)
if not found:
    with shell.guarded():
        sae = shell.place().sae or "PATH/TO/SAE"
        store = activation_store_of(shell.place()) or "PATH/TO/STORE"
    st.info("What an SAE's error is made of is measured on an activation store. This does it:")
    st.code(f"saelab dark-matter {sae} --store {store} --out dark-matter", language="bash")
    st.caption("The Prompt page colours a text by what the SAE misses without it.")
    st.stop()
folder = shell.choose_result(found, "dark_matter")
with shell.guarded():
    result = result_in(folder, stamp(folder))
names = [d.name for d in result.decompositions]
folders = {name: sae_folder(shell.library(), result.saes[name]) for name in names}
name = result.main
if len(names) > 1:
    here = next((p.sae for p in shell.library().places if p.key == st.session_state.get("place")), None)
    chosen = next((n for n in names if folders[n] == here), result.main)
    name = st.selectbox("SAE of this report", names, index=names.index(chosen), key="error_sae", width=320)
about = next(d for d in result.decompositions if d.name == name)
shell.metrics(
    {
        "FVU": (f"{about.fvu:.4f}", "Fraction of variance unexplained, on contexts that no fit has seen."),
        "linear": (
            f"{about.fvu_linear:.4f}",
            "FVU of the part of the error that a linear map of the activation gives.",
        ),
        "nonlinear": (f"{about.fvu_nonlinear:.4f}", "FVU of the rest."),
        "error R²": (f"{about.r2:.3f}", "R² of the error vector, predicted linearly from the activation."),
        "L0": (f"{about.l0:.3g}", "Active features per token."),
        "tokens": (f"{about.n_test:,}", "Tokens it was measured on."),
    }
)
st.caption(shell.plain(f"{result.model} at {result.site}, text {result.text}; folder {short(folder)}."))

st.subheader("In a text")
with st.form("error_form", border=False):
    text = st.text_area("Text", EXAMPLE, key="error_text", height=110)
    go = st.form_submit_button("Read it", icon=":material/play_arrow:", type="primary")
if go:
    with shell.guarded():
        live = shell.live_of(folders[name])
        st.session_state.errors = (str(folder), name, live.error_of(text, result.maps[name]))
kept = st.session_state.get("errors")
if kept is not None and kept[:2] == (str(folder), name):
    errors = kept[2]
    live = shell.live_of(folders[name])
    part = st.segmented_control(
        "Colour by", list(PARTS), default="total", required=True, format_func=PARTS.get, key="error_part"
    )
    share = getattr(errors, part) / np.maximum(errors.x, 1e-30)
    top = float(np.nanmax([*errors.total / np.maximum(errors.x, 1e-30), 1e-6]))
    shell.html(live.values_html(errors.token_id.tolist(), share, top, f"{PARTS[part]} over the squared norm"))
    st.caption("Tokens without colour are not encoded (BOS), or are reconstructed well.")

st.subheader("Tokens that it fails on")
with shell.guarded():
    frame = worst_tokens(result, name, vocabulary_of(result.model))
shares = ["error", "linear", "nonlinear"]
frame[shares] *= 100
percent = {part: st.column_config.NumberColumn(format="%.1f%%") for part in shares}
st.dataframe(frame, hide_index=True, width="stretch", column_config=percent, height=300)
st.caption("Share of the squared norm in the error, over all occurrences of a token seen at least ten times.")

st.subheader("Findings")
tables = result.frames()
if "findings" in tables:  # a table of text that wraps: a dataframe would scroll sideways
    names = {"claim": "claim", "holds": "here", "measured": "measured", "control": "controls", "rule": "holds when"}
    said = tables["findings"][list(names)].rename(columns=names)
    said["here"] = said["here"].map({True: "holds", False: "does not hold"})
    st.table(said.map(shell.plain), hide_index=True, border="horizontal")
for k, (section, (figure, _)) in enumerate(result.figures().items()):
    if k % 2 == 0:
        cells = st.columns(2, gap="large")
    with cells[k % 2]:
        title, meaning = SECTIONS[section]
        st.subheader(title)
        shell.chart(figure, f"dark_{section}")
        st.caption(shell.plain(meaning))
for note in result.notes:
    st.caption(shell.plain(note))
