"""Overview: what the SAE is, how good it is, and what its features look like as a whole."""

import numpy as np
import shell
import streamlit as st

from saelab.analysis import figures
from saelab.features.figures import density_histogram
from saelab.features.table import sortable
from saelab.workflows.browse import MEANING, METRICS, card, load_evaluation_of, stamp
from saelab.workflows.directions import decoder_plane, keep_map, load_map, tsne_map
from saelab.workflows.runs import read_log

CURVES = {"fvu": "FVU", "loss": "loss", "l0": "L0", "dead_fraction": "dead features"}
NUMBERS_OF_THINGS = ("nearest", "top_token", "dead")


@st.cache_resource(max_entries=4, show_spinner=False)
def layout(sae, changed, _store):
    """Return the t-SNE map: the kept one, else made now and kept."""
    found = load_map(_store)
    if found is None:
        with st.spinner("Laying the directions out by t-SNE; this happens once and takes up to a minute …"):
            found = tsne_map(sae, _store)
        keep_map(_store, found)
    return found


def colouring(store, name):
    """Return a column's values for colour and what the scale is called; those over many decades as log10."""
    values = np.asarray(store.column(name), np.float64)
    title = name.replace("_", " ")
    positive = values[values > 0]
    if (
        len(positive)
        and float(positive.max() / np.quantile(positive, 0.01)) > 100
        and not (values[np.isfinite(values)] < 0).any()
    ):
        return np.log10(np.maximum(values, float(positive.min()) / 2)), f"log10 {title}"
    return values, title


@st.fragment
def directions_map(place, store):
    """Draw the map of the directions; changing it draws nothing else anew."""
    how, by = st.columns([1, 1.4], vertical_alignment="bottom")
    method = how.segmented_control(
        "Map", ["PCA", "t-SNE"], default="PCA", required=True, key="map_method",
        help="PCA: the two main axes. t-SNE: neighbours lie together; distances between groups mean little.",
    )  # fmt: skip
    names = [name for name in sortable(store) if name not in NUMBERS_OF_THINGS]
    name = by.selectbox(
        "Colour", names, index=names.index("density"), key="hue", format_func=lambda n: n.replace("_", " ")
    )
    with shell.guarded():
        changed = stamp(place.sae)
        found = decoder_plane(place.sae, changed) if method == "PCA" else layout(place.sae, changed, store)
    colour, title = colouring(store, name)
    names = ("axis 1", "axis 2") if method == "PCA" else ("t-SNE 1", "t-SNE 2")
    figure, drawn = figures.feature_scatter(
        found.points[:, 0],
        found.points[:, 1],
        x_title=names[0],
        y_title=names[1],
        colour=colour[found.features],
        colour_title=title,
        features=found.features,
        equal=True,
    )
    shell.chart(figure, "map", clickable=True)
    what = "on their two main axes" if method == "PCA" else "laid out by t-SNE (live features only)"
    st.caption(
        shell.plain(f"Unit decoder directions {what}; {len(drawn):,} of {store.n_features:,} drawn. ")
        + shell.plain(f"Colour: {MEANING.get(name, title)} Click a point to open its feature.")
    )


place = shell.place()
st.title("Overview")
for problem in shell.library().problems:
    st.warning(shell.plain(problem), icon=":material/warning:")
with shell.guarded():
    evaluation = load_evaluation_of(place)
opened = shell.opened() if place.store is not None else None
store = opened.store if opened else None
with shell.guarded():
    about = card(place, store)

if evaluation is None:
    st.info("This SAE has not been evaluated on held-out text. This does it:")
    st.code(f"saelab eval {place.sae or 'PATH/TO/SAE'} --out evaluation", language="bash")
else:
    values = {}
    for name, (title, meaning) in METRICS.items():
        value = getattr(evaluation, name)
        values[title] = (f"{value:.1%}" if name in ("dead_fraction", "dense_fraction") else f"{value:.4g}", meaning)
    shell.metrics(values)
    kind = "training tokens, not held out," if evaluation.training_text else "held-out tokens"
    st.caption(
        shell.plain(f"Over {evaluation.n_tokens:,} {kind} of {evaluation.source}. Point at a name for its meaning.")
    )

if store is not None:
    density, maximum = np.asarray(store.column("density")), np.asarray(store.column("max"))
    left, right = st.columns(2)
    with left:
        st.subheader("How often features fire")
        shell.chart(density_histogram(density)[0], "density")
        dead, dense = int((density == 0).sum()), int((density > 0.1).sum())
        st.caption(
            f"{store.n_features:,} features; {dead:,} never fire on this text (not drawn), {dense:,} fire on more than "
            f"10\u00a0% of the tokens."
        )
    with right:
        st.subheader("How often, and how strongly")
        scatter, drawn = figures.feature_scatter(
            density, maximum, x_title="density", y_title="max activation", log_x=True
        )
        scatter.update_layout(height=280)
        shell.chart(scatter, "density_max", clickable=True)
        st.caption(f"{len(drawn):,} of {int((density > 0).sum()):,} live features. Click a point to open its feature.")

left, right = st.columns(2)
with left:
    st.subheader("Training")
    if place.log is None:
        st.caption("No training log beside this SAE; saelab train writes one.")
    else:
        log = read_log(place.log)
        metric = st.segmented_control(
            "Metric", list(CURVES), default="fvu", required=True, format_func=CURVES.get, key="curve",
            label_visibility="collapsed",
        )  # fmt: skip
        shell.chart(figures.training_curves({place.key: log}, metric, CURVES[metric])[0], "curves")
    if evaluation is not None:
        st.subheader("Active features per token")
        numbers = [k for k, count in enumerate(evaluation.l0_counts) if count]
        if len(numbers) == 1:
            st.caption(f"Exactly {numbers[0]} on every token.")
        else:
            shell.chart(figures.counts_per_token(evaluation.l0_counts)[0], "l0")
with right:
    st.subheader("Map of the directions")
    if place.sae is None or store is None:
        st.caption("Needs the SAE folder beside its feature store.")
    else:
        directions_map(place, store)

st.subheader("What it is")
rows = {"what": list(about), "value": [shell.plain(value) for value in about.values()]}
st.table(rows, hide_header=True, hide_index=True, border="horizontal")
