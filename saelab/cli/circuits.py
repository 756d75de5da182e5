"""``saelab circuits``: which heads, edges and features do a task."""

import importlib

import click

# Each command, the module it is in, and its one line in the help.
COMMANDS = {
    "tasks": ("circuits_edges", "tasks_command", "List the tasks and the models with known circuits."),
    "models": ("circuits_edges", "models_command", "Write the models with known circuits as folders."),
    "heads": ("circuits_edges", "heads_command", "Score heads by discrete SAE codes, in seconds, without ablations."),
    "compare": (
        "circuits_edges",
        "compare_command",
        "Run all methods on a task: AUC, F1, faithfulness, CPR, CMD, seconds.",
    ),
    "find": (
        "circuits_edges",
        "find_command",
        "Find the smallest faithful circuit of edges; check it on unseen prompts.",
    ),
    "features": ("circuits_features", "features_command", "Find the circuit of SAE features (and errors) of a task."),
    "attention": (
        "circuits_features",
        "attention_command",
        "Explain a feature of an attention SAE by heads and positions.",
    ),
    "roles": ("circuits_features", "roles_command", "Heads with one role or many, by an attention SAE's features."),
    "prefixes": ("circuits_features", "prefixes_command", "Induction heads, and the length of prefix they need."),
    "graph": ("circuits_features", "graph_command", "Attribution graph of one prompt, with transcoders."),
}


class LazyCircuits(click.Group):
    """Commands imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(f"saelab.cli.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is no such command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from saelab.core.errors import nearest

            raise click.UsageError(f"no such command '{args[0]}'{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


command = LazyCircuits(
    "circuits",
    help="Find which heads, edges and features do a task, and check it by ablation.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
