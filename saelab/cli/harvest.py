"""``saelab harvest``: activations of a model on a text, to a folder."""

import json

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option
from saelab.workflows.harvest import HarvestJob, run_harvest


def _harvest(job: HarvestJob, out: str, force: bool, resume: bool, as_json: bool) -> None:
    from saelab.cli.console import quiet_if, say

    with quiet_if(as_json):
        result = run_harvest(job, out, force=force, resume=resume, say=say)
    if as_json:
        click.echo(json.dumps(result))
    else:
        say(f"next: saelab train demo-topk.yaml --store {out} --site {job.sites[0]} --out runs/sae")


command = config_command(
    "harvest",
    HarvestJob,
    _harvest,
    positional="model",
    extra=[out_option("Folder of the new store."), force_option(), resume_option(), json_option()],
    help_text="Write the activations of MODEL at one or more sites on a text to an activation store.",
)
