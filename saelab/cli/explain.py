"""``saelab explain``: explanations of features, their scores, and what the scores are worth."""

import json
from typing import TYPE_CHECKING, Any

import click

from saelab.cli.options import config_command, force_option, json_option, out_option

if TYPE_CHECKING:
    from saelab.analysis.autointerp.judge import Estimate
    from saelab.analysis.autointerp.report import ExplainReport
    from saelab.workflows.explain import ExplainJob, ExplainResult

HELP = """Explain the features of a store and score the explanations, beside controls.

\b
saelab explain STORE            token sets and all scores that need no language model
saelab explain STORE --judge.model NAME --judge.endpoint http://localhost:8000/v1
saelab explain report STORE     scores beside their controls
"""


WIDTH = 150
"""Columns of the report's table."""


class ExplainGroup(click.Group):
    """``saelab explain STORE`` is ``saelab explain run STORE``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take a first argument that is no command as the store of ``run``."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let options of ``run`` stand before the store (``saelab explain --config FILE``)."""
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("explain", cls=ExplainGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Explain features."""


def _run(job: "ExplainJob", dry: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli import console
    from saelab.workflows.explain import dry_run

    with console.quiet_if(as_json):
        if dry:
            _print_estimate(job, dry_run(job), as_json)
            return
        result = saelab.explain(job, say=(lambda text: None) if as_json else console.say)
    if as_json:
        click.echo(json.dumps(_plain(result.to_dict())))
        return
    print_result(result)


def print_result(result: "ExplainResult") -> None:
    """Print what a run did: the report, the time it took, the judge's bill."""
    from saelab.cli import console

    print_report(result.report)
    console.out.print()
    console.out.print(
        console.key_value_table("seconds", {name: f"{value:,.1f}" for name, value in result.seconds.items()})
    )
    usage = result.usage
    if usage.requests or usage.cached or usage.errors:
        about: dict[str, Any] = usage.to_dict()
        cost = about.pop("cost")
        about |= {"cost": f"${cost:,.2f}"} if cost is not None else {}
        prices = ("input_price", "output_price")
        console.out.print(console.key_value_table("judge", {k: v for k, v in about.items() if k not in prices}))
    for note in result.notes:
        console.say(f"note: {note}")
    console.say(f"{result.features:,} features; {result.left_out:,} left out (too few windows, or no negatives)")


def print_report(report: "ExplainReport") -> None:
    """Print scores, SAE and controls side by side."""
    from rich.console import Console
    from rich.table import Table

    from saelab.cli import console

    frame = report.side_by_side()
    table = Table(title="mean over features ± 95 %", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in frame.columns:
        table.add_column(name, justify="left" if name in ("author", "score") else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    # Nine columns do not fit 80 characters; a narrow terminal wraps the lines, a pipe gets them whole.
    Console(width=max(console.out.width, WIDTH), highlight=False).print(table)


def _print_estimate(job: "ExplainJob", estimate: "Estimate", as_json: bool) -> None:
    from saelab.analysis.autointerp.judge import as_dicts
    from saelab.cli import console

    cost = estimate.cost(job.judge.input_price, job.judge.output_price)
    numbers = {
        "requests": estimate.requests,
        "prompt_tokens": estimate.prompt_tokens,
        "completion_tokens": estimate.completion_tokens,
    }
    if as_json:
        click.echo(json.dumps({**numbers, "cost": cost, "example": as_dicts(estimate.example)}))
        return
    money = f"${cost:,.2f}" if cost is not None else "give --judge.input_price and --judge.output_price"
    console.out.print(console.key_value_table("estimate; nothing was sent", {**numbers, "cost": money}))
    for message in estimate.example:
        console.out.print(f"\n[{message.role}]", style="bold", markup=False)
        console.out.print(message.content, markup=False, soft_wrap=True)


def _plain(data: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and data != data else data  # noqa: PLR0124 - NaN is not itself


def _run_command() -> click.Command:
    dry = click.Option(["--dry-run", "dry"], is_flag=True, help="Print the cost and one full prompt; send nothing.")
    return config_command(
        "run",
        "saelab.workflows.explain_setup:ExplainJob",
        _run,
        positional="store",
        extra=[dry, json_option()],
        help_text="Explain the features of the store STORE and score the explanations. Killed, it goes on where it was "
        "when started again.",
    )


command.add_command(_run_command())


@command.command("report", help="Print the scores beside the store STORE, with their controls.")
@click.argument("store")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def report_command(store: str, markdown: bool, as_json: bool) -> None:
    """Report."""
    from saelab.workflows.explain import make_report

    found = make_report(store)
    if markdown:
        click.echo(found.to_markdown())
    elif as_json:
        click.echo(json.dumps(_plain(found.to_dict())))
    else:
        print_report(found)


report_command.params.append(json_option())

FORMATS = ("jsonl", "neuronpedia", "saedashboard")


@command.command("export", help="Write the explanations on STORE (and its features) for other programs.")
@click.argument("store")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="jsonl", show_default=True, help="Which program's."
)
@click.option("--model-id", default=None, help="Neuronpedia's name of the model.  [default: the store's]")
@click.option("--source-id", default=None, help="Neuronpedia's name of the SAE, such as 2-mine-res.")
@click.option("--features", "count", type=click.IntRange(1), default=None, help="The first so many features only.")
def export_command(store: str, out: str, **options: Any) -> None:
    """Export."""
    from saelab.cli.console import say
    from saelab.workflows.explain_exchange import run_export

    say(f"wrote {run_export(store, out, **options)}")


@command.command("import", help="Make a feature store of a Neuronpedia export folder or SAEDashboard batch files PATH.")
@click.argument("path")
def import_command(path: str, out: str, force: bool) -> None:
    """Import."""
    from saelab.cli.console import say
    from saelab.workflows.explain_exchange import run_import

    store = run_import(path, out, force=force)
    say(f"{store.n_features:,} features in {out}")


@command.command("compare", help="Compare two SAEs by the meaning of their explanations: stores A and B.")
@click.argument("a")
@click.argument("b")
@click.option("--embedder", default="characters", show_default=True, help="As in saelab explain run.")
def compare_command(a: str, b: str, embedder: str, as_json: bool) -> None:
    """Compare."""
    from saelab.cli import console
    from saelab.workflows.explain_exchange import run_compare

    found = run_compare(a, b, embedder=embedder)
    if as_json:
        click.echo(json.dumps(_plain(found.to_dict())))
        return
    console.out.print(found.to_frame().to_string(index=False))


export_command.params += [out_option("Folder, or file for jsonl."), force_option()]
import_command.params += [out_option("Folder of the new feature store."), force_option()]
compare_command.params.append(json_option())
