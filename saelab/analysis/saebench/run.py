"""``full_evaluate``: every evaluation of SAEBench's that needs no download, each beside its controls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.saebench import absorption, core, hierarchy, mdl, meta_structure, scr, sparse_probing, tpp
from saelab.analysis.saebench.controls import Shuffled, Untrained, scale_of
from saelab.analysis.saebench.examples import LabelledSet
from saelab.analysis.saebench.local_sets import file_set, python_windows, text_set, token_sets
from saelab.analysis.saebench.result import EvalResult, FullEvaluation, skipped
from saelab.analysis.saebench.spelling import PROMPT, spelling_set
from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError, TextError, nearest
from saelab.features.protocols import Dictionary, Rows
from saelab.features.rows import dictionary_name, encode_in_parts, pieces, read_site, require_finite, require_fit
from saelab.models.text import TextSource
from saelab.sae import SAE

EVALS = (
    core.EVAL,
    sparse_probing.EVAL,
    absorption.EVAL,
    hierarchy.EVAL,
    scr.EVAL,
    tpp.EVAL,
    mdl.EVAL,
    meta_structure.EVAL,
)


@dataclass(frozen=True)
class BenchSettings:
    """Sizes of the evaluations; SAEBench's own where it has them."""

    max_tokens: int = 100_000
    """Tokens of the core evaluation (and of each of its controls)."""
    sample_tokens: int = 20_000
    """Tokens of the sample for densities and description length."""
    label_tokens: int = 400_000
    """Tokens of text to label."""
    context: int = 128
    """Tokens of a labelled window or text."""
    train_size: int = 4000
    """Training examples of a probe."""
    test_size: int = 1000
    """Test examples of a probe."""
    meta_steps: int = meta_structure.STEPS
    """Training steps of the meta-SAE."""
    planted_steps: int = hierarchy.STEPS
    """Training steps of the SAE on the planted hierarchy."""
    prompt: str = PROMPT
    """Tokens before each word of the first-letter task."""
    rows_per_batch: int = 16
    """Rows of text in one forward pass."""
    seed: int = 0
    """Seed of samples, splits, controls and small trainings."""


@dataclass(eq=False)
class _Job:
    """What the evaluations share: opened or computed once, when the first of them asks."""

    model: Any
    sae: Dictionary
    site: str
    rows: Rows
    source: TextSource
    settings: BenchSettings
    labels: Path | None
    problem: str = ""
    _cache: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    @property
    def sample(self) -> Float[Tensor, "n d"]:
        """Activations of the first kept tokens."""
        found: Tensor = self.once("sample", lambda: _sample(self))
        return found

    @property
    def dictionaries(self) -> dict[str, Dictionary]:
        """The SAE and its controls."""

        def make() -> dict[str, Dictionary]:
            l0 = float(encode_in_parts(self.sae, self.sample, self.site).l0().float().mean())
            seed = self.settings.seed
            untrained = Untrained(self.sae, self.sample.mean(0), l0, seed)
            return {"sae": self.sae, "untrained": untrained, "shuffled": Shuffled(self.sae, seed)}

        found: dict[str, Dictionary] = self.once("dictionaries", make)
        return found

    @property
    def codes(self) -> dict[str, SparseCode]:
        """Codes of the sample."""
        found: dict[str, SparseCode] = self.once(
            "codes", lambda: {n: encode_in_parts(d, self.sample, self.site) for n, d in self.dictionaries.items()}
        )
        return found

    @property
    def decoders(self) -> dict[str, Any]:
        """Write directions in raw units."""
        return {n: d.W_dec.detach().cpu().double().numpy() / scale_of(d) for n, d in self.dictionaries.items()}

    @property
    def labelled(self) -> tuple[list[LabelledSet], list[scr.AttributePair]]:
        """Labelled sets and attribute pairs."""
        found: tuple[list[LabelledSet], list[scr.AttributePair]] = self.once("labelled", lambda: _labelled(self))
        return found


def full_evaluate(
    model: Any,
    sae: Dictionary,
    rows: Rows,
    site: str,
    source: TextSource,
    *,
    evals: Sequence[str] = EVALS,
    labels: str | Path | None = None,
    settings: BenchSettings | None = None,
    about: dict[str, Any] | None = None,
) -> FullEvaluation:
    """Run ``evals`` on an SAE at a site of a model with a tokenizer.

    ``rows`` are the tokens of the core evaluation, ``source`` the text to be labelled by Python itself (where it is
    Python), ``labels`` a JSONL of ``{"text", "label"}`` to be probed as well. Controls stand beside every number: an
    untrained dictionary of the same width and L0, and the SAE on shuffled activations.

    Raises :class:`ConfigError` for an unknown evaluation, :class:`ActivationError` for another width or NaN,
    :class:`TextError` for bad labels.
    """
    for name in evals:
        if name not in EVALS:
            raise ConfigError(f"unknown evaluation '{name}'{nearest(name, EVALS)} (known: {', '.join(EVALS)})")
    require_fit(model, sae, site)
    settings = settings or BenchSettings()
    job = _Job(model, sae, site, rows, source, settings, None if labels is None else Path(labels))
    found: dict[str, EvalResult] = {}
    seconds: dict[str, float] = {}
    for name in evals:
        started = time.perf_counter()
        found[name] = _RUN[name](job)
        seconds[name] = round(time.perf_counter() - started, 2)
    identity = {"architecture": dictionary_name(sae), "d_in": sae.d_in, "d_sae": sae.d_sae, "site": site}
    identity |= {"model": model.name, "model_fingerprint": model.fingerprint, **(about or {})}
    return FullEvaluation(found, identity, settings.seed, seconds)


