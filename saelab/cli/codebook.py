"""``saelab codebook``: a model trained around codebooks."""

import json
from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, json_option, out_option, resume_option

if TYPE_CHECKING:
    from saelab.workflows.codebook import CodebookJob


def _codebook(job: "CodebookJob", out: str, force: bool, resume: bool, as_json: bool) -> None:
    from saelab.cli import console
    from saelab.workflows.codebook import run_codebook

    with console.quiet_if(as_json):
        report = run_codebook(job, out, force=force, resume=resume)
    if as_json:
        click.echo(json.dumps({"path": str(report.folder), "metrics": report.metrics}))
    else:
        console.out.print(console.key_value_table(str(report.folder), report.metrics))
        console.say(f'next, in Python: saelab.open_result("{report.folder}") (docs/architectures.md, Codebooks)')


command = config_command(
    "codebook",
    "saelab.workflows.codebook:CodebookJob",
    _codebook,
    extra=[out_option("Folder of the model and its codebooks."), force_option(), resume_option(), json_option()],
    help_text="Train a model around codebooks at its attention-output and MLP-output sites, as CONFIG.yaml says.",
)
