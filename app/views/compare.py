"""Compare: evaluations of several SAEs side by side, and the features of two SAEs matched."""

import shell
import streamlit as st

from saelab.analysis import figures
from saelab.analysis.compare.folder import load_comparison
from saelab.analysis.compare.report import TITLES, summary_rows
from saelab.workflows.browse import COMPARISON, EVALUATION, METRICS, stamp
from saelab.workflows.results import evaluation_frame, matched_frame, place_named, short, split_frame

QUALITY = {
    "fvu": ("FVU", True),
    "ce_recovered": ("CE recovered", False),
    "cosine": ("cosine", False),
    "dead_fraction": ("share of dead features", True),
}
PAIR = {
    "correlation": "Of the two activations over all tokens.",
    "either": "Correlation over the tokens on which at least one of the two is active.",
    "jaccard": "Tokens on which both are active over tokens on which at least one is.",
    "cosine": "Of the two decoder rows.",
}


@st.cache_resource(max_entries=4, show_spinner="Reading the comparison …")
def comparison_in(folder, changed):
    """Return a saved comparison; ``changed`` makes a new one in the same folder count as another."""
    return load_comparison(folder)


st.title("Compare")
st.subheader("Evaluations")
with shell.guarded():
    frame, problems = evaluation_frame(shell.results(EVALUATION))
for problem in problems:
    st.error(shell.plain(problem), icon=":material/error:")
if not len(frame):
    st.info("No evaluation in the folders given. Each SAE gets one by:")
    st.code("saelab eval PATH/TO/SAE --out PATH/TO/SAE-evaluation", language="bash")
else:
    y = st.segmented_control(
        "Quality", list(QUALITY), default="fvu", required=True, format_func=lambda n: QUALITY[n][0], key="quality",
        label_visibility="collapsed",
    )  # fmt: skip
    title, low = QUALITY[y]
    drawn, ranked = figures.pareto(frame, y, title, low_is_good=low)
    shell.chart(drawn, "pareto")
    if ranked["front"].sum() > 1:
        st.caption(shell.plain(f"Dotted: what no other beats in both L0 and {title}."))
    number = st.column_config.NumberColumn
    formats = {
        name: number(text, help=meaning, format="%.4g") for name, (text, meaning) in METRICS.items() if name in frame
    }
    for name in ("dead_fraction", "dense_fraction"):
        formats[name] = number(METRICS[name][0], help=METRICS[name][1], format="percent")
    st.dataframe(ranked.drop(columns="front"), hide_index=True, width="stretch", column_config=formats)
    if frame[["model", "site", "text"]].drop_duplicates().shape[0] > 1:
        st.warning("These evaluations are not of one model, site and text: their numbers do not compare.")

st.subheader("Two SAEs, feature by feature")
found = shell.results(COMPARISON)
if not found:
    saes = [place.sae for place in shell.library().places if place.sae is not None]
    a, b = [*map(str, saes[:2]), "PATH/TO/A", "PATH/TO/B"][:2] if len(saes) > 1 else ("PATH/TO/A", "PATH/TO/B")
    st.info("No comparison in the folders given. This makes one:")
    st.code(f"saelab compare {a} {b} --out comparison", language="bash")
    st.stop()
folder = shell.choose_result(found, "comparison")
with shell.guarded():
    result = comparison_in(folder, stamp(folder))
sides = {"a": result.a, "b": result.b}
places = {side: place_named(shell.library(), info.name) for side, info in sides.items()}
st.caption(
    shell.plain(
        f"A: {result.a.name}, {result.a.n_features:,} features. B: {result.b.name}, {result.b.n_features:,} features. "
        f"{result.n_tokens:,} tokens{' of ' + result.text if result.text else ''}. Folder: {short(folder)}."
    )
)
numbers, pairs = st.columns([1, 1.2], gap="large")
with numbers:
    st.markdown("**Numbers, and what chance gives**")
    rows = summary_rows(result)
    texts = {
        "": [what for what, _, _ in rows],
        "value": [f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for _, value, _ in rows],
        "by chance": ["" if chance is None else f"{chance:.4g}" for *_, chance in rows],
    }
    st.dataframe(texts, hide_index=True, width="stretch", height=min(420, 36 * (len(rows) + 1)))
    for reason in result.skipped:
        st.caption(shell.plain(f"Not compared: {reason}"))


def linked(frame, columns, key):
    """Show a table; clicking a feature number opens it in the SAE that the column is of, where that is open here."""
    config = {name: st.column_config.NumberColumn(help=text, format="%.4f") for name, text in PAIR.items()}
    event = st.dataframe(
        frame, key=key, hide_index=True, on_select="rerun", selection_mode="single-cell", width="stretch", height=420,
        column_config=config,
    )  # fmt: skip
    cells = event["selection"]["cells"]
    if cells:
        row, column = cells[0]
        where = places.get(columns.get(column, ""))
        if where is not None and where.store is not None:
            shell.open_feature(int(frame[column].iloc[row]), where.key)
        elif column in columns:
            st.info("That SAE's feature store is not among the folders given, so its features cannot be opened.")


with pairs:
    st.markdown("**Matched features**, one to one, the most alike first")
    linked(matched_frame(result), {"a": "a", "b": "b"}, "matched")
if result.splitting is not None:
    small = result.splitting.small
    large = "b" if small == "a" else "a"
    st.markdown(f"**Split features**: of {small.upper()}, and their parts in {large.upper()}")
    splits = split_frame(result)
    if len(splits):
        linked(splits, {"feature": small}, "splits")
    else:
        st.caption("None: no feature of the smaller SAE is better written by several of the larger one.")
drawn = result.figures()
for k, (name, (figure, _)) in enumerate(drawn.items()):
    if k % 2 == 0:
        cells = st.columns(2, gap="large")
    with cells[k % 2]:
        title, meaning = TITLES.get(name, (name, ""))
        st.subheader(title)
        shell.chart(figure, f"compare_{name}")
        st.caption(shell.plain(meaning))
