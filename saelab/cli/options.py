"""Commands made from config classes: every key is an option ``--dotted.key VALUE`` with its default and description.

One mechanism serves all jobs: an optional YAML file, options on top of it, the config class as the only place where
keys, types and defaults are declared. A class given as ``"package.module:Class"`` is imported when the command runs.
"""

import enum
import types
import typing
from collections.abc import Callable
from typing import Any

import click
import yaml
from pydantic_core import PydanticUndefined

from saelab.cli.option_cache import OptionField, find_class, kept_fields
from saelab.core.assets import resolve_config
from saelab.core.config import Config, apply_overrides, leaf_fields, load_yaml, parse_config
from saelab.core.errors import nearest


class ConfigCommand(click.Command):
    """A command whose unknown options are answered with the nearest known key."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, turning click's ``NoSuchOption`` into one line with near matches."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.params for name in param.opts if name.startswith("--")]
            raise click.UsageError(
                f"unknown option '{error.option_name}'{nearest(error.option_name, known)}", ctx
            ) from None


def config_command(
    name: str,
    config_class: type[Config] | str,
    function: Callable[..., None],
    *,
    positional: str | None = None,
    extra: list[click.Parameter] | None = None,
    help_text: str = "",
    part: str | None = None,
) -> click.Command:
    """Build a command that calls ``function(config, **extra)``, ``config`` being a ``config_class``.

    ``positional`` names the key that the first argument sets (``sae`` in ``saelab eval SAE``); when it is None the
    first argument is the YAML file itself. Every other key is an option. ``part`` names a key whose keys may come from
    a YAML file of their own: ``--part FILE``.
    """
    params: list[click.Parameter] = []
    if positional is None:
        params.append(click.Argument(["config_file"], required=False, metavar="[CONFIG.yaml]"))
    else:
        params.append(click.Argument([positional], required=False, metavar=positional.upper()))
        params.append(click.Option(["--config", "config_file"], metavar="FILE", help="YAML file with any of the keys."))
    if part is not None:
        text = f"YAML file with the {part}'s keys."
        params.append(click.Option([f"--{part}", "part_file"], metavar="FILE", help=text))
    fields = kept_fields(config_class, _fields) if isinstance(config_class, str) else _fields(config_class)
    keys = {field.key: "key__" + field.key.replace(".", "__") for field in fields if field.key != positional}
    params.extend(_option(field, keys[field.key]) for field in fields if field.key != positional)
    params.extend(extra or [])
    extra_names = [p.name for p in extra or []]

    def callback(**given: Any) -> None:
        file = given.pop("config_file", None)
        source = str(file) if file else "command line"
        data = load_yaml(resolve_config(file)) if file else {}
        if part is not None and (part_file := given.pop("part_file")):
            data, source = {**data, part: load_yaml(resolve_config(part_file))}, str(part_file)
        job: type[Config] = find_class(config_class) if isinstance(config_class, str) else config_class
        annotations = {key: annotation for key, annotation, *_ in leaf_fields(job)}
        overrides = {
            key: _value(given[parameter], annotations[key])
            for key, parameter in keys.items()
            if given[parameter] not in (None, ())
        }
        if positional is not None and given[positional] is not None:
            overrides[positional] = given[positional]
        config: Config = parse_config(job, apply_overrides(data, overrides), source)
        function(config, **{n: given[n] for n in extra_names if n is not None})

    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return ConfigCommand(name, params=params, callback=callback, help=help_text, context_settings=settings)


def _fields(config_class: type[Config]) -> list[OptionField]:
    fields = []
    for key, annotation, default, description in leaf_fields(config_class):
        shown = "" if default is PydanticUndefined or default is None else f"  [default: {_plain(default)}]"
        text = " ".join(description.split()) + shown
        fields.append(OptionField(key, _metavar(annotation), _is_list(annotation), text))
    return fields


def _option(field: OptionField, parameter: str) -> click.Option:
    return click.Option([f"--{field.key}", parameter], metavar=field.metavar, help=field.text, multiple=field.many)


def _value(given: Any, annotation: Any) -> Any:
    """Turn the option's text into a YAML value; texts for string keys stay as they are."""
    if _is_list(annotation):
        if given in (("null",), ("none",)) and type(None) in _flatten(annotation):
            return None
        (of,) = typing.get_args(next(c for c in _flatten(annotation) if typing.get_origin(c) is list))
        values = [_value(text, of) for text in given]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values
    choices = _flatten(annotation)
    if given in ("null", "none") and type(None) in choices:
        return None
    if str in choices and not any(c in choices for c in (int, float, bool)):
        return yaml.safe_load(given) if given.startswith("[") else given
    try:
        return yaml.safe_load(given)
    except yaml.YAMLError:
        return given


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(choice) is list for choice in _flatten(annotation))


def _flatten(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _flatten(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [c for a in typing.get_args(annotation) for c in _flatten(a)]
    return [annotation]


def _metavar(annotation: Any) -> str:
    names: list[str] = []
    for choice in _flatten(annotation):
        if typing.get_origin(choice) is typing.Literal:
            names.extend(str(a) for a in typing.get_args(choice))
        elif typing.get_origin(choice) is list:
            names.append(_metavar(typing.get_args(choice)[0]))
        elif choice is not type(None):
            names.append({int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}.get(choice, "YAML"))
    return "|".join(dict.fromkeys(names))


def _plain(default: Any) -> str:
    return str(default.value) if isinstance(default, enum.Enum) else str(default)


def out_option(help_text: str, default: str | None = None) -> click.Option:
    """``--out DIR``, required unless it has a default."""
    shown = f"{help_text}  [default: {default}]" if default else help_text
    if default is None:
        return click.Option(["--out"], metavar="DIR", required=True, help=shown)
    return click.Option(["--out"], metavar="DIR", default=default, help=shown)


def force_option() -> click.Option:
    """``--force``: replace an existing output folder."""
    return click.Option(["--force"], is_flag=True, help="Replace what is in --out.")


def resume_option() -> click.Option:
    """``--resume``: go on with an interrupted run."""
    return click.Option(["--resume"], is_flag=True, help="Go on with the interrupted run in --out.")


def json_option() -> click.Option:
    """``--json``: one JSON object on standard output, no bars, no tables."""
    return click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of tables.")
