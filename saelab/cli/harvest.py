"""``saelab harvest``: activations of a model on a text, to a folder."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option

if TYPE_CHECKING:
    from saelab.workflows.harvest import HarvestJob


def _harvest(job: "HarvestJob", out: str, force: bool, resume: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli.console import quiet_if, say

    with quiet_if(as_json):
        store = saelab.harvest(job, out=out, force=force, resume=resume, say=say)
    if as_json:
        report = store.report
        assert report is not None, "harvest reports"
        rates = {"bytes": report.bytes, "seconds": report.seconds, "tokens_per_second": report.tokens_per_second}
        execution = store.manifest["config"]["execution"]
        click.echo(json.dumps({"store": out, "n_rows": store.n_rows, **rates, "execution": execution}))
    else:
        say(f"next: saelab train demo-topk.yaml --store {out} --site {job.sites[0]} --out runs/sae")


command = config_command(
    "harvest",
    "saelab.workflows.harvest:HarvestJob",
    _harvest,
    positional="model",
    extra=[out_option("Folder of the new store."), force_option(), resume_option(), json_option()],
    help_text="Write the activations of MODEL at one or more sites on a text to an activation store.",
)
