"""How a function of the public API becomes a job: what it was given, objects or names, as the keys of the command.

One convention for all of them. A function is a command of the CLI: its first arguments are the command's, every key of
the command is a keyword with the same name, meaning and default, nested keys are mappings (``sae={"k": 16}``) or dotted
(``**{"sae.k": 16}``). Where a key names a model, an SAE, a store or a text, the open object is taken as well.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from saelab.activations.store import ActivationStore
from saelab.core.assets import resolve_config
from saelab.core.config import Config, apply_overrides, leaf_fields, load_yaml, parse_config
from saelab.core.errors import ConfigError, nearest
from saelab.core.named import Named
from saelab.features.store import FeatureStore
from saelab.models.subject import SubjectModel
from saelab.models.text import TextSource, open_text
from saelab.sae.base import SAE
from saelab.training.loop import FitResult
from saelab.workflows.trained import Training

J = TypeVar("J", bound=Config)
F = TypeVar("F", bound=Callable[..., Any])
TEXTS = ("text", "calibration")
"""Keys that name a text, for which a list of documents may stand."""


def job_of(cls: type[J], function: str, first: Any = None, **keys: Any) -> J:
    """Return the job that a call of ``saelab.<function>`` describes.

    ``first`` is a job, a mapping, or a YAML file whose keys the others override; keys that are None were not given.
    Raises :class:`ConfigError` for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    given = {key: plain(value, key) for key, value in keys.items() if value is not None}
    for key in given:
        known = {name for leaf, *_ in leaf_fields(cls) for name in (leaf, leaf.split(".")[0])} | set(cls.model_fields)
        if key not in known and key.split(".")[0] not in cls.model_fields:
            raise ConfigError(f"saelab.{function}: unknown key '{key}'{nearest(key, known)}")
    if isinstance(first, cls):
        if not given:
            return first
        base, source = first.model_dump(exclude_unset=True), f"saelab.{function}"
    elif isinstance(first, Mapping):
        base, source = plain(first), f"saelab.{function}"
    elif first is None:
        base, source = {}, f"saelab.{function}"
    else:
        base, source = load_yaml(resolve_config(first)), str(first)
    return parse_config(cls, _merged(base, given), source)


def plain(value: Any, key: str = "") -> Any:
    """Return a value as a job holds it: open objects by name, with the object beside it where it can be used as it is.

    Stores and trained SAEs are read again from their folder, which is cheap; a model, an SAE in memory and a text are
    handed on.
    """
    if isinstance(value, Mapping):
        return {name: plain(part, str(name)) for name, part in value.items()}
    if isinstance(value, ActivationStore | FeatureStore | FitResult | Training):
        value = value.path
    elif isinstance(value, SAE):
        value = Named(str(value.folder or f"<{type(value).__name__} in memory>"), value)
    elif key.rpartition(".")[2] in TEXTS and not isinstance(value, str | Path):
        value = open_text(value)
    elif isinstance(value, list | tuple):
        value = [plain(part) for part in value]
    if isinstance(value, SubjectModel | TextSource):
        value = Named(value.name, value)
    return str(value) if isinstance(value, Path) else value


def model_keys(model: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a model which is open already settles: revision, dtype, device."""
    if not isinstance(model, SubjectModel):
        return {}
    own = {
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return {key: value for key, value in own.items() if keys.get(key) is None}


def described_by(job: type[Config]) -> Callable[[F], F]:
    """Give a function the signature and the documentation of all keys of its job (for help() and completion)."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        known = {p.name for p in own}
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=field.annotation)
            for name, field in job.model_fields.items()
            if name not in known
        ]
        function.__signature__ = signature.replace(parameters=[*own, *extra, *rest])  # type: ignore[attr-defined]
        lines = [f"        {key}: {' '.join(text.split())}" for key, _, _, text in leaf_fields(job)]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nKeys of {job.__name__}:\n\n" + "\n".join(
            line[4:] for line in lines
        )
        return function

    return decorate


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the given keys on top; a mapping over a mapping overrides key by key."""
    result = dict(base)
    for key, value in given.items():
        if "." in key:
            result = apply_overrides(result, {key: value})
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result