def _sample(job: _Job) -> Tensor:
    parts = []
    for piece in pieces(job.rows, job.settings.rows_per_batch, job.settings.sample_tokens):
        x = read_site(job.model, piece.tokens, job.site)
        require_finite(x, piece, job.site)
        parts.append(x[piece.keep.to(x.device)].float().cpu())
    sample = torch.cat(parts)
    if len(sample) < 500:
        raise TextError(f"{len(sample)} tokens are too few to evaluate on, at least 500 are needed; give more text")
    return sample


def _labelled(job: _Job) -> tuple[list[LabelledSet], list[scr.AttributePair]]:
    """Label the text, run the model on it once, and make the sets; a text without labels gives none."""
    s = job.settings
    per_class = s.train_size + s.test_size
    common = (job.model, job.site, job.dictionaries)
    context = min(s.context, int(getattr(job.model, "n_ctx", s.context)))
    sets: list[LabelledSet] = []
    pairs: list[scr.AttributePair] = []
    tokenizer = job.model.tokenizer
    if job.labels is not None:
        sets.append(text_set(*common, tokenizer, job.labels, context=context, per_class=per_class, seed=s.seed))
    try:
        windows = python_windows(job.source, tokenizer, context=context, max_tokens=s.label_tokens)
    except TextError as error:
        job.problem = str(error)
        return sets, pairs
    tokens, labels = token_sets(*common, windows, per_class=per_class // 2, seed=s.seed)
    sets += tokens
    pairs = scr.attribute_pairs(labels)
    by_file = file_set(*common, windows, per_class=per_class // 4)
    return sets + ([] if by_file is None else [by_file]), pairs


def _core(job: _Job) -> EvalResult:
    s = job.settings
    sizes = {"max_tokens": s.max_tokens, "rows_per_batch": s.rows_per_batch}
    return core.core(job.model, job.site, job.rows, job.dictionaries, job.sample, job.codes, **sizes)


def _sparse_probing(job: _Job) -> EvalResult:
    s = job.settings
    return sparse_probing.sparse_probing(job.labelled[0], train_size=s.train_size, test_size=s.test_size, seed=s.seed)


def _absorption(job: _Job) -> EvalResult:
    s = job.settings
    common = (job.model, job.site, job.dictionaries, job.model.tokenizer)
    words = spelling_set(*common, prompt=s.prompt, seed=s.seed)
    return absorption.absorption(words, job.decoders, config={"prompt": s.prompt, "random_seed": s.seed})


def _planted(job: _Job) -> EvalResult:
    if not isinstance(job.sae, SAE):
        return skipped(hierarchy.EVAL, "only architectures that saelab trains can be tested on the planted hierarchy")
    return hierarchy.planted_absorption(job.sae.config, steps=job.settings.planted_steps, seed=job.settings.seed)


def _scr(job: _Job) -> EvalResult:
    s = job.settings
    pairs = job.labelled[1]
    return scr.scr(pairs, job.decoders, train_size=s.train_size, test_size=s.test_size, seed=s.seed)


def _tpp(job: _Job) -> EvalResult:
    s = job.settings
    sets = job.labelled[0]
    return tpp.tpp(sets, job.decoders, train_size=s.train_size, test_size=s.test_size, seed=s.seed)


def _mdl(job: _Job) -> EvalResult:
    return mdl.mdl(job.sample, job.dictionaries, job.codes)


def _meta_structure(job: _Job) -> EvalResult:
    return meta_structure.meta_structure(job.sae.W_dec, steps=job.settings.meta_steps, seed=job.settings.seed)


_RUN: dict[str, Callable[[_Job], EvalResult]] = {
    core.EVAL: _core,
    sparse_probing.EVAL: _sparse_probing,
    absorption.EVAL: _absorption,
    hierarchy.EVAL: _planted,
    scr.EVAL: _scr,
    tpp.EVAL: _tpp,
    mdl.EVAL: _mdl,
    meta_structure.EVAL: _meta_structure,
}
