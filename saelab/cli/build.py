"""``saelab build``: the feature store of an SAE on a text."""

from typing import TYPE_CHECKING

import click

from saelab.cli.options import config_command, force_option, out_option

if TYPE_CHECKING:
    from saelab.workflows.build import BuildJob


def _build(job: "BuildJob", out: str, force: bool) -> None:
    import saelab
    from saelab.cli.console import say

    store = saelab.build_features(job, out=out, force=force)
    say(f"{store.n_features:,} features on {store.n_tokens:,} tokens in {out}")
    click.echo(f"next: saelab show {out} --feature 0", err=True)


command = config_command(
    "build",
    "saelab.workflows.build:BuildJob",
    _build,
    positional="sae",
    extra=[out_option("Folder of the new feature store."), force_option()],
    help_text="Build the feature store of the SAE in folder SAE.",
)
