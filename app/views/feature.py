"""Feature: everything known about one feature, and what people write about it."""

import numpy as np
import shell
import streamlit as st

from saelab.features.html import bars_html, contexts_html, interval_html, legend_html, spread, weights_html
from saelab.workflows.browse import MEANING, distinct_contexts, stamp, with_descriptions
from saelab.workflows.directions import nearest_features

opened = shell.opened()
store = opened.store


def chosen():
    """Return the feature of the link, else the one looked at last, else the one that fires most."""
    wanted = st.query_params.get("feature")
    if wanted is not None and wanted.isdecimal() and int(wanted) < store.n_features:
        return int(wanted)
    if wanted is not None:
        st.warning(shell.plain(f"There is no feature {wanted}; this SAE has features 0 to {store.n_features - 1}."))
    return int(st.session_state.get("feature", int(np.argmax(store.column("density")))))


def move(target):
    """Show another feature."""
    st.query_params.feature = str(target)
    st.session_state.feature = int(target)


def typed():
    """Show the feature whose number was typed."""
    if st.session_state.number is not None:
        move(st.session_state.number)


i = min(chosen(), store.n_features - 1)
st.session_state.feature = i
st.query_params.update({"feature": str(i), "store": opened.place.key})
with shell.guarded():
    note = opened.notes.of(i)

# previous and next follow the selection of the table of features, if this feature is in it ---------------------------
walk = st.session_state.get("walk")
at = np.flatnonzero(walk == i) if walk is not None else np.zeros(0, np.int64)
if len(at):
    before = int(walk[at[0] - 1]) if at[0] > 0 else None
    after = int(walk[at[0] + 1]) if at[0] + 1 < len(walk) else None
    where = f"{at[0] + 1:,} of {len(walk):,} in the selection"
else:
    before, after = (i - 1 if i > 0 else None), (i + 1 if i + 1 < store.n_features else None)
    where = f"of {store.n_features:,}"
heading, controls = st.columns([1, 1], vertical_alignment="bottom")
heading.title(f"Feature {i}")
heading.caption(shell.plain(f"{note.label or 'no label yet'} · {where}"))
st.session_state.number = i
with controls, st.container(horizontal=True, horizontal_alignment="right", gap="small"):
    left, right = {"shortcut": "Left", "disabled": before is None}, {"shortcut": "Right", "disabled": after is None}
    st.button("", key="back", icon=":material/chevron_left:", on_click=move, args=(before,), width=64, **left)
    top = store.n_features - 1
    st.number_input("Go to", 0, top, key="number", on_change=typed, label_visibility="collapsed", width=118)
    st.button("", key="on", icon=":material/chevron_right:", on_click=move, args=(after,), width=64, **right)
    if st.button("★" if note.star else "☆", help="Star this feature", key="star", width=56):
        with shell.guarded():
            opened.notes.save(i, label=note.label, note=note.note, star=not note.star)
        st.rerun()

density, maximum = float(store.column("density")[i]), float(store.column("max")[i])
facts = {
    "density": f"{density:.3%}",
    "count": f"{int(store.column('count')[i]):,}",
    "max": f"{maximum:.4g}",
    "mean": f"{float(store.column('mean')[i]):.4g}",
    "rows": f"{int(store.column('rows')[i]):,}",
    "token_entropy": f"{float(store.column('token_entropy')[i]):.3g}",
    "encoder_decoder_cosine": f"{float(store.column('encoder_decoder_cosine')[i]):.3f}",
}
TITLES = {"count": "tokens", "token_entropy": "entropy", "encoder_decoder_cosine": "read·write"}
shell.metrics({TITLES.get(name, name): (value, MEANING[name]) for name, value in facts.items()})
if density > 0.1:
    st.warning("Dense: it fires on more than 10 % of the tokens.", icon=":material/blur_on:")
if density == 0:
    st.info("Dead on this text: it never fires, so there are no activations to show.", icon=":material/block:")

if said := opened.said.explanations(features=[i]):
    for explanation in said:
        st.markdown(f"{shell.plain(explanation.text)} :gray[{shell.plain(explanation.author)}]")
if scores := opened.said.scores(features=[i], control=""):
    names = [(score, score.scorer.replace("_", " ")) for score in scores]
    own = ("", said and said[0].author)
    titles = {name if score.author in own else f"{name} ({score.author})": score for score, name in names}
    shell.metrics(
        {
            title: (f"{s.value:.3g}", f"{MEANING.get(s.scorer, '')} 95 %: {s.low:.3g} to {s.high:.3g}, n = {s.n:,}.")
            for title, s in titles.items()
        }
    )

side, main = st.columns([1, 2], gap="large")
with side:
    if density > 0:
        st.subheader("Activations")
        logarithmic = st.toggle("logarithmic counts", value=True, key="log_counts")
        shell.html(bars_html(store.histogram(i), "activation", "tokens", logarithmic=logarithmic))
        st.caption(f"The nonzero activations; {density:.3%} of {store.n_kept:,} tokens.")
    st.subheader("What it writes")
    if "logit_top_ids" not in store.columns:
        st.caption("This site is not in the residual stream: its features have no direct effect on the logits.")
    else:
        ends = [store.column("logit_top")[i], store.column("logit_bottom")[i]]
        most = float(np.abs(ends).max())
        for cell, name, values in zip(st.columns(2), ("top", "bottom"), ends, strict=True):
            pieces = [store.vocabulary.bytes_of(int(t)) for t in store.column(f"logit_{name}_ids")[i]]
            with cell:
                shell.html(weights_html({"top": "raises", "bottom": "lowers"}[name], pieces, values, most))
        st.caption("Decoder direction · unembedding, final norm's weight folded in, its scale left out.")
        if st.toggle("logit histogram", key="logit_histogram", help="Over the whole vocabulary; loads the model."):
            with shell.guarded():
                weights = shell.live().logit_weights(i)
            if weights is not None:
                shell.html(bars_html(spread(weights), "logit weight", "vocabulary tokens", logarithmic=True))
    if st.button("Steer with this feature", icon=":material/tune:", key="to_steer"):
        st.session_state.steer_with = (i, maximum)
        st.switch_page(shell.STEER_PAGE)


