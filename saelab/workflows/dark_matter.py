"""Dark matter: SAE folders and an activation store in, one result folder with a report out."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from saelab.core.artifacts import prepare_output
from saelab.core.config import Config, dump_yaml
from saelab.core.named import Ref

if TYPE_CHECKING:
    from saelab.analysis.dark_matter.result import DarkMatter
    from saelab.analysis.dark_matter.tokens import Tokens
    from saelab.core.regression import LinearMap
    from saelab.workflows.dark_matter_inputs import Inputs


class ErrorSaesJob(Config):
    """SAEs trained on the error and its parts."""

    tokens: int = Field(default=500_000, ge=0)
    """Tokens to train each on; 0 leaves them out."""
    expansion: int = Field(default=16, ge=1)
    """Features per dimension."""
    k: int = Field(default=32, ge=1)
    """Active features per token."""
    batch_size: int = Field(default=2048, ge=1)
    """Tokens per step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    store: str | None = None
    """Activation store to train them on; default: the contexts of --store that the linear fit may see."""


class DarkMatterJob(Config):
    """What ``saelab dark-matter`` needs."""

    sae: str
    """SAE folder: the one that the single-SAE parts are about."""
    store: str
    """Activation store to measure on; best of text that no SAE was trained on."""
    site: str | None = None
    """Site, if the SAE does not record it."""
    ladder: list[str] = Field(default_factory=list)
    """More SAEs of the same site, as SAE folders or as the folder of a grid; four widths or more give a scaling law."""
    earlier: list[str] = Field(default_factory=list)
    """SAE folders at other sites that the store holds."""
    max_tokens: int = Field(default=300_000, ge=1)
    """Tokens of the store to look at."""
    skip_positions: int = Field(default=16, ge=0)
    """Positions left out at the start of each context (the paper leaves out 200 of 1,024)."""
    fit_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the contexts that fits may see; everything is measured on the others."""
    model_parts: bool = True
    """Run the model: loss baselines and downstream effect."""
    model: Ref | None = None
    """Subject model, if not found under the name recorded in the store."""
    text: Ref | None = None
    """The store's text, if not found under the name recorded in the store."""
    column: str = "text"
    """Column that holds the text."""
    device: str = "cpu"
    """Torch device of the model."""
    downstream_tokens: int = Field(default=30_000, ge=0)
    """Test tokens of the downstream part; 0 leaves it out."""
    pursuit_tokens: int = Field(default=10_000, ge=0)
    """Tokens of the fit, and as many of the test, that pursuit codes; 0 leaves it out."""
    synthetic_tokens: int = Field(default=20_000, ge=0)
    """Tokens of the synthetic introduced-error model; 0 leaves it out."""
    error_saes: ErrorSaesJob = Field(default_factory=ErrorSaesJob)
    """SAEs trained on the error."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split, the controls and the synthetic noise."""


