"""Prompt: type a text, and see which features fire on which token, and with what effect."""

import numpy as np
import shell
import streamlit as st

from saelab.analysis import figures
from saelab.workflows.browse import with_descriptions

EXAMPLE = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n"
OTHER = 'def write_lines(path, lines):\n    with open(path, "w") as file:\n        file.writelines(lines)\n'
MEASURES = {"value": "activation", "surprise": "surprise", "effect": "loss effect"}
EFFECTS = 20
ORDER = ["feature", "at", "value", "effect", "effect on next", "fires on", "surprise", "relative", "density", "label"]

place = shell.place()
opened = shell.opened() if place.store is not None else None
store = opened.store if opened else None

st.title("Prompt")
two = st.toggle("compare two texts", key="two")
with st.form("prompt_form", border=False):
    cells = st.columns(2) if two else [st.container()]
    with cells[0]:
        text = st.text_area("Text", value=EXAMPLE, key="prompt_text", height=130)
    if two:
        with cells[1]:
            other = st.text_area("Second text", value=OTHER, key="second_text", height=130)
    if st.form_submit_button("Read it", icon=":material/play_arrow:", type="primary"):
        with shell.guarded():
            st.session_state.reading = (place.key, shell.live().read(text))
            st.session_state.second = shell.live().read(other) if two else None
            st.session_state.pop("effects", None)
            st.session_state.pop("token", None)
if st.session_state.get("reading", ("", None))[0] != place.key:
    st.info("The model reads the text on this machine. It is loaded on the first use and kept.")
    st.stop()
reading = st.session_state.reading[1]
live = shell.live()


def side_by_side(first, second):
    """Draw two prompts in the colours of the feature that differs most, or of the one clicked."""
    with shell.guarded():
        frame = live.compare(first, second, store)
    if not len(frame):
        st.info("No feature fires in either text.")
        return
    if opened is not None:
        frame = with_descriptions(opened, frame)
    st.subheader("Features that differ most")
    number = st.column_config.NumberColumn
    event = st.dataframe(
        frame,
        key="compare_table",
        hide_index=True,
        on_select="rerun",
        selection_mode="single-cell",
        width="stretch",
        height=380,
        column_config={
            "first": number("in the first", format="%.3f", help="Largest activation in the text."),
            "second": number("in the second", format="%.3f", help="Largest activation in the text."),
            "difference": number("second - first", format="%+.3f"),
            "relative": number("of max", format="percent", help="Difference over the feature's largest in the store."),
        },
    )
    cells = event["selection"]["cells"]
    feature = int(frame["feature"].iloc[cells[0][0] if cells else 0])
    st.caption("Click a row to colour both texts by its feature.")
    top = (
        float(store.column("max")[feature]) if store else max(float(r.feature(feature).max()) for r in (first, second))
    )
    for cell, name, reading in zip(st.columns(2, gap="large"), ("First", "Second"), (first, second), strict=True):
        with cell:
            st.subheader(f"{name} text: feature {feature}")
            shell.html(live.feature_html(reading, feature, top or None))
            losses = reading.loss[~np.isnan(reading.loss)]
            said = f"{losses.mean():.3f} nats per token; " if len(losses) else ""
            st.caption(f"{said}{reading.code.nnz / max(int(reading.keep.sum()), 1):.1f} active features per token.")
    if store is not None and st.button(f"Open feature {feature}", icon=":material/arrow_forward:", key="open_compared"):
        shell.open_feature(feature)


second = st.session_state.get("second")
if two and second is not None:
    side_by_side(reading, second)
    st.stop()
texts = live.texts(reading)

losses = reading.loss[~np.isnan(reading.loss)]
facts = {
    "tokens": f"{len(texts):,}",
    "loss per token": f"{losses.mean():.3f} nats" if len(losses) else "-",
    "active per token": f"{reading.code.nnz / max(int(reading.keep.sum()), 1):.1f}",
    "left unexplained": f"{np.nanmean(reading.unexplained):.1%}" if reading.keep.any() else "-",
}
shell.metrics({name: (value, None) for name, value in facts.items()})

