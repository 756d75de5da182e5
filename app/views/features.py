"""Features: the table of all of them, searched, filtered, sorted, a page at a time, and exported."""

import numpy as np
import shell
import streamlit as st

from saelab.core.errors import ConfigError
from saelab.features.table import Query, Range, choose, export, page, sortable
from saelab.workflows.browse import MEANING, SCORES, stamp
from saelab.workflows.directions import cosines, feature_direction, token_direction
from saelab.workflows.selection import MOST_FEATURES, neuronpedia_zip

SHOWN = ["density", "max", "mean", "rows", "token_entropy", "top_token_share", "nearest_cosine"]
KINDS = {"feature": "a feature's decoder", "unembedding": "a token's unembedding", "embedding": "a token's embedding"}
FORMATS = {
    "density": "%.4g%%",
    "count": "%d",
    "rows": "%d",
    "distinct_tokens": "%d",
    "nearest": "%d",
    "top_token": "%d",
}


def columns(names):
    """Say how each column is written and what it means."""
    shown = {
        name: st.column_config.NumberColumn(
            name.replace("_", " "), help=MEANING.get(name), format=FORMATS.get(name, "%.3g")
        )
        for name in names
        if name != "dead"
    }
    texts = {
        "fires on": "Most frequent token it fires on, and its share.",
        "promotes": "Tokens whose logit it raises most.",
    }
    shown |= {name: st.column_config.TextColumn(help=text, width="medium") for name, text in texts.items()}
    shown["star"] = st.column_config.TextColumn("★", width=40)
    shown["feature"] = st.column_config.NumberColumn(format="%d", width="small")
    return shown


@st.cache_resource(max_entries=16, show_spinner="Comparing directions …")
def cosine_column(sae, changed, kind, what):
    """Return the name and the numbers of a column: the cosine of every decoder row with a named direction."""
    if kind == "feature":
        if not what.strip().isdecimal():
            raise ConfigError(f"'{what}' is not the number of a feature; give one, such as 12")
        named = feature_direction(sae, int(what))
    else:
        named = token_direction(shell.live(), what, kind)
    return named.name, cosines(sae, named.vector)


def direction():
    """Ask for a direction; return it as further columns of the table."""
    sae = opened.place.sae
    if sae is None:
        st.caption("Cosines need the SAE folder, which was not found beside this store.")
        return {}
    to, what = st.columns([1, 2], vertical_alignment="bottom")
    kind = to.selectbox("Cosine to", list(KINDS), format_func=KINDS.get, key="direction_kind")
    help_text = "A feature's number, or a token exactly as it is, with its space; a token needs the model, loaded once."
    text = what.text_input("which", key="direction", placeholder="12" if kind == "feature" else " def", help=help_text)
    if not text:
        return {}
    with shell.guarded():
        name, values = cosine_column(sae, stamp(sae), kind, text)
    return {name: values}


def remember(names, extra):
    """Keep what was chosen as far as it is still there; a direction just typed becomes a column that is shown."""
    state = st.session_state
    default = [name for name in names if name in SCORES or name in SHOWN]
    new = [name for name in extra if name != state.get("direction_shown")]
    state.direction_shown = next(iter(extra), None)
    state.columns = [*new, *(name for name in state.get("columns", default) if name in names and name not in new)]
    state.filtered = [name for name in state.get("filtered", []) if name in names]
    if state.get("sort") not in ["feature", *names]:
        state.sort = "density"


st.title("Features")
opened = shell.opened()
store = opened.store
with st.expander("Compare with a direction", icon=":material/explore:"):
    extra = direction()
names = sortable(store, extra)
remember(names, extra)
with shell.guarded():
    notes = opened.notes.all()

with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
    text = st.text_input(
        "Search",
        key="search",
        placeholder="a feature's number, a token, or words of a label",
        help="Labels, notes, explanations, and tokens.",
    )
    sort_by = st.selectbox(
        "Sort by", ["feature", *names], key="sort", format_func=lambda n: n.replace("_", " "), width=190
    )
    descending = st.selectbox(
        "Order", [True, False], format_func={True: "largest first", False: "smallest first"}.get, key="order", width=150
    )
    starred = st.toggle("★ only", key="starred")

with st.expander("Filter by columns, choose columns"):
    filtered = st.multiselect("Filter by", names, key="filtered", format_func=lambda n: n.replace("_", " "))
    ranges = []
    for name in filtered:
        values = extra[name] if name in extra else store.column(name)
        title, low, high = st.columns([2, 2, 2], vertical_alignment="center")
        title.markdown(f"**{shell.plain(name.replace('_', ' '))}**  \n{shell.plain(MEANING.get(name, ''))}")
        least, most = float(np.nanmin(values)), float(np.nanmax(values))
        bounds = (
            low.number_input("at least", value=None, placeholder=f"{least:.4g}", format="%g", key=f"low_{name}"),
            high.number_input("at most", value=None, placeholder=f"{most:.4g}", format="%g", key=f"high_{name}"),
        )
        ranges.append(Range(name, *bounds))
    visible = st.multiselect("Columns", names, key="columns", format_func=lambda n: n.replace("_", " "))

query = Query(text, tuple(ranges), bool(starred), sort_by, bool(descending))
with shell.guarded():
    found = choose(store, query, notes, extra)
st.session_state.walk = found

if not len(found):
    st.info("No feature is like that. Clear the search or widen the filter.")
    st.stop()

with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
    per_page = st.selectbox("Rows", [25, 50, 100, 250], index=1, key="per_page", width=90)
    pages = -(-len(found) // per_page)
    if st.session_state.get("page_number", 1) > pages:
        st.session_state.page_number = 1
    shown = st.number_input("Page", 1, pages, key="page_number", width=120)
    first = (shown - 1) * per_page
    part = found[first : first + per_page]
    st.caption(
        f"{len(found):,} of {store.n_features:,} features; {first + 1:,} to {first + len(part):,} shown, "
        f"page {shown:,} of {pages:,}",
        width=230,
    )
    for form in ("csv", "jsonl"):
        st.download_button(
            form.upper(),
            data=lambda form=form: b"".join(export(store, found, notes, form, extra)),
            file_name=f"features.{form}",
            mime="text/csv" if form == "csv" else "application/x-ndjson",
            icon=":material/download:",
            help=f"All {len(found):,} features of the selection, every column.",
            on_click="ignore",
            key=f"export_{form}",
        )
    st.download_button(
        "Neuronpedia",
        data=lambda: neuronpedia_zip(store, found),
        file_name="neuronpedia.zip",
        mime="application/zip",
        icon=":material/download:",
        help=f"Contexts, histograms and explanations of the first {MOST_FEATURES:,} live features of the selection, as "
        "a Neuronpedia export; saelab explain export writes any number.",
        on_click="ignore",
        key="export_neuronpedia",
    )
frame = page(store, part, visible, notes, extra)
if "density" in frame:
    frame["density"] *= 100
configured = columns([*names])
# Columns of what people write take no room while nobody has written anything.
configured |= {name: None for name in ("star", "label") if name in frame and not frame[name].astype(bool).any()}
shell.feature_table(frame, "table", column_config=configured, height=min(36 * (len(frame) + 1), 900))
st.caption("Click any cell to open the feature. Previous and next on its page then follow this selection.")
