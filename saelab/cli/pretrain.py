"""``saelab pretrain``: a small language model from scratch."""

import json

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option
from saelab.models.pretrain import PretrainConfig, pretrain


def _pretrain(config: PretrainConfig, out: str, force: bool, resume: bool, as_json: bool) -> None:
    from saelab.cli import console

    with console.quiet_if(as_json):
        result = pretrain(config, out, force=force, resume=resume)
    if as_json:
        click.echo(json.dumps(result.training))
    else:
        values = {k: v for k, v in result.training.items() if isinstance(v, int | float | str)}
        console.out.print(console.key_value_table(f"language model in {out}", values))
        console.say(f"next: saelab harvest {out} --sites blocks.1.hook_resid_post --out runs/store")


command = config_command(
    "pretrain",
    PretrainConfig,
    _pretrain,
    extra=[out_option("Folder of the model."), force_option(), resume_option(), json_option()],
    help_text="Train a small GPT-2 from scratch; configs/pretrain-pylm.yaml reproduces the embedded model.",
)
