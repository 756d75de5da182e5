"""``saelab eval``: how well an SAE reconstructs, and what that costs the model."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option
from saelab.core.errors import UsageError

if TYPE_CHECKING:
    from saelab.analysis.saebench import FullEvaluation
    from saelab.workflows.evaluate import EvaluateJob


def _evaluate(  # noqa: PLR0917  click gives them by name
    job: "EvaluateJob",
    out: str | None,
    force: bool,
    as_json: bool,
    full: bool = False,
    evals: str | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> None:
    import saelab
    from saelab.cli import console

    if full:
        with console.quiet_if(as_json):
            result = saelab.evaluate(job, full=True, out=out, force=force, evals=evals, labels=labels, seed=seed)
        if as_json:
            click.echo(json.dumps(result.to_dict()))
        else:
            print_full(result)
        return
    if evals is not None or labels is not None:
        raise UsageError("--evals and --labels belong to the full evaluation; add --full")

    with console.quiet_if(as_json):
        evaluation = saelab.evaluate(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(evaluation.to_dict()))
    else:
        console.out.print(console.evaluation_table(evaluation))


def print_full(result: "FullEvaluation") -> None:
    """Print the headline metrics with their controls, marked where a control matches, and what was skipped."""
    import math

    from rich.table import Table

    from saelab.cli import console

    def number(value: float) -> str:
        return "" if not math.isfinite(value) else console.format_value(value)

    table = Table(box=None, title="SAEBench, offline", title_justify="left", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    for name in ("SAE", "untrained", "shuffled"):
        table.add_column(name, justify="right")
    table.add_column("matched by", style="yellow")
    shown = ""
    for row in result.to_frame().to_dict("records"):
        if row["eval"] != shown:
            shown = str(row["eval"])
            table.add_row(shown, style="bold")
        values = [number(row.get(name, math.nan)) for name in ("sae", "untrained", "shuffled")]
        low = " (low is good)" if row["better"] == "lower" else ""
        table.add_row(f"  {row['metric']}{low}", *values, str(row["matched_by"]))
    console.out.print(table)
    for name, found in result.evals.items():
        if found.skipped:
            console.say(f"{name} skipped: {found.skipped}")


command = config_command(
    "eval",
    "saelab.workflows.evaluate:EvaluateJob",
    _evaluate,
    positional="sae",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the evaluation to this folder."),
        force_option(),
        json_option(),
        click.Option(["--full"], is_flag=True, help="SAEBench's offline evaluations, each beside its controls."),
        click.Option(["--evals"], metavar="A,B", help="With --full: only these evaluations."),
        click.Option(["--labels"], metavar="FILE", help='With --full: JSONL of {"text", "label"} to probe as well.'),
        click.Option(["--seed"], type=click.IntRange(0), default=0, help="With --full: seed.  [default: 0]"),
    ],
    help_text="Evaluate the SAE in folder SAE on held-out text.",
)
