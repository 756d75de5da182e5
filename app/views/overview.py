"""Overview: what the SAE is, how good it is, and what its features look like as a whole."""

import numpy as np
import shell
import streamlit as st

from saelab.analysis import figures
from saelab.workflows.browse import METRICS, card, decoder_plane, load_evaluation_of, stamp
from saelab.workflows.runs import read_log

COLOURS = {"density": "log10 density", "max": "max activation", "token_entropy": "token entropy (nats)"}


@st.cache_data(max_entries=4, show_spinner="Projecting the decoder …")
def plane(sae, changed):
    """Return the directions on a plane; ``changed`` makes a new SAE in the same folder count as another."""
    return decoder_plane(sae)


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
    st.caption(
        shell.plain(
            f"Over {evaluation.n_tokens:,} held-out tokens of {evaluation.source}. Point at a name for its meaning."
        )
    )

if store is not None:
    density, maximum = np.asarray(store.column("density")), np.asarray(store.column("max"))
    left, right = st.columns(2)
    with left:
        st.subheader("How often features fire")
        shell.chart(figures.density_histogram(density)[0], "density")
        dead, dense = int((density == 0).sum()), int((density > 0.1).sum())
        st.caption(
            f"{store.n_features:,} features; {dead:,} never fire on this text (not drawn), {dense:,} fire on more than "
            f"10 % of the tokens."
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
            "Metric", ["fvu", "loss", "l0", "dead_fraction"], default="fvu", label_visibility="collapsed", key="curve"
        )
        shell.chart(figures.training_curves({place.key: log}, metric or "fvu", metric or "fvu")[0], "curves")
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
        name = st.segmented_control(
            "Colour", list(COLOURS), default="density", format_func=COLOURS.get, label_visibility="collapsed", key="hue"
        )
        name = name or "density"
        colour = np.asarray(store.column(name), np.float64)
        if name == "density":
            colour = np.log10(np.maximum(colour, 0.5 / store.n_kept))
        with shell.guarded():
            points = plane(place.sae, stamp(place.sae))
        figure, drawn = figures.feature_scatter(
            points[:, 0],
            points[:, 1],
            x_title="axis 1",
            y_title="axis 2",
            colour=colour,
            colour_title=COLOURS[name],
            equal=True,
        )
        shell.chart(figure, "map", clickable=True)
        st.caption(
            f"Unit decoder directions on their two main axes (PCA); {len(drawn):,} of {len(points):,} drawn. "
            "Click a point to open its feature."
        )

st.subheader("What it is")
rows = {"what": list(about), "value": [shell.plain(value) for value in about.values()]}
st.table(rows, hide_header=True, hide_index=True, border="horizontal")
