"""Compare: two SAE folders or two feature stores in, a comparison out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from saelab.core.artifacts import check_output, read_manifest
from saelab.core.config import Config
from saelab.core.errors import ConfigError, StoreError
from saelab.core.named import Ref
from saelab.models.tokens import TokensConfig
from saelab.workflows.evaluate import EvaluateJob, open_job

if TYPE_CHECKING:
    from saelab.analysis.compare import CodeMatrix, Comparison, Side


class CompareJob(Config):
    """Two SAEs, and the tokens to compare their activations on."""

    a: Ref
    """SAE folder, or feature store."""
    b: Ref
    """Another one of the same kind."""
    store: str | None = None
    """Activation store to encode with both SAEs; without it, text is run through the model."""
    text: Ref | None = None
    """Text to run; default: the held-out part of what A was trained on."""
    column: str = "text"
    """Column that holds the text."""
    tokens: TokensConfig | None = None
    """How the text becomes rows of tokens, if not as in A's training."""
    max_tokens: int = Field(default=200_000, ge=1)
    """Tokens to compare activations on."""
    rows_per_batch: int = Field(default=16, ge=1)
    """Rows of text in one forward pass."""
    device: str = "cpu"
    """Torch device of models and SAEs."""
    activations: bool = True
    """Compare activations; false: decoders only, which takes seconds and no text."""
    targets: int = Field(default=256, ge=0)
    """Features of each side to predict from the other side by LASSO; 0: none."""
    threshold: float = Field(default=0.7, gt=0, lt=1)
    """Decoder cosine over which two features write in one direction."""
    edge: float = Field(default=0.2, gt=0, lt=1)
    """Least |correlation| that joins two features in the clustering."""
    exact_up_to: int = Field(default=4096, ge=0)
    """Features up to which the one-to-one matching is exact; above, it is the best among ``candidates``."""
    candidates: int = Field(default=16, ge=1)
    """Partners per feature that a matching of more features chooses from."""
    seed: int = Field(default=0, ge=0)
    """Seed of the chance levels and of the drawn targets."""


def run_compare(job: CompareJob, out: str | Path | None = None, *, force: bool = False) -> "Comparison":
    """Compare what ``job`` names; with ``out``, also write a comparison folder with its HTML report there."""
    from saelab.analysis.compare import compare, save_comparison

    if out is not None:
        check_output(out, force=force)
    kinds = [read_manifest(path)["kind"] for path in (job.a, job.b)]
    if kinds == ["feature-store", "feature-store"]:
        sides, text = _from_features(job)
    elif kinds == ["sae", "sae"]:
        sides, text = _from_saes(job)
    else:
        raise ConfigError(
            f"{job.a} is a {kinds[0]} folder and {job.b} a {kinds[1]} folder; give two SAE folders or "
            "two feature stores"
        )
    keys = ("seed", "targets", "threshold", "edge", "exact_up_to", "candidates")
    result = compare(*sides, text=text, **{key: getattr(job, key) for key in keys})
    if out is not None:
        save_comparison(result, out, force=force)
    return result


def _from_features(job: CompareJob) -> tuple[tuple["Side", "Side"], str]:
    """Sides from two feature stores; their decoders from the SAEs beside them, where these are found."""
    from saelab.analysis.compare import Side
    from saelab.analysis.compare.collect import codes_from_features
    from saelab.features.store import open_features
    from saelab.sae.folder import load_sae
    from saelab.workflows.browse import survey

    if job.store is not None or job.text is not None:
        raise ConfigError(
            "feature stores hold their own codes and text; leave --store and --text out, or give the SAEs"
        )
    stores = [open_features(path) for path in (job.a, job.b)]
    codes: tuple[Any, Any] = (None, None)
    if job.activations:
        codes = codes_from_features(stores[0], stores[1], job.max_tokens)
    sides = []
    for path, store, code in zip((job.a, job.b), stores, codes, strict=True):
        folder = next((p.sae for p in survey([path]).places if p.store == Path(path).resolve()), None)
        decoder = None if folder is None else load_sae(folder).W_dec.numpy()
        about = store.manifest
        space = f"{about['model']} {about['site']} ({about['model_fingerprint']})"
        sides.append(Side(_name(path, job), decoder, code, space))
    return (sides[0], sides[1]), str(stores[0].manifest.get("source", ""))


