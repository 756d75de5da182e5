"""Train: running and finished trainings, their curves, and the command that makes each again."""

import pandas as pd
import shell
import streamlit as st

from saelab.analysis import figures
from saelab.workflows.runs import read_log, run_state

METRICS = {
    "fvu": "FVU",
    "loss": "loss",
    "l0": "L0",
    "dead_fraction": "dead features",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
MOST = 40
ICONS = {"finished": "✓ finished", "running": "▶ running", "stopped": "■ stopped"}

st.title("Train")
logs = shell.library().logs
if not logs:
    st.info("No training log in the folders given. Training writes one:")
    st.code(
        "saelab train configs/demo-topk.yaml --store PATH/TO/STORE --out runs/demo\nsaelab app runs/demo",
        language="bash",
    )
    st.stop()
if len(logs) > MOST:
    st.caption(f"The {MOST} of {len(logs)} trainings written to last.")
frames = {log: read_log(log) for log in logs[:MOST]}
states = {log: run_state(log, frame) for log, frame in frames.items()}
going = any(state.status == "running" for state in states.values())


@st.fragment(run_every=5 if going else None)
def watch():
    """Draw the table and the curves; while something runs, every five seconds anew."""
    frames = {log: read_log(log) for log in logs[:MOST]}
    states = {log: run_state(log, frame) for log, frame in frames.items()}
    rows = []
    for log, state in states.items():
        last = frames[log].iloc[-1].to_dict() if len(frames[log]) else {}
        done = 100 * state.steps / state.total if state.total else None
        rows.append(
            {"run": state.name, "status": ICONS[state.status], "done": done, "step": state.steps}
            | {name: last.get(name) for name in ("fvu", "l0", "dead_fraction", "tokens_per_second")}
        )
    number = st.column_config.NumberColumn
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        column_config={
            "done": st.column_config.ProgressColumn("done", min_value=0, max_value=100, format="%.0f%%"),
            "fvu": number("FVU", format="%.4f", help="Fraction of variance unexplained, on the training text."),
            "l0": number("L0", format="%.1f", help="Active features per token."),
            "dead_fraction": number("dead", format="percent"),
            "tokens_per_second": number("tokens/s", format="%.0f"),
        },
    )
    named = {state.name: frames[log] for log, state in states.items()}
    chosen = st.multiselect("Runs drawn", list(named), default=list(named)[:6], key="runs")
    cells = st.columns(2)
    for k, (metric, title) in enumerate(METRICS.items()):
        with cells[k % 2]:
            st.subheader(title)
            figure, frame = figures.training_curves({name: named[name] for name in chosen}, metric, title)
            if len(frame):
                shell.chart(figure, f"curve_{metric}")
            else:
                st.caption("Not in the logs chosen.")


watch()
st.subheader("Make it again")
log = st.selectbox("Run", list(states), format_func=lambda log: states[log].name, key="run")
state = states[log]
st.code(state.command, language="bash", wrap_lines=True)
if state.config:
    with st.expander("config.yaml, every key resolved"):
        st.code(state.config, language="yaml")
