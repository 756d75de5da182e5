"""``saelab core-neurons``: what running a model on each text's own neurons costs and gains."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option

if TYPE_CHECKING:
    from saelab.workflows.core_neurons import CoreNeuronsJob


def _core_neurons(job: "CoreNeuronsJob", out: str | None, force: bool, as_json: bool) -> None:
    from saelab.cli import console
    from saelab.workflows.core_neurons import run_core_neurons

    with console.quiet_if(as_json):
        result = run_core_neurons(job, out, force=force)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    title = (
        f"core neurons after {result.prefix} tokens, from block {result.first_layer} on; the whole model's loss there "
        f"is {result.loss_whole:.4f} ({result.predictions:,} predictions)"
    )
    console.out.print(console.frame_table(title, result.to_frame()))
    layers = result.layer_frame()
    stable = layers[[c for c in layers if not str(c).startswith(">")]]
    title = f"core neurons shared by halves of texts (alpha {job.alphas[0]:g}, beta {job.betas[0]:g})"
    console.out.print(console.frame_table(title, stable))
    changed = layers[["layer", *(c for c in layers if str(c).startswith(">"))]]
    title = "neurons that change from a token to the next by more than a share of the RMS, and between texts"
    console.out.print(console.frame_table(title, changed))


command = config_command(
    "core-neurons",
    "saelab.workflows.core_neurons:CoreNeuronsJob",
    _core_neurons,
    positional="model",
    extra=[
        click.Option(["--out"], metavar="DIR", help="Also write the numbers to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Run MODEL's MLPs on the neurons that the start of each text used most: loss, speed, stability.",
)
