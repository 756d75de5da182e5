"""``saelab contrast``: what the halves of a contrastive SAE know."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, json_option

if TYPE_CHECKING:
    from saelab.workflows.contrast import ContrastJob


def _contrast(job: "ContrastJob", as_json: bool) -> None:
    import saelab
    from saelab.cli import console

    with console.quiet_if(as_json):
        report = saelab.contrast(job)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    for half in report.halves:
        values = {key: value for key, value in asdict(half).items() if key != "name"}
        console.out.print(console.key_value_table(f"{half.name} features", values))
    console.out.print(console.key_value_table("mean |cosine| of decoder rows", report.cosines))


command = config_command(
    "contrast",
    "saelab.workflows.contrast:ContrastJob",
    _contrast,
    positional="sae",
    extra=[json_option()],
    help_text="Tell what the common and the differentiating features of the contrastive SAE in folder SAE know.",
)
