"""Pages that the site makes from the program itself: commands with their keys, and the public names."""

from collections.abc import Iterator
from typing import Any

import click
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content="\n".join(_commands())))
    files.append(File.generated(config, "reference/api.md", content="\n".join(_names())))
    return files


def _commands() -> Iterator[str]:
    from saelab.cli.main import COMMANDS, main

    context = click.Context(main, info_name="saelab")
    yield "# Commands\n"
    yield "Every key is an option, `--dotted.key VALUE`, and a key of the command's YAML file. Made from the program.\n"
    for name, line in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None
        yield f"## saelab {name}\n\n{line}\n"
        yield from _parameters(command, f"saelab {name}", context)


def _parameters(command: click.Command, path: str, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{path} {usage}\n```\n"
    rows = [param.get_help_record(context) for param in command.params]
    shown = [row for row in rows if row is not None]
    if shown:
        yield "| option | meaning |\n| --- | --- |"
        for option, text in shown:
            yield f"| `{_cell(option)}` | {_cell(text)} |"
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield f"### {path} {name}\n\n{(inner.help or '').strip()}\n"
            yield from _parameters(inner, f"{path} {name}", context)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _names() -> Iterator[str]:
    import saelab

    yield "# Python names\n"
    yield "`import saelab` offers these; each is imported when first used.\n"
    for name in saelab.__all__:
        if name != "__version__":
            yield f"::: {saelab._WHERE[name]}.{name}\n"
