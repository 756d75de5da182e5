"""Pretrain: a language model from scratch, dense or sparse, in one training or in several."""

from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import read_json, write_json
from saelab.core.errors import ConfigError
from saelab.models.gpt2 import build_gpt2
from saelab.models.pretrain import PretrainResult, pretrain
from saelab.models.pretrain_config import PretrainConfig
from saelab.sparsity.folder import REPORT
from saelab.sparsity.measure import Cost, measure
from saelab.sparsity.training import SparseTraining, TrainingRecipe, targets_of_model
from saelab.workflows.sparse_cycles import run_cycles

ROWS_PER_BATCH = 16
KL_TOKENS = 32_768


class PretrainJob(PretrainConfig):
    """A pretraining, and how weights are kept sparse in it."""

    sparsity: TrainingRecipe | None = None
    """How the weights of the linear layers are kept sparse while they are trained; null: they are not."""
    dense: str | None = None
    """Dense model with the same tokenizer, such as this training without sparsity: loss and KL beside it are reported
    (with cycles, the first training is that model)."""


def run_pretrain(job: PretrainJob, out: str | Path, *, force: bool = False, resume: bool = False) -> PretrainResult:
    """Train ``job`` into the model folder ``out``.

    With ``sparsity`` the folder also holds ``masks.safetensors`` (one bit per weight) and ``sparsity.json``: zeros as
    counted per layer, average density, mask changes, seconds, and the cost against ``dense``.

    Raises what :func:`saelab.models.pretrain.pretrain` does, and ``ConfigError`` for a recipe that does not fit the
    model, before anything is written.
    """
    recipe = job.sparsity
    if recipe is None:
        if job.dense is not None:
            raise ConfigError(
                "dense compares a sparse model with a dense one, and nothing is sparse here; give sparsity"
            )
        return pretrain(job, out, force=force, resume=resume)
    if recipe.widen:
        job = widened(job, recipe)
        recipe = job.sparsity or recipe
    _check(job, recipe)
    dense = job.dense
    if recipe.cycles is not None:
        result, first = run_cycles(job, recipe, recipe.cycles, Path(out), force=force, resume=resume)
        dense = dense or str(first)
    else:
        result = pretrain(
            job,
            out,
            force=force,
            resume=resume,
            attach=lambda model, optimizer: attach(recipe, model, optimizer, job.steps),
        )
    if dense is not None and "cost" not in (report := read_json(result.folder / REPORT)):
        write_json(
            result.folder / REPORT, {**report, "dense": dense, "cost": cost(dense, result.folder, job).to_dict()}
        )
    return result


def widened(job: PretrainJob, recipe: TrainingRecipe) -> PretrainJob:
    """Return the job at the width of Sparse-IFT: d_model times sqrt(1 / (1 - s)), to a multiple of the heads.

    Every linear layer of a block grows in both directions, so its products at sparsity s are those of the dense layer;
    embeddings, unembedding and attention patterns grow too, which the paper's count leaves out.
    """
    if recipe.masks is not None or recipe.gradient.unpatterned or job.start is not None:
        raise ConfigError(
            "widen needs a sparsity or an N:M pattern in the recipe, and no start: that model has a width"
        )
    sparsity = recipe.pattern_for(recipe.sparsity).sparsity
    per_head = max(1, round(job.d_model * (1 - sparsity) ** -0.5 / job.n_heads))
    return job.model_copy(
        update={"d_model": per_head * job.n_heads, "sparsity": recipe.model_copy(update={"widen": False})}
    )


def attach(recipe: TrainingRecipe, model: Any, optimizer: torch.optim.Optimizer, steps: int) -> SparseTraining:
    """Return the engine of a recipe for a Hugging Face model's linear layers."""
    return SparseTraining(targets_of_model(model, recipe.include, recipe.exclude), recipe, optimizer, steps)


def cost(dense: str, sparse: Path, job: PretrainConfig) -> Cost:
    """Return loss and KL of two models on the held-out text. Raises ``ConfigError`` when their tokenizers differ."""
    from saelab.models.subject import load_model
    from saelab.models.text import open_text
    from saelab.models.tokens import TokenRows, TokensConfig

    models = load_model(dense), load_model(str(sparse))
    if models[0].tokenizer.get_vocab() != models[1].tokenizer.get_vocab():
        raise ConfigError(f"{dense} has another tokenizer than {sparse}, so their predictions cannot be compared")
    rows = TokensConfig(context=job.context, max_rows=max(1, KL_TOKENS // job.context))
    text = open_text(job.heldout, column=job.column)
    return measure(*models, TokenRows(models[0].tokenizer, text, rows, job.context).batches(ROWS_PER_BATCH))


def _check(job: PretrainConfig, recipe: TrainingRecipe) -> None:
    with torch.device("meta"):
        model = build_gpt2(job, bos=0)
    attach(recipe, model, torch.optim.SGD(model.parameters()), job.steps)
