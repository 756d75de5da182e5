"""``saelab pretrain``: a small language model from scratch, dense or sparse."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option

if TYPE_CHECKING:
    from saelab.workflows.pretrain import PretrainJob


def _pretrain(job: "PretrainJob", out: str, force: bool, resume: bool, as_json: bool) -> None:
    from saelab.cli import console
    from saelab.workflows.pretrain import run_pretrain

    with console.quiet_if(as_json):
        result = run_pretrain(job, out, force=force, resume=resume)
    if as_json:
        click.echo(json.dumps(result.training))
    else:
        values = {k: v for k, v in result.training.items() if isinstance(v, int | float | str)}
        console.out.print(console.key_value_table(f"language model in {out}", values))
        console.say(f"next: saelab harvest {out} --sites blocks.1.hook_resid_post --out runs/store")


command = config_command(
    "pretrain",
    "saelab.workflows.pretrain:PretrainJob",
    _pretrain,
    part="sparsity",
    extra=[out_option("Folder of the model."), force_option(), resume_option(), json_option()],
    help_text=(
        "Train a small GPT-2 from scratch; configs/pretrain-pylm.yaml reproduces the embedded model. "
        "With --sparsity its weights are kept sparse while it is trained (configs/sparsity/training)."
    ),
)
