"""``saelab import`` and ``saelab export``: SAEs in the formats of other libraries."""

import click

from saelab.cli.options import force_option, out_option

FORMAT_HELP = "saelens, sparsify, dictionary_learning, openmoss, openai, ai-safety-foundation; auto finds it out."


@click.command("import", help="Turn the checkpoint PATH of another library into a saelab SAE folder.")
@click.argument("path")
@click.option("--format", "format_name", default="auto", show_default=True, help=FORMAT_HELP)
def import_command(path: str, format_name: str, out: str, force: bool) -> None:
    """Import a checkpoint."""
    from saelab.cli.console import say
    from saelab.workflows.interop import run_import

    sae = run_import(path, out, format_name=format_name, force=force)
    say(f"{out}: {sae.config.architecture} SAE, d_in {sae.d_in}, d_sae {sae.d_sae}")
    say(f"next: saelab eval {out} --model MODEL --site SITE --text TEXT")


@click.command("export", help="Write the saelab SAE folder SAE as a checkpoint of another library.")
@click.argument("sae")
@click.option("--format", "format_name", required=True, help=FORMAT_HELP.split(";", maxsplit=1)[0] + ".")
def export_command(sae: str, format_name: str, out: str, force: bool) -> None:
    """Export an SAE."""
    from saelab.cli.console import say
    from saelab.workflows.interop import run_export

    say(f"wrote {run_export(sae, out, format_name=format_name, force=force)} as {format_name}")


import_command.params += [out_option("Folder of the new SAE."), force_option()]
export_command.params += [out_option("Folder of the checkpoint."), force_option()]
