"""``saelab dark-matter``: what an SAE's error is made of."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option

if TYPE_CHECKING:
    from rich.table import Table

    from saelab.analysis.dark_matter.result import DarkMatter
    from saelab.workflows.dark_matter import DarkMatterJob


def _dark_matter(job: "DarkMatterJob", out: str, force: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli import console

    with console.quiet_if(as_json):
        result = saelab.dark_matter(job, out=out, force=force, say=console.say)
    if as_json:
        click.echo(json.dumps(_finite(result.to_dict())))
        return
    console.out.print(_saes(result))
    console.out.print()
    console.out.print(_findings(result))
    for note in result.notes:
        console.say(f"note: {note}")
    console.say(f"report: {Path(out) / 'report.html'}")


def _saes(result: "DarkMatter") -> "Table":
    from rich.table import Table

    table = Table(box=None, title=f"error at {result.site}, test contexts", title_justify="left", padding=(0, 2, 0, 0))
    columns = ("SAE", "L0", "FVU", "linear", "nonlinear", "R2 vector", "rescaled", "R2 norm", "shrinkage")
    for name in columns:
        table.add_column(name, justify="left" if name == "SAE" else "right", style="cyan" if name == "SAE" else None)
    for d in result.decompositions:
        s = d.shrinkage
        values = (d.l0, d.fvu, d.fvu_linear, d.fvu_nonlinear, d.r2, s.r2_rescaled, d.norm_r2["error"], s.shrinkage)
        flag = " (!)" if s.flagged else ""
        table.add_row(d.name, *(f"{v:.4g}" for v in values[:-1]), f"{values[-1]:.4g}{flag}")
    return table


def _findings(result: "DarkMatter") -> "Table":
    from rich.table import Table

    table = Table(box=None, title="findings of the paper, here", title_justify="left", padding=(0, 2, 1, 0))
    for name in ("claim", "holds", "measured", "controls"):
        table.add_column(name, overflow="fold")
    for f in result.findings():
        table.add_row(f.claim, "yes" if f.holds else "no", f.measured, f.control)
    return table


def _finite(value: object) -> object:
    """NaN is no JSON: write null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None  # noqa: PLR0124
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


command = config_command(
    "dark-matter",
    "saelab.workflows.dark_matter:DarkMatterJob",
    _dark_matter,
    positional="sae",
    extra=[out_option("Folder of the results and the report."), force_option(), json_option()],
    help_text="Split the error of the SAE in folder SAE into a linear and a nonlinear part, and study both.",
)
