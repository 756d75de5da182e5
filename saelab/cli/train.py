"""``saelab train``: SAEs from a YAML file."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option

if TYPE_CHECKING:
    from saelab.workflows.train import TrainJob


def _train(job: "TrainJob", out: str, force: bool, resume: bool, as_json: bool) -> None:
    import saelab
    from saelab.cli import console

    with console.quiet_if(as_json):
        results = saelab.train(job, out=out, force=force, resume=resume, say=console.say)
    if as_json:
        runs = [{"name": r.name, "path": str(r.path), "tokens": r.tokens, "metrics": r.metrics} for r in results]
        click.echo(json.dumps({"runs": runs}))
        return
    for result in results:
        console.out.print(console.key_value_table(str(result.path), result.metrics))
    console.say(f"next: saelab {'eval' if job.pairs is None else 'contrast'} {results[0].path}")


command = config_command(
    "train",
    "saelab.workflows.train:TrainJob",
    _train,
    part="sparsity",
    extra=[out_option("Folder of the run."), force_option(), resume_option(), json_option()],
    help_text="Train the SAE of CONFIG.yaml, or the grid of them that it describes, on an activation store.",
)