@st.cache_resource(max_entries=32, show_spinner="Taking the feature out of each context …")
def context_effects(places, feature, n, width, distinct, _store, _engine, _contexts):
    """Return the loss effects of a feature in its contexts, which everything before the underscores determines."""
    return _engine.context_effects(_store, _contexts)


def top_contexts():
    """Draw the strongest contexts."""
    length, how_many, once = st.columns([2, 1, 1.4], vertical_alignment="bottom")
    width = length.select_slider("Tokens around the peak", [5, 10, 20, 40, 80, 160], 20, key="width")
    n = how_many.selectbox("Contexts", [10, 20, 50, 100], index=1, key="n_contexts")
    distinct = once.toggle("one per row of text", value=True, key="distinct")
    contexts, repeated = distinct_contexts(store, i, n, before=width, after=max(width // 2, 3), distinct_rows=distinct)
    if st.toggle(
        "loss effect", key="context_effects",
        help="How much each token's loss rises when the feature is taken out of the text. Runs the model twice for "
        "each context.",
    ):  # fmt: skip
        with shell.guarded():
            engine = shell.live()
            places = [(str(path), stamp(path)) for path in (opened.place.sae, opened.place.store)]
            effects = context_effects(places, i, n, width, distinct, store, engine, contexts)
        most = max((float(np.abs(np.nan_to_num(effect)).max()) for effect in effects), default=0.0) or 1.0
        label = f"rise of the loss (nats) without feature {i}"
        shell.html(legend_html(most, label, signed=True) + contexts_html(contexts, store.vocabulary, most, effects))
    else:
        shell.html(legend_html(maximum) + contexts_html(contexts, store.vocabulary, maximum))
    more = f" {repeated} with the same text are left out." if repeated else ""
    st.caption(f"Value at the underlined token, and row:position in the text.{more}")


def across_the_range():
    """Draw samples from each part of the range."""
    by, samples = st.columns([2, 1], vertical_alignment="bottom")
    kind = by.segmented_control(
        "Intervals", ["value", "quantile"], default="value", key="interval_kind",
        format_func={"value": "of equal width", "quantile": "of equal number"}.get,
    )  # fmt: skip
    each = samples.selectbox("Samples each", [3, 5, 10], index=1, key="per_interval")
    total = int(store.column("count")[i])
    width = st.session_state.get("width", 20)
    parts = store.interval_samples(i, 10, each, by=kind or "value", before=width, after=max(width // 2, 3))
    body = [interval_html(p, total) + contexts_html(p.contexts, store.vocabulary, maximum) for p in parts]
    shell.html(legend_html(maximum) + "".join(body))


def related():
    """Draw the tables of neighbours."""
    near, together = st.columns(2)
    with near:
        st.subheader("Nearest directions")
        with shell.guarded():
            frame = nearest_features(opened, i, 12)
        shell.feature_table(frame, "near", column_config={"cosine": st.column_config.NumberColumn(format="%.3f")})
    with together:
        st.subheader("Active together")
        frame = with_descriptions(opened, store.co_active(i, 12))
        formats = {
            "share": st.column_config.NumberColumn(format="percent", help="Of the tokens where this one fires."),
            "lift": st.column_config.NumberColumn(format="%.1f", help="share / the other's own density"),
            "jaccard": st.column_config.NumberColumn(format="%.3f", help="tokens with both / with either"),
            "together": None,
        }
        shell.feature_table(frame, "together", column_config=formats)
    st.caption("Click a cell to open that feature.")


def try_text():
    """Ask for a text and draw the feature in it."""
    with st.form("try", border=False):
        typed_text = st.text_area("Text", key="try_text", placeholder="def read(path):\n    return open(path).read()")
        go = st.form_submit_button("Show where it fires", icon=":material/play_arrow:")
    if go:
        with shell.guarded():
            engine = shell.live()
            shell.html(engine.feature_html(engine.read(typed_text), i, maximum or None))


def written():
    """Ask for a label and a note."""
    with st.form("note", border=False):
        label = st.text_input("Label", note.label, key=f"label_{i}", max_chars=200, placeholder="a few words")
        words = st.text_area("Note", note.note, key=f"note_{i}", max_chars=10_000)
        if st.form_submit_button("Save", icon=":material/save:", type="primary"):
            with shell.guarded():
                opened.notes.save(i, label=label, note=words, star=note.star)
            st.rerun()
        st.caption(shell.plain(f"Saved {note.changed}." if note.changed else f"Kept in {opened.notes.path}."))


PANES = {
    "Top contexts": top_contexts,
    "Across the range": across_the_range,
    "Related": related,
    "Try text": try_text,
    "Notes": written,
}
names = [name for name in PANES if density > 0 or name not in ("Top contexts", "Across the range")]
with main:
    # Only the open tab is drawn: what is not looked at costs nothing.
    for name, tab in zip(names, st.tabs(names, key="pane", on_change="rerun"), strict=True):
        if tab.open:
            with tab:
                PANES[name]()
