"""The essential-sparsity curve: held-out loss against one-shot sparsity, and where it leaves the dense model's.

Jaiswal et al. 2023 (arXiv 2306.03805) call essential sparsity the point after which the loss falls apart. Two readings
of it, both given: the *knee*, the breakpoint of the continuous two-segment line that fits the curve best (our
definition of "the drop"), and the largest sparsity at which the loss is at most 1 % or 5 % above the dense loss.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from saelab.core.artifacts import check_output, prepare_output, write_json, write_manifest
from saelab.core.errors import ConfigError
from saelab.core.progress import progress
from saelab.core.result import Result
from saelab.sparsity.layers import linear_layers
from saelab.sparsity.measure import measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.sparsify import ROWS_PER_BATCH, sparsify
from saelab.workflows.sparsify import SparsifyJob

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

GROUP = 8
"""M of the N:M curve: N = 7 ... 1 gives sparsities 1/8 ... 7/8."""


class CurveJob(SparsifyJob):
    """A model, a method, and the sparsities to try."""

    recipe: Recipe = Recipe.model_validate({"method": {"name": "magnitude"}, "pattern": "layer", "sparsity": 0.5})
    """Method, pattern and allocation; its sparsity is varied."""
    sparsities: tuple[float, ...] = tuple(round(0.05 * k, 2) for k in range(20))
    """Unstructured sparsities."""
    n_of_m: bool = True
    """Also prune N of every 8, for N = 7 ... 1."""


@dataclass(frozen=True, repr=False)
class Curve(Result):
    """Loss against sparsity."""

    model: str
    """The dense model."""
    method: str
    """Pruning method."""
    points: tuple[dict[str, Any], ...]
    """pattern, sparsity (as counted), loss_dense, loss, kl."""
    essential: dict[str, dict[str, float]]
    """Per pattern: ``knee``, ``within 1 %``, ``within 5 %``."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per pruned model."""
        import pandas as pd

        return pd.DataFrame(list(self.points))

    def essential_frame(self) -> "pd.DataFrame":
        """One row per pattern."""
        import pandas as pd

        return pd.DataFrame([{"pattern": name, **values} for name, values in self.essential.items()])

    def __repr__(self) -> str:
        knees = ", ".join(f"{name} {found['knee']:.0%}" for name, found in self.essential.items())
        return f"Curve({self.model}, {self.method}: {len(self.points)} sparsities, knee at {knees})"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Loss against sparsity, with the knees marked."""
        from saelab.core import plotting

        figure, frame = plotting.figure(height=360), self.to_frame()
        for colour, (pattern, part) in zip(plotting.PALETTE, frame.groupby("pattern", sort=False), strict=False):
            figure.add_scatter(
                x=part["sparsity"], y=part["loss"], mode="lines+markers", name=pattern, line_color=colour
            )
            figure.add_vline(x=self.essential[str(pattern)]["knee"], line_dash="dot", line_color=colour)
        figure.update_xaxes(title_text="share of weights removed")
        figure.update_yaxes(title_text="held-out loss (nats per token)", type="log")
        return {"loss": (figure, frame)}


def run_curve(job: CurveJob, out: str | Path | None = None, *, force: bool = False) -> Curve:
    """Prune and measure at each sparsity; with ``out``, write ``curve.json`` and ``curve.html`` there."""
    if out is not None:
        check_output(out, force=force)
    if len(set(job.sparsities)) < 4:
        raise ConfigError(f"a curve needs at least 4 different sparsities, got {len(set(job.sparsities))}")
    base = job.recipe.model_dump()
    tries = [(job.recipe.pattern or "row", {**base, "sparsity": s}) for s in sorted(set(job.sparsities))]
    if job.n_of_m:
        of = [
            {**base, "pattern": f"{n}:{GROUP}", "sparsity": None, "allocation": "uniform"}
            for n in range(GROUP - 1, 0, -1)
        ]
        tries += [(f"N:{GROUP}", recipe) for recipe in of]
    dense, model = job.load(), job.load()
    layers = linear_layers(model.plain, job.recipe.include, job.recipe.exclude)
    original = {layer.name: layer.weight.clone() for layer in layers}
    rows = job.read(model, job.calibration, job.recipe.calibration_tokens)
    held_out = list(job.read(model, job.text, job.eval_tokens).batches(ROWS_PER_BATCH))
    points = []
    with progress("curve", len(tries), "models") as bar:
        for pattern, data in tries:
            for layer in layers:
                layer.weight.copy_(original[layer.name])
            done = sparsify(model, rows, Recipe.model_validate(data), seed=job.seed)
            cost = measure(dense, model, held_out)
            points.append(
                {
                    "pattern": pattern,
                    "sparsity": done.sparsity,
                    "loss_dense": cost.loss_dense,
                    "loss": cost.loss_sparse,
                    "kl": cost.kl,
                }
            )
            bar.advance(1)
    essential = {name: _essential([p for p in points if p["pattern"] == name]) for name, _ in tries}
    curve = Curve(job.model, job.recipe.method.name, tuple(points), essential)
    if out is not None:
        folder = prepare_output(out, force=force)
        write_json(folder / "curve.json", curve.to_dict())
        (folder / "curve.html").write_text(curve.plot().to_html(include_plotlyjs=True), encoding="utf-8")
        write_manifest(folder, "sparsity-curve", {"model": job.model, "method": curve.method, "essential": essential})
    return curve


def _essential(points: list[dict[str, Any]]) -> dict[str, float]:
    s = np.array([p["sparsity"] for p in points])
    loss = np.array([p["loss"] for p in points])
    dense = points[0]["loss_dense"]
    found = {"knee": knee(s, loss)}
    for share, name in ((0.01, "within 1 %"), (0.05, "within 5 %")):
        fine = loss <= dense * (1 + share)
        # The largest sparsity up to which every point is fine, not a lucky one beyond.
        found[name] = float(s[: int(np.argmin(fine)) if not fine.all() else len(s)].max(initial=0.0))
    return found


def knee(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Return the inner x at which the best continuous line of two straight segments bends (least squares)."""
    best, where = np.inf, float(x[0])
    for at in x[1:-1]:
        design = np.stack([np.ones_like(x), x, np.maximum(x - at, 0.0)], axis=1)
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        rest = float(((design @ solution - y) ** 2).sum())
        if rest < best - 1e-15:
            best, where = rest, float(at)
    return where
