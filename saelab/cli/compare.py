"""``saelab compare``: which features of one SAE are features of another."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option

if TYPE_CHECKING:
    from saelab.workflows.compare import CompareJob


def _compare(job: "CompareJob", out: str | None, force: bool, as_json: bool) -> None:
    from rich.table import Table

    import saelab
    from saelab.analysis.compare.report import summary_rows
    from saelab.cli import console

    with console.quiet_if(as_json):
        result = saelab.compare(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    a, b = result.a, result.b
    title = f"A {a.name} ({a.n_features:,} features), B {b.name} ({b.n_features:,}), {result.n_tokens:,} tokens"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("by chance", justify="right", style="dim")
    for what, value, chance in summary_rows(result):
        table.add_row(what, console.format_value(value), "" if chance is None else console.format_value(chance))
    console.out.print(table)
    for reason in result.skipped:
        console.say(f"not compared: {reason}")
    if out is not None:
        console.say(f"report: {out}/report.html")


command = config_command(
    "compare",
    "saelab.workflows.compare:CompareJob",
    _compare,
    positional="a",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the comparison, with an HTML report, to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Compare the SAEs (or feature stores) A and B: which features of one are features of the other.",
)
# B is the second argument: the key keeps its place in the config, the option becomes an argument.
command.params = [
    click.Argument([str(p.name)], required=False, metavar="B") if p.name == "key__b" else p for p in command.params
]
command.params.sort(key=lambda p: p.param_type_name != "argument")
