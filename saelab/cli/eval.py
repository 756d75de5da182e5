"""``saelab eval``: how well an SAE reconstructs, and what that costs the model."""

import json

import click

from saelab.cli.options import config_command, force_option, json_option
from saelab.workflows.evaluate import EvaluateJob, run_evaluate


def _evaluate(job: EvaluateJob, out: str | None, force: bool, as_json: bool) -> None:
    from saelab.cli import console

    with console.quiet_if(as_json):
        evaluation = run_evaluate(job, out, force=force)
    if as_json:
        click.echo(json.dumps(evaluation.to_dict()))
    else:
        console.out.print(console.evaluation_table(evaluation))


command = config_command(
    "eval",
    EvaluateJob,
    _evaluate,
    positional="sae",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the evaluation to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Evaluate the SAE in folder SAE on held-out text.",
)
