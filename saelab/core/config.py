"""Configs: frozen pydantic models, a YAML file, and dotted overrides.

Unknown keys are refused with the nearest known key; a wrong type is one line naming key, value and what was expected.
Defaults live in the class of the thing configured and nowhere else.
"""

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from saelab.core.errors import ConfigError, MissingFileError, nearest


class Config(BaseModel):
    """Base of all configs: immutable, unknown keys refused, values validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raise :class:`MissingFileError` or :class:`ConfigError` in one line."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"config file not found: {path}; give the path of a YAML file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got a {type(data).__name__}")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with dotted keys (``{"sae.k": 32}``) set; intermediate mappings are created as needed."""
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for dotted, value in overrides.items():
        node: dict[str, Any] = result
        *parents, leaf = dotted.split(".")
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        node[leaf] = value
    return result


def parse_config(cls: type[C], data: Mapping[str, Any], source: str = "config") -> C:
    """Validate ``data`` as ``cls``; the first problem becomes a one-line :class:`ConfigError`.

    ``source`` names where the data came from (a path, the command line) in that line.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(cls, error)}") from None


def load_config(cls: type[C], path: str | Path, overrides: Mapping[str, Any] | None = None) -> C:
    """Load a YAML file as ``cls`` with dotted ``overrides`` on top."""
    return parse_config(cls, apply_overrides(load_yaml(path), overrides or {}), str(path))


def dump_yaml(config: Config) -> str:
    """Return the fully resolved config as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaf_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield ``(dotted key, annotation, default, description)`` for every leaf of a config class, depth first.

    A union of config classes (a choice of architecture, say) yields the keys of all its members, each key once.
    """
    seen: set[str] = set()
    for name, field in cls.model_fields.items():
        members = config_members(field.annotation)
        if not members:
            yield prefix + name, field.annotation, field.get_default(call_default_factory=True), field.description or ""
        for member in members:
            for leaf in leaf_fields(member, f"{prefix}{name}."):
                if leaf[0] not in seen:
                    seen.add(leaf[0])
                    yield leaf


def config_members(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes an annotation is made of: itself, or the members of a union; [] for plain values."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in config_members(a)]
    if origin is typing.Annotated:
        return config_members(typing.get_args(annotation)[0])
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _one_line(cls: type[BaseModel], error: ValidationError) -> str:
    # A typo shows as an unknown key and a missing one; the unknown key is the one to name.
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part, problem["loc"]))
    rest = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = [leaf[0] for leaf in leaf_fields(cls)] + list(cls.model_fields)
        return f"unknown key '{key}'{nearest(key, known)}{rest}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing; it has no default{rest}"
    message = problem["msg"].removeprefix("Value error, ")
    place = f"'{key}': " if key else ""
    given = f", got {problem['input']!r}" if problem["type"] != "value_error" else ""
    return f"{place}{message[0].lower() + message[1:]}{given}{rest}"


def _is_union_tag(part: Any, loc: tuple[Any, ...]) -> bool:
    """Pydantic puts a discriminated union's tag into the location; it is no key that the user wrote."""
    at = loc.index(part)
    return isinstance(part, str) and 0 < at < len(loc) - 1 and loc[at - 1] in ("sae", "method", "schedule", "gradient")
