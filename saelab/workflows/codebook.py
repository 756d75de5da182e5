"""Codebook: train a model around codebooks at its attention-output and MLP-output sites, on a text or on TokFSM."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from saelab.core.artifacts import MANIFEST, atomic_writer, check_output, prepare_output
from saelab.core.config import Config, dump_yaml
from saelab.core.errors import ConfigError, ResumeError, TextError
from saelab.models.pretrain_config import PretrainConfig
from saelab.sae.codebook import CodebookConfig
from saelab.training.codebooks import CodebookTraining, fit_codebooks, next_token_loss
from saelab.training.tokfsm import TokFSM, TokFSMConfig, make_tokfsm
from saelab.workflows.corpus import CorpusJob, provenance

if TYPE_CHECKING:
    from saelab.models.subject import SubjectModel
    from saelab.models.tokens import TokenRows
    from saelab.training.codebook_model import CodebookModel

KINDS = {"attention": "attn.hook_z", "mlp": "hook_mlp_out"}
"""Sites by kind: the heads' outputs before W_O, and the MLP's output."""

SiteKind = Literal["attention", "mlp"]


class NewModel(Config):
    """A small GPT-2 that learns TokFSM from nothing."""

    n_layers: int = Field(default=2, ge=1)
    """Blocks."""
    d_model: int = Field(default=64, ge=8)
    """Width of the residual stream."""
    n_heads: int = Field(default=4, ge=1)
    """Heads per block."""


class CodebookJob(CorpusJob):
    """What ``saelab codebook`` needs."""

    tokfsm: TokFSMConfig | None = None
    """Train a new model on this finite state machine instead of fine-tuning ``model`` on ``text``."""
    new_model: NewModel = NewModel()
    """That new model."""
    sites: list[SiteKind] = Field(default_factory=lambda: list[SiteKind](["attention"]))
    """Where codebooks go: at the heads' outputs (one for each head), at the MLPs' outputs; []: nowhere (control)."""
    layers: list[int] | None = None
    """Blocks with codebooks; null: all."""
    codebook: CodebookConfig = CodebookConfig()
    """The codebooks."""
    training: CodebookTraining = CodebookTraining()
    """The training."""
    max_rows: int = Field(default=20_000, ge=1)
    """Rows of text to learn from."""
    heldout: str = "stdlib:heldout"
    """Text to measure on."""
    eval_rows: int = Field(default=64, ge=1)
    """Rows to measure on."""


@dataclass(frozen=True)
class CodebookReport:
    """A finished training."""

    folder: Path
    """The folder of the model."""
    metrics: dict[str, float]
    """``loss`` on unseen text and, of a fine-tuned model, ``loss_before`` (as it was, without codebooks); on TokFSM
    ``transition_accuracy`` of what it writes and ``chance``."""


def run_codebook(job: CodebookJob, out: str | Path, *, force: bool = False, resume: bool = False) -> CodebookReport:
    """Train the model of ``job`` with its codebooks and write it to ``out``."""
    from saelab.training.checkpoint import CHECKPOINT
    from saelab.training.codebook_model import add_codebooks, save_codebook_model

    if not resume:
        check_output(out, force=force)
    text = _text(job) if job.tokfsm is None else None  # what is wrong with it shows before an old result is deleted
    folder = prepare_output(out, force=force, resume=resume)
    if (folder / MANIFEST).exists():
        raise ResumeError(f"the training in {folder} is finished; there is nothing to resume")
    with atomic_writer(folder / "config.yaml") as file:
        file.write(dump_yaml(job).encode())
    subject, source = text or _tokfsm(job, folder)
    before = None if job.tokfsm is not None else _mean_loss(subject.logits, _heldout(job, subject), job.training.rows)
    model = add_codebooks(subject, _sites(job, subject), job.codebook, job.training.seed)
    result = fit_codebooks(model, source, job.training, folder, resume=resume)
    metrics = {"training_loss": result.loss, "dead_fraction": result.dead_fraction}
    if isinstance(source, FSMTokens):
        metrics |= fsm_metrics(model, source.machine, job.eval_rows, job.training.seed + 1)
    else:
        metrics |= {"loss": _mean_loss(model.logits, _heldout(job, subject), job.training.rows)}
        metrics |= {} if before is None else {"loss_before": before}
    # a model made for a finite state machine comes from no other
    origin = {"model": job.model if job.tokfsm is None else None}
    about = {"metrics": metrics, "training": asdict(result), "provenance": {**provenance(job, subject), **origin}}
    save_codebook_model(model, folder, {**about, "text": source.describe()})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return CodebookReport(folder, metrics)


def fsm_metrics(model: "CodebookModel", machine: TokFSM, rows: int, seed: int) -> dict[str, float]:
    """Loss on new walks, and the share of existing transitions in what the model writes after one given state."""
    generator = torch.Generator().manual_seed(seed + 10**6)
    tokens = machine.sample(rows, generator)
    keep = tokens != machine.bos
    prompt = 1 + machine.config.digits
    written = model.generate(tokens[:, :prompt], tokens.shape[1] - prompt, seed=seed)
    return {
        "loss": float(next_token_loss(model.logits(tokens), tokens, keep)),
        "transition_accuracy": machine.accuracy(written, prompt),
        "chance": machine.config.edges / machine.config.states,
    }


class FSMTokens:
    """Endless new walks; a step's are drawn from the seed and its number."""

    def __init__(self, machine: TokFSM, rows: int, seed: int) -> None:
        self.machine, self._rows, self._seed = machine, rows, seed

    def batch(self, step: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return the walks of a step."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        tokens = self.machine.sample(self._rows, generator)
        return tokens, tokens != self.machine.bos

    def describe(self) -> dict[str, Any]:
        """Return the machine's config."""
        return {"tokfsm": self.machine.config.model_dump(mode="json"), "rows": self._rows}


class RowTokens:
    """Rows of text held in memory, in a new order each epoch."""

    def __init__(self, rows: "TokenRows", n: int, per_batch: int, seed: int) -> None:
        batch = next(iter(rows.batches(n)), None)
        if batch is None or batch.tokens.shape[0] < per_batch:
            found = 0 if batch is None else batch.tokens.shape[0]
            raise TextError(f"the text gives {found} rows, fewer than the {per_batch} of a step; give more text")
        self._tokens, self._keep = batch.tokens.int(), batch.keep
        self._per_batch, self._seed, self._about = per_batch, seed, rows.describe()

    def batch(self, step: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return the rows of a step."""
        per_epoch = len(self._tokens) // self._per_batch
        epoch, number = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._tokens), generator=generator)
        chosen = order[number * self._per_batch : (number + 1) * self._per_batch]
        return self._tokens[chosen].long(), self._keep[chosen]

    def describe(self) -> dict[str, Any]:
        """Return the text and how many rows of it."""
        return {**self._about, "rows_in_memory": len(self._tokens), "rows": self._per_batch}


def _text(job: CodebookJob) -> tuple["SubjectModel", RowTokens]:
    model = job.load()
    return model, RowTokens(job.rows(model), job.max_rows, job.training.rows, job.training.seed)


def _tokfsm(job: CodebookJob, folder: Path) -> tuple["SubjectModel", FSMTokens]:
    from saelab.models.gpt2 import build_gpt2
    from saelab.models.loading import quiet
    from saelab.models.subject import load_model

    assert job.tokfsm is not None
    machine = make_tokfsm(job.tokfsm)
    shape = {"n_layers": job.new_model.n_layers, "d_model": job.new_model.d_model, "n_heads": job.new_model.n_heads}
    # PretrainConfig speaks of text; of it, only the sizes matter here.
    sizes = PretrainConfig(**shape, context=max(8, job.tokfsm.length + 1), seed=job.training.seed)
    plain = build_gpt2(sizes.model_copy(update={"vocab_size": machine.d_vocab}), machine.bos)
    with quiet():
        plain.save_pretrained(folder / "start", safe_serialization=True)
    model = load_model(str(folder / "start"), device=job.device)
    return model, FSMTokens(machine, job.training.rows, job.training.seed)


def _sites(job: CodebookJob, model: "SubjectModel") -> list[str]:
    layers = range(model.n_layers) if job.layers is None else job.layers
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise ConfigError(f"layers: {layer}, but {model.name} has layers 0 to {model.n_layers - 1}")
    return [f"blocks.{layer}.{suffix}" for layer in layers for kind, suffix in KINDS.items() if kind in job.sites]


def _heldout(job: CodebookJob, model: "SubjectModel") -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    rows = job.model_copy(update={"text": job.heldout}).rows(model)
    batch = next(iter(rows.batches(job.eval_rows)), None)
    if batch is None:
        raise TextError(f"{job.heldout} has no rows to measure on; give another --heldout")
    return batch.tokens, batch.keep


@torch.no_grad()
def _mean_loss(logits: Any, text: tuple[Tensor, Tensor], rows: int) -> float:
    """Mean next-token loss over a text, some rows at a time."""
    tokens, keep = text
    total, count = 0.0, 0
    for start in range(0, len(tokens), rows):
        part, kept = tokens[start : start + rows], keep[start : start + rows]
        n = int(kept[:, 1:].sum())
        if n:
            total += n * float(next_token_loss(logits(part), part, kept))
        count += n
    return total / max(count, 1)
