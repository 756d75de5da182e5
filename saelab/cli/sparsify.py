"""``saelab sparsify``, ``sparsity-curve`` and ``sparsity-study``: pruned models, and what sparsity costs."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option

if TYPE_CHECKING:
    from saelab.workflows.sparsify import SparsifyJob
    from saelab.workflows.sparsity_curve import CurveJob
    from saelab.workflows.sparsity_study import StudyJob


def _sparsify(job: "SparsifyJob", out: str, force: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli import console

    with console.quiet_if(as_json):
        report = saelab.sparsify(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    shown = report.to_frame()
    console.out.print(console.frame_table(f"layers of {report.path}", shown))
    values = {"sparsity": report.sparsity, **report.cost, "seconds": report.seconds}
    console.out.print(console.key_value_table(f"{report.model} before and after", values))
    console.say(f"next: saelab harvest {report.path} --sites blocks.1.hook_resid_post --out {report.path}-store")


def _curve(job: "CurveJob", out: str | None, force: bool, as_json: bool) -> None:
    from saelab.cli import console
    from saelab.workflows.sparsity_curve import run_curve

    with console.quiet_if(as_json):
        curve = run_curve(job, out, force=force)
    if as_json:
        click.echo(json.dumps(curve.to_dict()))
        return
    console.out.print(console.frame_table(f"loss of {curve.model} by sparsity", curve.to_frame()))
    console.out.print(console.frame_table("essential sparsity", curve.essential_frame()))


command = config_command(
    "sparsify",
    "saelab.workflows.sparsify:SparsifyJob",
    _sparsify,
    positional="model",
    part="recipe",
    extra=[out_option("Folder of the sparse model."), force_option(), json_option()],
    help_text="Prune MODEL as the recipe says; the result is a model folder that every command takes.",
)
curve_command = config_command(
    "sparsity-curve",
    "saelab.workflows.sparsity_curve:CurveJob",
    _curve,
    positional="model",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the curve (JSON and an HTML figure) to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Prune MODEL at many sparsities, one shot, without retraining, and measure the loss of each.",
)


def _study(job: "StudyJob", out: str, force: bool, as_json: bool) -> None:
    from saelab.cli import console
    from saelab.workflows.sparsity_study import run_study

    with console.quiet_if(as_json):
        study = run_study(job, out, force=force, say=console.say)
    if as_json:
        click.echo(json.dumps(study.to_dict()))
        return
    console.out.print(console.frame_table("what sparsity does to features", study.summary()))
    console.say(f"report: {out}/study.html; of matched and lost, the column 'dense' is the control (two seeds)")


study_command = config_command(
    "sparsity-study",
    "saelab.workflows.sparsity_study:StudyJob",
    _study,
    positional="model",
    extra=[out_option("Folder of the study."), force_option(), json_option()],
    help_text="Train equal SAEs on MODEL and on sparsified versions of it, and report what becomes of the features.",
)
