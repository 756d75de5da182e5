"""Sparsify: a model, a recipe and calibration text in; a normal model folder with masks and a report out."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from saelab.core.artifacts import check_output, prepare_output
from saelab.core.named import Ref
from saelab.core.result import Result
from saelab.models.tokens import TokensConfig
from saelab.sparsity.measure import measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.sparsify import ROWS_PER_BATCH, sparsify
from saelab.workflows.corpus import ModelJob

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.models.subject import SubjectModel
    from saelab.models.tokens import TokenRows


class SparsifyJob(ModelJob):
    """A model, how to prune it, and the texts to calibrate and to measure on."""

    recipe: Recipe = Recipe(sparsity=0.5)
    """Method, pattern, sparsity, allocation, layers."""
    calibration: Ref = "stdlib:train"
    """Text whose activations tell which weights matter."""
    text: Ref = "stdlib:heldout"
    """Held-out text on which the sparse model is compared with the dense one."""
    column: str = "text"
    """Column that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    context: int | None = Field(default=None, ge=2)
    """Tokens per row; the model's context when not given."""
    eval_tokens: int = Field(default=32_768, gt=0)
    """Positions of held-out text."""
    seed: int = 0
    """Seed of what is drawn at random."""

    def read(self, model: "SubjectModel", text: str, positions: int | None) -> "TokenRows":
        """Open a text as rows for ``model``."""
        from saelab.models.text import open_text
        from saelab.models.tokens import TokenRows

        context = min(self.context or model.n_ctx, model.n_ctx)
        rows = None if positions is None else max(1, positions // context)
        config = TokensConfig(context=context, max_rows=rows)
        return TokenRows(model.tokenizer, open_text(text, column=self.column), config, model.n_ctx)


@dataclass(frozen=True, repr=False)
class SparsityReport(Result):
    """A model before and after pruning."""

    model: str
    """The dense model."""
    recipe: dict[str, Any]
    """The recipe, resolved."""
    sparsity: float
    """Share of the prunable layers' weights that are zero or cut away, as counted."""
    cost: dict[str, Any]
    """Loss, perplexity and KL on held-out text (:class:`saelab.sparsity.measure.Cost`)."""
    seconds: float
    """Seconds of the pruning, calibration included."""
    calibration_tokens: int
    """Positions of calibration text that were run."""
    layers: tuple[dict[str, Any], ...]
    """Per layer: name, outputs, inputs, sparsity as counted, and the method's own facts."""
    path: str = ""
    """Folder of the sparse model."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per layer."""
        import pandas as pd

        return pd.DataFrame([{**{k: v for k, v in row.items() if k != "facts"}, **row["facts"]} for row in self.layers])

    def __repr__(self) -> str:
        return (
            f"SparsityReport({self.path}: {self.sparsity:.1%} of the weights of {self.model} removed by "
            f"{self.recipe['method']['name']}, held-out loss {self.cost['loss_dense']:.3f} -> "
            f"{self.cost['loss_sparse']:.3f} nats)"
        )

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Sparsity of each layer, as counted."""
        from plotly import graph_objects as go

        from saelab.core.plotting import BLUE, figure

        frame = self.to_frame()
        bars = go.Bar(y=frame["name"], x=frame["sparsity"], orientation="h", marker={"color": BLUE})
        axes = {"xaxis": {"title": "share of weights removed", "tickformat": ".0%", "range": [0, 1]}}
        axes["yaxis"] = {"title": "layer", "autorange": "reversed"}
        return {"layers": (figure(bars, height=90 + 22 * len(frame), **axes), frame)}


def run_sparsify(job: SparsifyJob, out: str | Path, *, force: bool = False) -> SparsityReport:
    """Prune ``job.model`` and write it to the folder ``out``, which every other command takes as a model.

    Raises ``ConfigError``, ``ModelError``, ``TextError``, ``ActivationError``, ``OutputExistsError``.
    """
    from saelab.sparsity.folder import write_model

    check_output(out, force=force)
    dense, model = job.load(), job.load()
    rows = job.read(model, job.calibration, job.recipe.calibration_tokens)
    done = sparsify(model, rows, job.recipe, seed=job.seed)
    held_out = job.read(model, job.text, job.eval_tokens)
    cost = measure(dense, model, held_out.batches(ROWS_PER_BATCH))
    folder = prepare_output(out, force=force)
    report = SparsityReport(
        model=job.model,
        recipe=job.recipe.model_dump(mode="json"),
        sparsity=done.sparsity,
        cost=cost.to_dict(),
        seconds=done.seconds,
        calibration_tokens=done.calibration_tokens,
        layers=tuple(asdict(layer) for layer in done.layers),
        path=str(folder),
    )
    provenance = {
        "calibration": job.calibration,
        "text": job.text,
        "seed": job.seed,
        "dense_fingerprint": dense.fingerprint,
        "dtype": job.dtype,
        "revision": job.revision,
    }
    write_model(model, folder, done.masks, done.tensors, {**report.to_dict(), **provenance})
    return report
