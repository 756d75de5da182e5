"""``saelab verify``: check a store against its checksums."""

import click


@click.command(help="Read every file of the folder PATH and check it against its recorded checksum.")
@click.argument("path")
def command(path: str) -> None:
    """Verify an activation store, a feature store or an SAE folder."""
    from saelab.cli.console import say
    from saelab.workflows.show import verify_folder

    say(f"{path}: {verify_folder(path)} files match their checksums")
