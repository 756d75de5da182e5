"""``saelab demo``: the main job, end to end, in a few minutes."""

import json

import click

from saelab.cli.options import config_command, force_option, json_option, out_option
from saelab.workflows.demo import DemoJob, run_demo


def _demo(job: DemoJob, out: str, full: bool, force: bool, as_json: bool) -> None:
    from saelab.cli import console

    with console.quiet_if(as_json):
        result = run_demo(job, out, full=full, force=force, say=(lambda text: None) if as_json else console.say)
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        console.print_demo(result)
        if result.explained is not None:
            from saelab.cli.explain import print_result

            print_result(result.explained)


command = config_command(
    "demo",
    DemoJob,
    _demo,
    extra=[
        out_option("Folder for everything the demo makes.", default="saelab-demo"),
        click.Option(["--full", "full"], is_flag=True, help="Also explain and score every live feature."),
        force_option(),
        json_option(),
    ],
    help_text="Harvest, train, evaluate and build on the embedded model; then three features and what to type next.",
)
