"""The ``saelab`` command: a group whose commands are imported only when they are called.

``saelab --help`` imports neither torch nor pydantic; a command's options are made from its config class
(:mod:`saelab.cli.options`).
"""

import importlib
import sys
from typing import Any

import click

from saelab import __version__
from saelab.core.errors import SaelabError

COMMANDS = {
    "demo": "Harvest, train, evaluate and build on the embedded model, then show three features.",
    "harvest": "Write a model's activations on a text to an activation store.",
    "train": "Train one SAE, or a grid of them, from a YAML file.",
    "eval": "Measure an SAE on held-out text: FVU, L0, CE recovered, dead features.",
    "compare": "Match the features of two SAEs: one-to-one, one-to-many, clusters, split and novel ones.",
    "dark-matter": "Split an SAE's error into a linear and a nonlinear part, and study both: one HTML report.",
    "lazy-neurons": "How few of a model's neurons are active per token, beside an SAE at equal L0.",
    "core-neurons": "Run a model's MLPs on each text's own neurons: loss, speed, stability, delta sparsity.",
    "build": "Build the feature store: every feature's activations on a text.",
    "explain": "Explain a store's features, score the explanations beside controls, export and import them.",
    "app": "Open the feature browser on a run, a feature store or an SAE.",
    "dashboard": "Write the dashboards of some features as one HTML file that needs nothing else.",
    "circuits": "Find which heads, edges and features do a task, and check it by ablation.",
    "show": "Describe a folder that saelab wrote; --feature shows one feature's top contexts.",
    "sites": "List the sites of a model.",
    "verify": "Read every file of a store and check it against its checksums.",
    "import": "Turn another library's checkpoint into an SAE folder.",
    "export": "Write an SAE as another library's checkpoint.",
    "sparsify": "Prune a model's weights by a recipe (magnitude, Wanda, SparseGPT, N:M ...) into a new model folder.",
    "sparsity-study": "Equal SAEs on a dense and on sparsified models: FVU, CE recovered, features matched and lost.",
    "sparsity-curve": "Loss against sparsity without retraining, and where it departs from the dense model's.",
    "contrast": "Check a contrastive SAE: do its halves share, and tell apart, the sides of pairs?",
    "codebook": "Train a model around codebooks: discrete codes at its attention and MLP outputs.",
    "pretrain": "Train a small language model from scratch (reproduces the embedded one).",
}

# Where a command is, when not in the module of its name (``import`` is no module name).
PLACES = {
    "import": ("import_sae", "import_command"),
    "export": ("import_sae", "export_command"),
    "sparsity-curve": ("sparsify", "curve_command"),
    "sparsity-study": ("sparsify", "study_command"),
    "dark-matter": ("dark_matter", "command"),
    "lazy-neurons": ("lazy_neurons", "command"),
    "core-neurons": ("core_neurons", "command"),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of the workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = PLACES.get(cmd_name, (cmd_name, "command"))
        command = getattr(importlib.import_module(f"saelab.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is no such command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from saelab.core.errors import nearest

            raise click.UsageError(f"no such command '{args[0]}'{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands from the table above, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="saelab")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.pass_context
def main(context: click.Context, debug: bool, quiet: bool) -> None:
    """A workbench for sparse autoencoders on transformer activations.

    Start with: saelab demo
    """
    context.obj = {"debug": debug}
    if quiet:
        from saelab.core.progress import set_progress

        set_progress(False)


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error the user can mend, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if args is None else args
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        result: Any = main.main(args=arguments, prog_name="saelab", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except SaelabError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"saelab: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "saelab"
        click.echo(f"saelab: {error.format_message().replace(chr(10), ' ')} (see '{where} --help')", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("saelab: interrupted; run the same command with --resume to go on where it can resume", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
