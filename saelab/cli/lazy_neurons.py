"""``saelab lazy-neurons``: how sparse a model's MLPs are, beside an SAE at equal L0."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from saelab.analysis.lazy_neurons import LazyNeurons
    from saelab.workflows.lazy_neurons import LazyNeuronsJob


def _lazy_neurons(job: "LazyNeuronsJob", out: str | None, force: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli import console

    with console.quiet_if(as_json):
        result = saelab.lazy_neurons(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    console.out.print(_layers(result))
    console.out.print()
    console.out.print(_curves(result))
    if result.comparison is not None:
        console.out.print()
        console.out.print(_comparison(result))
    if out is not None:
        console.say(f"report: {out}/report.html")


def _layers(result: "LazyNeurons") -> "Table":
    from rich.table import Table

    title = f"active units, {result.n_tokens:,} tokens of {result.source}, threshold {result.epsilon:g} RMS"
    table = Table(box=None, title=title, title_justify="left", padding=(0, 2, 0, 0))
    for name in ("units", "width", "h > 0", "over threshold", "effective", "top 10 % hold", "never"):
        table.add_column(
            name, justify="left" if name == "units" else "right", style="cyan" if name == "units" else None
        )
    parts = [*result.layers, *([result.code] if result.code else [])]
    for p in parts:
        numbers = (f"{p.positive:.2%}", f"{p.above:.2%}", f"{p.effective:.1f}", f"{p.energy[3]:.1%}", f"{p.never:.2%}")
        table.add_row(p.name, f"{p.width:,}", *numbers)
    return table


def _curves(result: "LazyNeurons") -> "Table":
    from rich.table import Table

    table = Table(box=None, title="k strongest neurons kept, all layers", title_justify="left", padding=(0, 2, 0, 0))
    for name in ("k", "share", "loss", "random k"):
        table.add_column(name, justify="right")
    for p in result.curve:
        table.add_row(str(p.k), f"{p.share:.1%}", f"{p.ce:.4f}", f"{p.ce_random:.4f}")
    return table


def _comparison(result: "LazyNeurons") -> "Table":
    from rich.table import Table

    c = result.comparison
    assert c is not None
    title = f"{c.sae} at {c.site} against {c.neurons} (loss clean {c.ce_clean:.4f}, no neurons {c.ce_ablated:.4f})"
    table = Table(box=None, title=title, title_justify="left", padding=(0, 2, 0, 0))
    for name in ("", "units per token", "loss", "random units", "FVU of the site"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("SAE", f"{c.l0:.1f}", f"{c.ce_sae:.4f}", "", f"{c.fvu_sae:.4f}")
    for p in c.points:
        table.add_row("neurons", str(p.k), f"{p.ce:.4f}", f"{p.ce_random:.4f}", f"{p.fvu:.4f}")
    return table


command = config_command(
    "lazy-neurons",
    "saelab.workflows.lazy_neurons:LazyNeuronsJob",
    _lazy_neurons,
    positional="model",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the numbers and a report to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Measure how few neurons of MODEL are active per token, and what the loss needs of them.",
)