st.subheader("A token, or the whole prompt")
token = st.pills(
    "Token",
    range(len(texts)),
    format_func=lambda k: shell.plain(texts[k].replace(" ", "␣")),
    key="token",
    label_visibility="collapsed",
)
by, effect = st.columns([2, 2], vertical_alignment="bottom")
options = ["value", "surprise"] if store is not None else ["value"]
if st.session_state.get("with_effect"):
    options.append("effect")
if st.session_state.get("measure") not in (None, *options):
    st.session_state.measure = "value"
measure = by.segmented_control(
    "Strongest by",
    options,
    default="value",
    format_func=MEASURES.get,
    key="measure",
    help="Surprise: activation as a share of the feature's maximum, times minus log2 of its density, in bits.",
)
with_effect = effect.toggle(
    "loss effect",
    key="with_effect",
    help=f"Runs the model once for each of the first {EFFECTS} features, that feature taken out of the whole text.",
)
with shell.guarded():
    # Loss effects are measured for the strongest by activation.
    frame = live.features(reading, store, token, "value" if measure in (None, "effect") else measure)
if not len(frame):
    st.info("No feature fires here; special tokens such as BOS are not encoded.")
    st.stop()
frame.insert(2, "at", [f"{k}: {texts[k]}" for k in frame["position"]])
if opened is not None:
    frame = with_descriptions(opened, frame)
    frame["density"] *= 100
if with_effect:
    some = frame["feature"].head(EFFECTS).tolist()
    with shell.guarded(), st.spinner("Taking features out, one at a time …"):
        changes = live.loss_effects(reading, some)
    st.session_state.effects = dict(zip(some, changes, strict=True))
    total = {i: float(np.nansum(change)) for i, change in st.session_state.effects.items()}
    frame["effect"] = frame["feature"].map(total)
    if token is not None:
        following = token + 1
        alone = {i: float(c[following]) if following < len(c) else np.nan for i, c in st.session_state.effects.items()}
        frame["effect on next"] = frame["feature"].map(alone)

    if measure == "effect":
        order = "effect" if token is None else "effect on next"
        frame = frame.sort_values(order, ascending=False, kind="stable").reset_index(drop=True)

table, view = st.columns([1.15, 1], gap="large")
with table:
    where = "the prompt" if token is None else f"token {token}"
    st.subheader(f"Features of {where}")
    number = st.column_config.NumberColumn
    event = st.dataframe(
        frame,
        key="prompt_table",
        column_order=[name for name in ORDER if name in frame],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-cell",
        width="stretch",
        height=460,
        column_config={
            "value": number("activation", format="%.3f"),
            "relative": number(
                "of max", format="percent", help="Share of the feature's largest activation in the store."
            ),
            "surprise": number("surprise", format="%.2f bits"),
            "density": number("density", format="%.3g%%"),
            "effect": number("effect", format="%+.4f", help="Rise of the summed loss (nats) without it."),
            "effect on next": number(format="%+.4f", help="Rise of the next token's loss (nats) without it."),
        },
    )
    cells = event["selection"]["cells"]
    feature = int(frame["feature"].iloc[cells[0][0] if cells else 0])
    st.caption("Click a row to colour the text by its feature.")
with view:
    st.subheader("The text")
    what = st.segmented_control(
        "Colour by", ["feature", "effect", "error"], default="feature", key="colour_by", label_visibility="collapsed",
        format_func={"feature": f"feature {feature}", "effect": "its loss effect", "error": "what the SAE misses"}.get,
    )  # fmt: skip
    with shell.guarded():
        if what == "error":
            shell.html(live.unexplained_html(reading))
        elif what == "effect":
            change = st.session_state.get("effects", {}).get(feature)
            if change is None:
                change = live.loss_effects(reading, [feature])[0]
            shell.html(live.signed_html(reading, change, f"rise of the loss (nats) without feature {feature}"))
        else:
            shell.html(live.feature_html(reading, feature, float(store.column("max")[feature]) if store else None))
    if store is not None and st.button(f"Open feature {feature}", icon=":material/arrow_forward:", key="open"):
        shell.open_feature(feature)
    st.subheader("Loss of each token")
    shell.chart(figures.prompt_loss(reading.loss, texts)[0], "losses")
