"""``saelab sites``: the hook points of a model."""

from typing import TYPE_CHECKING

from saelab.cli.options import config_command

if TYPE_CHECKING:
    from saelab.workflows.corpus import ModelJob


def _sites(job: "ModelJob") -> None:
    from saelab.cli import console

    model = job.load()
    for site in model.sites():
        console.out.print(f"{model.width(site):>6}  {site}", markup=False)


command = config_command(
    "sites",
    "saelab.workflows.corpus:ModelJob",
    _sites,
    positional="model",
    help_text="List the sites of MODEL with their widths.",
)
