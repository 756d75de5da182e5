"""Pages that the site makes from the program itself; nothing of them is kept in the repository.

Commands with their options, config classes with their keys, architectures with their equations, the YAML files of
``configs/``, and the public names. ``tests/docs/test_reference.py`` fails when one of these has nothing to show.
"""

import html
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(`|<code>)~?")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {
        "commands": commands,
        "configs": configs,
        "architectures": architectures,
        "recipes": recipes,
        "api": names,
    }
    for name, page in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(page())))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Take Sphinx's roles off the names in docstrings."""
    return ROLE.sub(r"\1", content)


def commands() -> Iterator[str]:
    """Write a section for each command."""
    from saelab.cli.main import COMMANDS, main

    context = click.Context(main, info_name="saelab")
    yield "# Commands\n"
    yield (
        "Every key is an option, `--dotted.key VALUE`, and a key of the command's YAML file ([all keys by "
        "class](configs.md)). `saelab --quiet COMMAND` shows no progress bars, `saelab --debug COMMAND` the traceback "
        "of an error. Exit codes: 0 done, 1 a mistake that one line explains, 2 wrong usage, 130 interrupted. Made "
        "from the program.\n"
    )
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
            yield f"| {_code(option)} | {_text(text)} |"
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield f"### {path} {name}\n\n{(inner.help or '').strip()}\n"
            yield from _parameters(inner, f"{path} {name}", context)


def config_classes() -> list[type[Any]]:
    """Return every config class of the package, by module."""
    import saelab
    from saelab.core.config import Config

    for module in pkgutil.walk_packages(saelab.__path__, "saelab."):
        # Modules of kernels need a GPU's compiler and hold no configs.
        if not module.name.startswith("saelab.kernels.") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: dict[type[Any], None] = {}

    def collect(base: type[Any]) -> None:
        for one in base.__subclasses__():
            if one.__module__.startswith("saelab."):
                found[one] = None
            collect(one)

    collect(Config)
    return sorted(found, key=lambda one: (one.__module__, one.__name__))


def configs() -> Iterator[str]:
    """Write a table of keys for each config class."""
    yield "# Configs\n"
    yield (
        "All config classes are frozen, refuse unknown keys and name the nearest known one. Defaults live in the class "
        "and nowhere else. A key whose type is another class is a mapping in YAML and a dotted option "
        "(`--harvest.max_tokens`). Made from the program.\n"
    )
    for one in config_classes():
        if one.model_fields:
            yield f"## {one.__name__}\n\n`{one.__module__}`. {_prose(one)}\n"
            yield from _keys(one)


def _keys(one: type[Any]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for key, field in one.model_fields.items():
        default = "required" if field.is_required() else _code(_default(field))
        text = field.description or ("Tells which class this is." if is_tag(field) else "")
        yield f"| {_code(key)} | {_code(_type(field.annotation))} | {default} | {_text(text)} |"
    yield ""


def is_tag(field: Any) -> bool:
    """Return whether a field only names its class, as ``architecture: topk`` does."""
    return typing.get_origin(field.annotation) is typing.Literal and field.default in typing.get_args(field.annotation)


def _type(annotation: Any) -> str:
    """Write a type for people: unions with "or", literals as their values, without modules."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(repr(one) for one in inside)
    if origin is typing.Annotated:
        return _type(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inside)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_type(one) for one in inside if one is not ...)}"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return value.__class__.__name__ + "()" if isinstance(value, BaseModel) else repr(value)


def architectures() -> Iterator[str]:
    """Write what each architecture's module says of itself, and its keys."""
    from saelab.sae.registry import ARCHITECTURES

    yield "# Architectures\n"
    yield (
        "What each file in `saelab/sae/` says: equations, paper, choices of ours. All equations are in scaled units "
        "unless said otherwise. [When to take which](../architectures.md) is a page of its own. Made from the "
        "program.\n"
    )
    for name, entry in ARCHITECTURES.items():
        doc = inspect.getdoc(sys.modules[entry.sae.__module__]) or ""
        yield f"## {name}\n\n`{entry.sae.__module__}.{entry.sae.__name__}`\n\n{_markdown(doc)}\n"
        yield from _keys(entry.config)
    codebook = importlib.import_module("saelab.sae.codebook")
    yield "## codebook\n\nNot trained like the others: `saelab codebook` trains a model around it.\n"
    yield f"{_markdown(inspect.getdoc(codebook) or '')}\n"
    yield from _keys(codebook.CodebookConfig)


def recipe_files() -> list[Path]:
    """Return the YAML files that ship with saelab."""
    return sorted((ROOT / "configs").rglob("*.yaml"))


def about(recipe: Path) -> str:
    """Return the comment a recipe begins with; empty when there is none."""
    lines = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines[0] if lines else ""


def recipes() -> Iterator[str]:
    """Write every YAML file of configs/ with its comment."""
    yield "# Recipes\n"
    yield (
        "The YAML files in `configs/`; they are part of the package, so `saelab train configs/relu.yaml` works in any "
        "folder. Any key can be overridden on the command line. Those in `configs/sparsity/` are for `saelab "
        "sparsify --recipe`, those in `configs/sparsity/training/` for `--sparsity` of `saelab pretrain` and `saelab "
        "train`. Made from the files.\n"
    )
    for path in recipe_files():
        yield f"## {path.relative_to(ROOT / 'configs')}\n\n{about(path)}\n"
        yield f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n"


def names() -> Iterator[str]:
    """Write a section for each public name."""
    import saelab

    yield "# Python names\n"
    yield "`import saelab` offers these; each is imported when first used.\n"
    for name in saelab.__all__:
        if name != "__version__":
            found = getattr(saelab, name)
            where = (
                found.__name__ if isinstance(found, types.ModuleType) else f"{found.__module__}.{found.__qualname__}"
            )
            yield f"::: {where}\n"


def _prose(one: type[Any]) -> str:
    return _markdown(inspect.getdoc(one) or "")


def _markdown(doc: str) -> str:
    """Turn a docstring into Markdown: roles off, double backticks single."""
    return ROLE.sub(r"\1", doc).replace("``", "`")


def _text(text: str) -> str:
    """Return a text for a table's cell, its square brackets no links."""
    return _cell(text).replace("[", "\\[")


def _code(text: str) -> str:
    """Return a table's cell of code, in which a vertical bar is no end of the cell."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _cell(text: str) -> str:
    return _markdown(" ".join(text.split()).replace("|", "\\|").replace("<", "&lt;"))
