"""Tables and notes of the command line, in one look."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from saelab.core.progress import set_progress

if TYPE_CHECKING:
    import pandas as pd

    from saelab.analysis.evaluation import Evaluation
    from saelab.workflows.demo import DemoResult
    from saelab.workflows.show import FeatureCard

# Without emoji: "stdlib:train: ..." is no tram.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def say(text: str) -> None:
    """Write a note for the person at the terminal (standard error, so that pipes see results only)."""
    # No line breaks of our own: a command that is broken over two lines cannot be copied.
    err.print(text, style="dim", markup=False, soft_wrap=True)


@contextmanager
def quiet_if(quiet: bool) -> Iterator[None]:
    """Switch the progress bars off while machine-readable output is being made."""
    if quiet:
        set_progress(False)
    yield


def key_value_table(title: str, values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> Table:
    """A two-column table, with an optional third column saying what a value means."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right")
    if notes:
        table.add_column(style="dim")
    for key, value in values.items():
        cells = [key, format_value(value)]
        table.add_row(*cells, *([notes.get(key, "")] if notes else []))
    return table


def frame_table(title: str, frame: "pd.DataFrame", limit: int = 60) -> Table:
    """A frame as a table, numbers to the right; of a long one the first ``limit`` rows."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    from pandas import isna
    from pandas.api.types import is_numeric_dtype

    for name, kind in frame.dtypes.items():
        table.add_column(str(name).replace("_", " "), justify="right" if is_numeric_dtype(kind) else "left")
    for row in frame.head(limit).itertuples(index=False):
        table.add_row(*("" if isna(value) else format_value(value) for value in row))
    if len(frame) > limit:
        table.caption = f"{len(frame) - limit:,} more rows"
    return table


def format_value(value: Any) -> str:
    """A number with four significant digits, mappings and lists with commas; everything else as it is."""
    if isinstance(value, Mapping):
        named = ((key, format_value(inner), isinstance(inner, Mapping)) for key, inner in value.items())
        return ", ".join(text if nested else f"{key} {text}" for key, text, nested in named)
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"


NOTES = {
    "FVU": "fraction of variance unexplained: 0 perfect, 1 = predicting the mean",
    "L0": "features per token",
    "FVU as trained": "with features chosen as training does (over a batch, or by gradient)",
    "L0 as trained": "features per token of that choice",
    "CE recovered by gradient": "the choice sees the next token: flattered",
    "CE recovered": "(CE zero - CE SAE) / (CE zero - CE clean)",
    "CE clean": "next-token loss (nats) of the model as it is",
    "CE SAE": "with the activation replaced by its reconstruction",
    "CE zero": "replaced by zeros",
    "CE mean": "replaced by its mean",
    "KL": "clean model || spliced model, nats",
    "dead": "features that never fired on these tokens",
    "dense": "features on more than 10 % of tokens",
}


def _trained_rows(e: "Evaluation") -> dict[str, Any]:
    """The rows about the code as training chooses it, where that is another than the code of inference."""
    if not e.trained_tokens or (e.l0_trained == e.l0 and abs(e.fvu_trained - e.fvu) < 1e-3 * e.fvu):
        return {}
    rows: dict[str, Any] = {"FVU as trained": e.fvu_trained, "L0 as trained": e.l0_trained}
    if e.ce_recovered_trained == e.ce_recovered_trained:
        rows["CE recovered by gradient"] = e.ce_recovered_trained
    return rows


def evaluation_table(evaluation: "Evaluation") -> Table:
    """The table of ``saelab eval`` and of the demo."""
    e = evaluation
    title = "evaluation on the training text, NOT held out" if e.training_text else "held-out evaluation"
    values = {
        "FVU": e.fvu,
        "L0": e.l0,
        **_trained_rows(e),
        "CE recovered": e.ce_recovered,
        "CE clean": e.ce_clean,
        "CE SAE": e.ce_sae,
        "CE zero": e.ce_zero,
        "CE mean": e.ce_mean,
        "KL": e.kl_sae,
        "cosine": e.cosine,
        "dead": f"{e.dead_fraction:.2%}",
        "dense": f"{e.dense_fraction:.2%}",
        "tokens": e.n_tokens,
    }
    site = f"{e.site} -> {e.target_site}" if e.target_site else e.site
    return key_value_table(f"{title}: {e.sae} d_in {e.d_in} d_sae {e.d_sae}, {site} of {e.model}", values, NOTES)


def print_demo(result: "DemoResult") -> None:
    """The end of ``saelab demo``: numbers, speeds, three features, and what to type next."""
    from saelab.workflows.show import example_features, feature_cards

    out.print(evaluation_table(result.evaluation))
    speeds = Table(box=None, title="speed", title_justify="left", padding=(0, 2, 0, 0))
    for name in ("stage", "tokens", "seconds", "tokens/s"):
        speeds.add_column(
            name, justify="left" if name == "stage" else "right", style="cyan" if name == "stage" else None
        )
    for stage, seconds in result.seconds.items():
        tokens = result.tokens[stage]
        speeds.add_row(stage, f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}")
    out.print()
    out.print(speeds)
    for card in feature_cards(result.paths["features"], example_features(result.features), 5):
        print_feature(card)
    out.print()
    out.print("next:", style="bold")
    features, sae = result.paths["features"], result.paths["sae"]
    for line in (
        f"saelab app {Path(features).parent}",
        f"saelab show {features} --feature 123 --contexts 12",
        f"saelab eval {sae} --text PATH/TO/YOUR/CODE --max_tokens 20000",
        f"saelab train configs/demo-topk.yaml --store {result.paths['store']} --sae.k 16 --out runs/k16",
        "saelab sites embedded",
    ):
        out.print(f"  {line}", markup=False, soft_wrap=True)


def print_feature(card: "FeatureCard") -> None:
    """One feature: its summary line, the tokens it speaks for, and its top contexts in colour."""
    from saelab.features.render import fit_context, render_context

    out.print()
    out.print(f"feature {card.index}", style="bold", end="  ")
    out.print(f"on {card.density:.3%} of tokens, max {card.max:.3g}", style="dim")
    if card.promotes:
        out.print("  promotes ", *(repr(token) for token in card.promotes), style="green", markup=False)
    for context in card.contexts:
        out.print(" ", render_context(fit_context(context, out.width - 4), card.max))
