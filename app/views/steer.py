"""Steer: change what some features write, and read what the model then says beside what it says by itself."""

import shell
import streamlit as st

from saelab.analysis import figures
from saelab.analysis.steering import Decoding, Edit

MODES = {
    "add": "add: h + strength · v",
    "clamp": "clamp: the feature as if it were the strength",
    "ablate": "ablate: the feature as if it were 0",
    "project": "project: its component times the strength",
    "cap": "cap: its component at most the strength",
}
POSITIONS = {
    "all": "everywhere",
    "prompt": "in the prompt",
    "generated": "in what is written",
    "last": "at the prompt's last token",
}
MOST_EDITS = 8

place = shell.place()
store = shell.opened().store if place.store is not None else None


def add(feature, strength=0.0):
    """Append an edit to this session's list; numbers are never given twice, so widgets keep their values."""
    st.session_state.edit_count = st.session_state.get("edit_count", 0) + 1
    st.session_state.edits = [*st.session_state.get("edits", []), (st.session_state.edit_count, feature, strength)]


def remove(number):
    """Take an edit off this session's list."""
    st.session_state.edits = [edit for edit in st.session_state.edits if edit[0] != number]


st.title("Steer")
if place.sae is None:
    shell.live()  # says what is missing
asked = st.session_state.pop("steer_with", None)
if asked is not None:
    st.session_state.edits = []
    add(asked[0], round(2 * asked[1], 2))
if "edits" not in st.session_state:
    add(int(st.session_state.get("feature", 0)), 4.0)

prompt, settings = st.columns([2, 1], gap="large")
with prompt:
    text = st.text_area("Prompt", "def read(self, path):\n    ", key="steer_text", height=120)
    st.subheader("Edits")
    edits = []
    for number, feature, strength in st.session_state.edits:
        which, how, much, off = st.columns([1.1, 2.4, 1.2, 0.5], vertical_alignment="bottom")
        top = store.n_features - 1 if store else None
        i = which.number_input("Feature", 0, top, min(feature, top) if top else feature, key=f"edit_{number}_feature")
        mode = how.selectbox("Mode", list(MODES), format_func=MODES.get, key=f"edit_{number}_mode")
        most = f" Its largest activation in the store is {float(store.column('max')[i]):.3g}." if store else ""
        value = much.number_input(
            "Strength", value=float(strength), format="%g", disabled=mode == "ablate", key=f"edit_{number}_strength",
            help="In units of the feature's activation (project: a factor; cap: in the model's units)." + most,
        )  # fmt: skip
        off.button("", icon=":material/close:", key=f"edit_{number}_off", on_click=remove, args=(number,))
        edits.append(Edit(int(i), mode, float(value)))
    if len(edits) < MOST_EDITS:
        st.button("Another feature", icon=":material/add:", on_click=add, args=(0,), key="another")
with settings:
    positions = st.selectbox("Positions", list(POSITIONS), format_func=POSITIONS.get, key="positions")
    decoding = Decoding(
        max_new_tokens=st.slider("Tokens to write", 1, 120, 40, key="new_tokens"),
        temperature=st.slider(
            "Temperature", 0.0, 2.0, 0.5, 0.05, key="temperature", help="0: always the likeliest token."
        ),
        seed=int(st.number_input("Seed", 0, 2**31, 16, key="seed", help="Both texts are drawn with the same noise.")),
        frequency_penalty=st.slider("Frequency penalty", 0.0, 2.0, 1.0, 0.1, key="penalty"),
    )
if st.button("Write", icon=":material/play_arrow:", type="primary", key="write", disabled=not edits):
    with shell.guarded():
        engine = shell.live()
        with st.spinner("Writing both texts …"):
            st.session_state.steered = (place.key, engine.steer(text, edits, positions, decoding))
if st.session_state.get("steered", ("", None))[0] != place.key:
    st.info("The model writes on this machine, once as it is and once steered, with the same seed.")
    st.stop()
result = st.session_state.steered[1]

default, steered = st.columns(2, gap="large")
with default:
    st.subheader("By itself")
    shell.html(result.default)
with steered:
    st.subheader("Steered")
    shell.html(result.steered)
st.caption("Both texts are the same." if result.identical else "Marked: from where the two texts part.")

effect, checks = st.columns([1.6, 1], gap="large")
with effect:
    st.subheader("The prompt's next token")
    shell.chart(figures.probability_changes(result.effect, result.effect_texts)[0], "changes")
with checks:
    st.subheader("Checks")
    st.caption("Edits that must change nothing, made at this prompt; the largest change of an activation.")
    names = {
        "add 0": "add with strength 0",
        "clamp to current": "clamp to its present value",
        "project 1": "project with strength 1",
        "cap twice": "capping a second time",
    }
    rows = {"edit": [names[name] for name in result.checks], "change": [f"{v:.1e}" for v in result.checks.values()]}
    st.table(rows, hide_index=True, border="horizontal")
