"""Dark matter: SAE folders and an activation store in, one result folder with a report out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from saelab.core.artifacts import prepare_output, read_manifest
from saelab.core.config import Config
from saelab.core.errors import ConfigError, FormatError, SiteError, StoreError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.analysis.dark_matter.result import DarkMatter
    from saelab.analysis.dark_matter.tokens import Tokens
    from saelab.core.regression import LinearMap
    from saelab.sae.base import SAE


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
    model: str | None = None
    """Subject model, if not found under the name recorded in the store."""
    text: str | None = None
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

    opened = _Opened(job)  # what a user can get wrong shows before an old result is deleted
    folder = prepare_output(out, force=force)
    # The settings mark the folder as saelab's own while the parts run, so that --force may replace an interrupted one.
    (folder / "config.yaml").write_text(_settings(job), encoding="utf-8")
    result = _run(job, opened, folder, say)
    save_dark_matter(result, folder)
    return result


class _Opened:
    """Everything a job names, opened and checked against each other."""

    def __init__(self, job: DarkMatterJob) -> None:
        from saelab.activations.store import open_store
        from saelab.analysis.dark_matter.tokens import tokens_of_store

        self.store = open_store(job.store)
        main = _folders(job.sae)
        if len(main) > 1:
            raise ConfigError(
                f"{job.sae} holds {len(main)} SAEs ({', '.join(p.name for p in main)}); give one of them as SAE "
                "and the folder as --ladder"
            )
        self.folders = _named([*main, *(p for given in job.ladder for p in _folders(given))])
        self.saes = {name: _load(path) for name, path in self.folders.items()}
        self.main = next(iter(self.folders))
        self.site = job.site or _recorded(self.folders[self.main], "site") or _only_site(self.store, job)
        for name, path in self.folders.items():
            self._check(name, path, self.site)
        order = sorted(self.saes, key=lambda name: (self.saes[name].d_sae, name))
        self.saes = {name: self.saes[name] for name in order}
        self.earlier: dict[str, SAE] = {}
        for given in job.earlier:
            for path in _folders(given):
                site = _recorded(path, "site")
                if site is None or site == self.site:
                    raise ConfigError(
                        f"--earlier {path} records site {site}, expected an SAE of another site than {self.site}"
                    )
                self._check(str(path), path, site)
                self.earlier[site] = _load(path)
        self.tokens = tokens_of_store(
            self.store,
            self.site,
            max_tokens=job.max_tokens,
            skip_positions=job.skip_positions,
            fit_share=job.fit_share,
            seed=job.seed,
        )
        self.training_store = None if job.error_saes.store is None else open_store(job.error_saes.store)
        if self.training_store is not None:
            self.training_store.d_in(self.site)
            if self.training_store.fingerprint == self.store.fingerprint:
                self.training_store = None
        self.model: Any = None
        self.rows: Any = None
        if job.model_parts:
            self.model, self.rows = _model(job, self.store)

    def _check(self, name: str, path: Path, site: str) -> None:
        made_by = self.store.manifest["model"]
        recorded = _recorded(path, "model_fingerprint")
        if recorded is not None and recorded != made_by["fingerprint"]:
            raise StoreError(
                f"{path} was trained on {_recorded(path, 'model')} ({recorded}), but {self.store.path} is of "
                f"{made_by['name']} ({made_by['fingerprint']}); give a store of the same model"
            )
        own_site = _recorded(path, "site")
        if own_site is not None and own_site != site:
            raise ConfigError(f"{path} was trained at {own_site}, not at {site}; a ladder is of one site")
        width, d_in = self.store.d_in(site), self.saes[name].d_in if name in self.saes else _load(path).d_in
        if width != d_in:
            raise StoreError(
                f"{path} reads activations of width {d_in}, but {self.store.path} has width {width} at {site}; give a "
                "store of the site it was trained on"
            )

    def notes(self) -> list[str]:
        """What a reader should know."""
        notes = list(self.tokens.notes)
        for name, path in self.folders.items():
            if _recorded(path, "store_fingerprint") == self.store.fingerprint:
                notes.append(f"{name} was trained on this store: its error is smaller here than on other text")
        return notes


def _run(job: DarkMatterJob, it: _Opened, folder: Path, say: Callable[[str], None]) -> "DarkMatter":
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


def _single(job: DarkMatterJob, it: _Opened, linear: "LinearMap", folder: Path) -> dict[str, Any]:
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
    import shutil

    from saelab.analysis.dark_matter.error_saes import PARTS

    folder.mkdir()
    for part in PARTS:
        shutil.move(str(scratch / part / part), str(folder / part))


def _model(job: DarkMatterJob, store: "ActivationStore") -> tuple[Any, Any]:
    """Load the store's model and open its text, cut as in the harvest."""
    from saelab.models.tokens import TokensConfig
    from saelab.workflows.corpus import CorpusJob

    made_by, text = store.manifest["model"], store.manifest["text"]
    source = job.text or text.get("source")
    if source is None:
        raise StoreError(f"{store.path} does not record its text; give --text, or --model_parts false")
    keys = ("context", "packing", "bos", "min_tokens", "max_rows")
    corpus = CorpusJob(
        model=job.model or str(made_by["name"]),
        dtype=made_by["dtype"],
        device=job.device,
        text=str(source),
        column=job.column,
        tokens=TokensConfig(**{key: text[key] for key in keys if text.get(key) is not None}),
    )
    model = corpus.load()
    store.check_model(model)
    return model, corpus.rows(model)


def _folders(given: str | Path) -> list[Path]:
    """The SAE folder itself, or those in the folder of a training, by name."""
    path = Path(given)
    kind = read_manifest(path)["kind"]
    if kind == "sae":
        return [path]
    if kind != "run":
        raise FormatError(f"{path} is a saelab {kind} folder, expected an SAE or a training of several")
    found = sorted(p.parent for p in path.glob("*/manifest.json") if read_manifest(p.parent)["kind"] == "sae")
    if not found:
        raise FormatError(f"{path} is a run without SAEs directly below it; give the folder of saelab train")
    return found


def _named(folders: list[Path]) -> dict[str, Path]:
    """Names of SAEs: the folder's, with its parent's where two are alike; an SAE given twice counts once."""
    distinct = list({path.resolve(): path for path in folders}.values())
    names = [path.resolve().name for path in distinct]
    return {
        name if names.count(name) == 1 else f"{path.resolve().parent.name}.{name}": path
        for name, path in zip(names, distinct, strict=True)
    }


def _load(path: Path) -> "SAE":
    from saelab.sae.folder import load_sae

    sae = load_sae(path)
    if sae.config.d_out != sae.d_in or sae.config.architecture == "transcoder" or _recorded(path, "target_site"):
        raise ConfigError(f"{path} reconstructs another site than it reads; dark-matter needs an SAE of one site")
    return sae


def _recorded(path: Path, key: str) -> str | None:
    from saelab.sae.folder import load_meta

    value = load_meta(path).get("provenance", {}).get(key)
    return None if value is None else str(value)


def _only_site(store: "ActivationStore", job: DarkMatterJob) -> str:
    if len(store.sites) > 1:
        raise SiteError(f"{job.sae} does not record its site; give --site, one of {', '.join(store.sites)}")
    return store.sites[0]


def _settings(job: DarkMatterJob) -> str:
    from saelab.core.config import dump_yaml

    return dump_yaml(job)


def open_tokens(job: DarkMatterJob) -> "Tokens":
    """The tokens that ``job`` is about, split as it splits them (for notebooks that look closer)."""
    return _Opened(job.model_copy(update={"model_parts": False})).tokens