def _from_saes(job: CompareJob) -> tuple[tuple["Side", "Side"], str]:
    """Sides from two SAE folders, their codes from an activation store or from text."""
    from saelab.analysis.compare import Side
    from saelab.sae.folder import load_meta, load_sae

    if job.store is not None and job.text is not None:
        raise ConfigError("give either --store or --text, not both")
    saes = [load_sae(path, device=job.device) for path in (job.a, job.b)]
    about = [load_meta(path).get("provenance", {}) for path in (job.a, job.b)]
    codes: tuple[Any, Any] = (None, None)
    text = ""
    if job.activations:
        codes, text = _codes_of_store(job, saes, about) if job.store is not None else _codes_of_text(job, about)
    sides = []
    for path, sae, record, code in zip((job.a, job.b), saes, about, codes, strict=True):
        site = record.get("target_site") or record.get("site")
        space = f"{record.get('model')} {site} ({record.get('model_fingerprint')})" if site else ""
        decoder = np.array(sae.W_dec.detach().cpu().numpy())
        sides.append(Side(_name(path, job), decoder, code, space))
    return (sides[0], sides[1]), text


def _codes_of_store(job: CompareJob, saes: list[Any], about: list[dict[str, Any]]) -> tuple[Any, str]:
    from saelab.activations.store import open_store
    from saelab.analysis.compare.collect import codes_from_store

    assert job.store is not None
    store = open_store(job.store)
    made_by = store.manifest["model"]
    for path, record in zip((job.a, job.b), about, strict=True):
        if record.get("model_fingerprint", made_by["fingerprint"]) != made_by["fingerprint"]:
            raise StoreError(
                f"{path} was trained on {record['model']} ({record['model_fingerprint']}), but {job.store} holds "
                f"activations of {made_by['name']} ({made_by['fingerprint']}); give a store of that model"
            )
    pairs = []
    for sae, record in zip(saes, about, strict=True):
        site = record.get("site") or (store.sites[0] if len(store.sites) == 1 else None)
        if site is None:
            raise ConfigError(f"an SAE does not record its site and {job.store} holds {len(store.sites)}")
        pairs.append((sae, site))
    codes = codes_from_store(store, pairs[0], pairs[1], job.max_tokens)
    return codes, str(store.manifest["text"].get("source", ""))


def _codes_of_text(job: CompareJob, about: list[dict[str, Any]]) -> tuple["tuple[CodeMatrix, CodeMatrix]", str]:
    """Run text through the model, or through both where the SAEs are of two models."""
    from saelab.analysis.compare.collect import codes_from_text, require_same_tokenizer

    common = {"device": job.device, "column": job.column, "tokens": job.tokens}
    model, sae, rows, site = open_job(EvaluateJob(sae=job.a, text=job.text, **common))
    left = (model, sae, site)
    same = about[0].get("model_fingerprint") == about[1].get("model_fingerprint") and "model" in about[1]
    text = job.text or rows.source.name
    other, sae, others, site = open_job(EvaluateJob(sae=job.b, text=text, **common))
    require_same_tokenizer(rows, others)
    right = (model if same else other, sae, site)
    codes = codes_from_text(left, right, rows, max_tokens=job.max_tokens, rows_per_batch=job.rows_per_batch)
    return codes, str(rows.source.name)


def _name(path: str, job: CompareJob) -> str:
    """Shortest end of a path that tells the two apart."""
    paths = [Path(p).resolve().parts for p in (job.a, job.b)]
    for n in range(1, max(len(p) for p in paths)):
        if paths[0][-n:] != paths[1][-n:]:
            return "/".join(Path(path).resolve().parts[-n:])
    return path
