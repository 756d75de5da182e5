"""Nothing public goes undocumented: names, commands, options, config keys, architectures, recipes."""

import importlib.util
import inspect
import re

import click
import pytest

import saelab
from saelab.cli.main import COMMANDS, main
from saelab.sae.registry import ARCHITECTURES
from tests.docs.snippets import ROOT

spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
pytest.importorskip("mkdocs", reason="the site's packages are an extra: pip install '.[docs]'")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def public_members(found):
    if inspect.isclass(found):
        for name, member in vars(found).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                yield f"{found.__qualname__}.{name}", member


@pytest.mark.parametrize("name", [name for name in saelab.__all__ if name != "__version__"])
def test_public_names_say_what_they_are(name):
    found = getattr(saelab, name)
    assert (inspect.getdoc(found) or "").strip(), f"saelab.{name} has no docstring"
    for path, member in public_members(found):
        assert inspect.getdoc(member), f"{path} has no docstring"
    assert any(line.endswith(f".{name}\n") for line in hooks.names()), f"{name} is not on the page"


def commands_of(group, context, path=()):
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands_of(command, click.Context(command, parent=context), (*path, name))


def test_commands_and_options_say_what_they_do():
    page = "\n".join(hooks.commands())
    for path, command in commands_of(main, click.Context(main)):
        assert (command.help or "").strip(), f"saelab {' '.join(path)} has no help"
        assert re.search(rf"^#+ saelab {re.escape(' '.join(path))}$", page, flags=re.M), path
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                assert (param.help or "").strip(), f"saelab {' '.join(path)} {param.opts[0]} has no help"
                assert f"<code>{param.opts[0]}" in page or f"<code>-h, {param.opts[0]}" in page
    assert set(COMMANDS) == set(main.list_commands(click.Context(main)))


def test_config_keys_say_what_they_mean():
    page = "\n".join(hooks.configs())
    classes = hooks.config_classes()
    assert len(classes) > 20
    for one in classes:
        if one.model_fields:
            assert inspect.getdoc(one), f"{one.__name__} has no docstring"
            assert f"## {one.__name__}\n" in page
        for key, field in one.model_fields.items():
            assert field.description or hooks.is_tag(field), f"{one.__module__}.{one.__name__}.{key} has no docstring"


def test_architectures_have_equations_a_section_and_a_recipe():
    explained = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    reference = "\n".join(hooks.architectures())
    recipes = "\n".join(path.read_text(encoding="utf-8") for path in hooks.recipe_files())
    for name, entry in ARCHITECTURES.items():
        assert "x_hat" in (text := inspect.getmodule(entry.sae).__doc__) or "y_hat" in text, f"{name} has no equations"
        assert f"\n## {name}\n" in explained, f"docs/architectures.md has no section '{name}'"
        assert f"\n| `{name}`" in explained, f"docs/architectures.md's table lacks '{name}'"
        assert f"## {name}\n" in reference
        assert re.search(rf"architecture: {name}$", recipes, flags=re.M), f"no recipe trains '{name}'"


def test_recipes_say_what_they_are():
    files = hooks.recipe_files()
    assert len(files) > 20
    page = "\n".join(hooks.recipes())
    for path in files:
        assert len(hooks.about(path)) > 10, f"{path.name} does not begin with a comment that says what it is"
        assert f"## {path.relative_to(ROOT / 'configs')}\n" in page


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in navigation + "\n", f"{path} is not in mkdocs.yml"
