"""``DarkMatter``: everything ``saelab dark-matter`` found, and its folder on disk.

The folder (kind ``dark-matter``) holds ``dark_matter.json`` (all results), ``tokens.safetensors`` (error norms of every
token), ``maps.safetensors`` (the linear maps, so that a prompt's error can be split later) and ``report.html``.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from saelab import __version__
from saelab.analysis.dark_matter import decomposition, earlier, error_saes, pursued
from saelab.analysis.dark_matter.decomposition import Decomposition
from saelab.analysis.dark_matter.downstream import Downstream
from saelab.analysis.dark_matter.earlier import FromEarlier
from saelab.analysis.dark_matter.error_saes import ErrorSae
from saelab.analysis.dark_matter.findings import Finding, findings
from saelab.analysis.dark_matter.introduced import Introduced
from saelab.analysis.dark_matter.pursued import PursuitResult
from saelab.analysis.dark_matter.scaling import ScalingFit, TokenScaling
from saelab.core.artifacts import (
    atomic_writer,
    read_json,
    read_manifest,
    read_safetensors,
    write_json,
    write_manifest,
    write_safetensors,
)
from saelab.core.errors import CorruptError
from saelab.core.regression import LinearMap
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

KIND = "dark-matter"
RESULTS, TOKENS, MAPS, REPORT = "dark_matter.json", "tokens.safetensors", "maps.safetensors", "report.html"
T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class DarkMatter(Result):
    """Results of one run; parts that were left out are None or empty."""

    main: str
    """Name of the SAE that the single-SAE parts are about."""
    site: str
    """Where in the model."""
    model: str
    """The model's name."""
    model_fingerprint: str
    """Its fingerprint."""
    text: str
    """The text of the store."""
    store_fingerprint: str
    """Fingerprint of the store's content."""
    saes: dict[str, str]
    """Folder of each SAE, by name, in order of width."""
    decompositions: list[Decomposition]
    """Linear and nonlinear error of each SAE, in order of width."""
    scaling: ScalingFit | None = None
    """Scaling law over the ladder."""
    token_scaling: list[TokenScaling] = field(default_factory=list)
    """Error norm per token between all pairs of SAEs."""
    introduced: Introduced | None = None
    """The synthetic model."""
    downstream: Downstream | None = None
    """Effect on the model's predictions."""
    pursuit: list[PursuitResult] = field(default_factory=list)
    """The encoder against pursuit."""
    earlier: list[FromEarlier] = field(default_factory=list)
    """Error from earlier SAEs."""
    error_saes: list[ErrorSae] = field(default_factory=list)
    """SAEs trained on the error."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know about the data."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved settings of the run."""
    saelab_version: str = __version__
    """Version that took the numbers."""
    tokens: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Per chosen token of the store: ``context``, ``position``, ``token_id``, ``fit``, ``x`` (``||x||^2``), and for
    each SAE ``NAME/total``, ``NAME/linear``, ``NAME/nonlinear`` (squared norms of e, l, eta)."""
    maps: dict[str, LinearMap] = field(default_factory=dict, repr=False)
    """The linear map ``l = map(x)`` of each SAE."""

    @property
    def decomposition(self) -> Decomposition:
        """Decomposition of the main SAE."""
        return next(d for d in self.decompositions if d.name == self.main)

    def findings(self) -> list[Finding]:
        """The paper's findings, each with what was measured here, the control, and whether it holds."""
        return findings(self)

    def to_dict(self) -> dict[str, Any]:
        """Every number but the per-token arrays and maps, as plain values; the findings too."""
        own = {f.name: _plain(getattr(self, f.name)) for f in _stored_fields()}
        return {**own, "findings": [_plain(f) for f in self.findings()]}

    def to_frame(self) -> "pd.DataFrame":
        """One row per SAE."""
        return decomposition.to_frame(self.decompositions)

    def frames(self) -> "dict[str, pd.DataFrame]":
        """Return every table of the report: name -> frame."""
        import pandas as pd

        tables = {
            "findings": pd.DataFrame([vars(f) for f in self.findings()]),
            "decompositions": self.to_frame(),
            "token_scaling": pd.DataFrame([vars(t) for t in self.token_scaling]),
            "pursuit": pursued.frame(self.pursuit),
            "earlier": earlier.frame(self.earlier),
            "error_saes": error_saes.frame(self.error_saes),
        }
        if self.introduced is not None:
            tables["introduced"] = self.introduced.to_frame()
        if self.downstream is not None:
            tables["downstream"] = self.downstream.to_frame()
        return {name: table for name, table in tables.items() if len(table)}

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Return every figure of the report with the numbers that are drawn: name -> (figure, frame)."""
        from saelab.analysis.dark_matter.figures import figures

        return figures(self)

    def __repr__(self) -> str:
        d = self.decomposition
        return (
            f"DarkMatter({self.main} at {self.site}: FVU {d.fvu:.4f} = linear {d.fvu_linear:.4f} + nonlinear "
            f"{d.fvu_nonlinear:.4f}, R2 of the error {d.r2:.3f}; {len(self.saes)} SAEs, {d.n_test:,} test tokens)"
        )


def save_dark_matter(result: DarkMatter, folder: str | Path) -> Path:
    """Write a result into ``folder``, which must exist, the report too; the manifest comes last."""
    from saelab.analysis.dark_matter.report import report_html

    folder = Path(folder)
    write_json(folder / RESULTS, result.to_dict())
    arrays = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in result.tokens.items()}
    write_safetensors(folder / TOKENS, arrays)
    maps: dict[str, torch.Tensor] = {}
    for name, linear in result.maps.items():
        maps |= {f"{name}/weight": linear.weight, f"{name}/bias": linear.bias}
        maps[f"{name}/size"] = torch.tensor([linear.rank, linear.n])
    write_safetensors(folder / MAPS, maps)
    with atomic_writer(folder / REPORT) as file:
        file.write(report_html(result).encode())
    main = result.decomposition
    headline = {"fvu": main.fvu, "fvu_nonlinear": main.fvu_nonlinear, "r2": main.r2, "n_test": main.n_test}
    about = {"main": result.main, "site": result.site, "model": result.model, "text": result.text, "saes": result.saes}
    write_manifest(folder, KIND, {**about, **headline, "report": REPORT})
    return folder


def load_dark_matter(folder: str | Path) -> DarkMatter:
    """Read what :func:`save_dark_matter` wrote."""
    folder = Path(folder)
    read_manifest(folder, KIND)
    data = read_json(folder / RESULTS)
    names = {f.name for f in _stored_fields()}
    if not isinstance(data, dict) or set(data) - {"findings"} != names:
        raise CorruptError(f"{folder / RESULTS} does not have the fields of a dark-matter result; run it again")
    hints = typing.get_type_hints(DarkMatter, globalns=_types())
    values = {name: _restored(hints[name], data[name], folder / RESULTS) for name in names}
    stored = read_safetensors(folder / MAPS)
    maps: dict[str, LinearMap] = {}
    for name in values["saes"]:
        if f"{name}/weight" not in stored:
            raise CorruptError(f"{folder / MAPS} has no map of {name}; run it again")
        rank, n = stored[f"{name}/size"].tolist()
        maps[name] = LinearMap(stored[f"{name}/weight"], stored[f"{name}/bias"], rank, n)
    tokens = {name: tensor.numpy() for name, tensor in read_safetensors(folder / TOKENS).items()}
    return DarkMatter(**values, tokens=tokens, maps=maps)


def _stored_fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(DarkMatter) if f.name not in ("tokens", "maps")]


def _types() -> dict[str, Any]:
    return {**globals(), **vars(decomposition), **vars(typing)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _restored(hint: Any, value: Any, path: Path) -> Any:
    """Inverse of ``_plain``: dataclasses by their annotations; null where a number belongs is nan."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _restored(next(a for a in arguments if a is not type(None)), value, path)
    if hint is float:
        return float("nan") if value is None else float(value)
    if origin is list and isinstance(value, list):
        return [_restored(arguments[0], v, path) for v in value]
    if origin is dict and isinstance(value, dict):
        return {k: _restored(arguments[1], v, path) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict) or set(value) != {f.name for f in dataclasses.fields(hint)}:
            raise CorruptError(f"{path} does not hold a {hint.__name__} where one belongs; run it again")
        hints = typing.get_type_hints(hint)
        return hint(**{k: _restored(hints[k], v, path) for k, v in value.items()})
    return value