def run_dark_matter(
    job: DarkMatterJob, out: str | Path, *, force: bool = False, say: Callable[[str], None] = lambda text: None
) -> "DarkMatter":
    """Run every part that ``job`` asks for and write the result folder ``out``."""
    from saelab.analysis.dark_matter.result import save_dark_matter
    from saelab.workflows.dark_matter_inputs import Inputs

    inputs = Inputs(job)  # what a user can get wrong shows before an old result is deleted
    folder = prepare_output(out, force=force)
    # The settings mark the folder as saelab's own while the parts run, so that --force may replace an interrupted one.
    (folder / "config.yaml").write_text(dump_yaml(job), encoding="utf-8")
    try:
        result = _run(job, inputs, folder, say)
        save_dark_matter(result, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a result is of no use
        raise
    return result


def _run(job: DarkMatterJob, it: "Inputs", folder: Path, say: Callable[[str], None]) -> "DarkMatter":
    import numpy as np

    from saelab.analysis.dark_matter.decompose import measure
    from saelab.analysis.dark_matter.decomposition import decompositions
    from saelab.analysis.dark_matter.losses import batch_rows, token_losses
    from saelab.analysis.dark_matter.result import DarkMatter
    from saelab.analysis.dark_matter.scaling import FEWEST_WIDTHS, fit_scaling, token_scaling

    tokens, site = it.tokens, it.site
    say(f"{tokens.n:,} tokens of {it.store.path}, {len(it.saes)} SAEs at {site}")
    measured = measure(tokens, site, it.saes, job.seed)
    losses: dict[str, np.ndarray] = {}
    if it.model is not None:
        per_batch = batch_rows(it.model.d_vocab, it.rows.context)
        losses = token_losses(it.model, it.rows, tokens, per_batch)
    found = decompositions(tokens, measured, {name: sae.d_sae for name, sae in it.saes.items()}, losses)
    widths = [d.d_sae for d in found]
    scaling = None
    if len(set(widths)) >= FEWEST_WIDTHS:
        columns = ([d.fvu for d in found], [d.fvu_nonlinear for d in found], [d.l0 for d in found])
        scaling = fit_scaling(widths, *columns)
    elif len(found) > 1:
        say(f"no scaling law: it needs {FEWEST_WIDTHS} widths, the ladder has {len(set(widths))}")
    norms = {name: (np.sqrt(p.total), np.sqrt(p.nonlinear)) for name, p in measured.saes.items()}
    pairs = token_scaling(norms, np.sqrt(measured.x_norm), tokens.fit.numpy(), job.seed)
    arrays = {
        "context": tokens.context.numpy(),
        "position": tokens.position.numpy(),
        "token_id": tokens.token_id.numpy(),
        "fit": tokens.fit.numpy(),
        "x": measured.x_norm,
    }
    for name, p in measured.saes.items():
        arrays |= {f"{name}/total": p.total, f"{name}/linear": p.linear_norm, f"{name}/nonlinear": p.nonlinear}
    maps = {name: p.linear for name, p in measured.saes.items()}
    return DarkMatter(
        main=it.main,
        site=site,
        model=str(it.store.manifest["model"]["name"]),
        model_fingerprint=str(it.store.manifest["model"]["fingerprint"]),
        text=str(it.store.manifest["text"].get("source", "")),
        store_fingerprint=it.store.fingerprint,
        saes={name: str(it.folders[name]) for name in it.saes},
        decompositions=found,
        scaling=scaling,
        token_scaling=pairs,
        notes=it.notes(),
        config=job.model_dump(mode="json"),
        tokens=arrays,
        maps=maps,
        **_single(job, it, maps[it.main], folder),
    )


def _single(job: DarkMatterJob, it: "Inputs", linear: "LinearMap", folder: Path) -> dict[str, Any]:
    """The parts that are about the main SAE alone."""
    from saelab.analysis.dark_matter.downstream import downstream
    from saelab.analysis.dark_matter.earlier import from_earlier
    from saelab.analysis.dark_matter.error_saes import train_on_errors
    from saelab.analysis.dark_matter.introduced import introduced_error
    from saelab.analysis.dark_matter.losses import batch_rows
    from saelab.analysis.dark_matter.pursued import compare_pursuit

    tokens, site, sae = it.tokens, it.site, it.saes[it.main]
    parts: dict[str, Any] = {}
    if it.model is not None and job.downstream_tokens:
        parts["downstream"] = downstream(
            it.model,
            it.rows,
            site,
            sae,
            linear,
            tokens,
            max_tokens=job.downstream_tokens,
            rows_per_batch=batch_rows(it.model.d_vocab, it.rows.context),
            seed=job.seed,
        )
    if job.pursuit_tokens:
        parts["pursuit"] = compare_pursuit(tokens.first(job.pursuit_tokens), site, sae)
    if it.earlier:
        parts["earlier"] = from_earlier(tokens, site, sae, linear, it.earlier, job.seed)
    if job.synthetic_tokens:
        some = tokens.first(job.synthetic_tokens // 2)
        x = torch.cat([chunk.x[site] for chunk in some.chunks(site)])
        parts["introduced"] = introduced_error(sae, x, some.fit, seed=job.seed)
    if job.error_saes.tokens:
        d_sae = job.error_saes.expansion * sae.d_in
        config = {"architecture": "topk", "d_sae": d_sae, "k": min(job.error_saes.k, d_sae)}
        training = {
            "tokens": job.error_saes.tokens,
            "batch_size": min(job.error_saes.batch_size, int(tokens.fit.sum())),
            "lr": job.error_saes.lr,
            "device": "cpu",
            "seed": job.seed,
        }
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            parts["error_saes"] = train_on_errors(
                tokens,
                site,
                sae,
                linear,
                scratch,
                sae_config=config,
                training=training,
                store=it.training_store,
                seed=job.seed,
            )
            _keep_error_saes(Path(scratch), folder / "error_saes")
    return parts


def _keep_error_saes(scratch: Path, folder: Path) -> None:
    """Keep the SAEs of e, l and eta themselves (not their Gaussian twins, nor the logs)."""
    from saelab.analysis.dark_matter.error_saes import PARTS

    folder.mkdir()
    for part in PARTS:
        shutil.move(str(scratch / part / part), str(folder / part))


def open_tokens(job: DarkMatterJob) -> "Tokens":
    """The tokens that ``job`` is about, split as it splits them (for notebooks that look closer)."""
    from saelab.workflows.dark_matter_inputs import Inputs

    return Inputs(job.model_copy(update={"model_parts": False})).tokens
