"""What a run of ``saelab explain`` works with: its settings, and what they name, opened when it is needed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from saelab.analysis.autointerp.client import HttpJudge, JudgeConfig
from saelab.analysis.autointerp.embedders import CHARACTERS, Embedder, open_embedder
from saelab.analysis.autointerp.examples import Corpus, ExamplesConfig
from saelab.analysis.autointerp.explainers.language_model import VARIANTS, LanguageModelExplainer
from saelab.analysis.autointerp.explainers.token_set import NAME as TOKEN_SET
from saelab.analysis.autointerp.explainers.token_set import TokenSetExplainer
from saelab.analysis.autointerp.judge import CachedJudge, Judge
from saelab.analysis.autointerp.report import ORDER
from saelab.analysis.autointerp.samplers import SAMPLERS
from saelab.analysis.autointerp.scorers.base import Scorer, ScoringConfig
from saelab.core.config import Config
from saelab.core.errors import ConfigError, SaelabError, nearest
from saelab.core.named import Ref
from saelab.features.explanations import NO_AUTHOR, Explanations
from saelab.features.store import FeatureStore, open_features

if TYPE_CHECKING:
    from saelab.sae import SAE

SCORERS = ("detection", "fuzzing", "intruder", "surprisal", "embedding", "example_embedding", "surface", "intervention")
"""Scorers of a run; ``simulation``, which needs a judge and costs most, when asked for."""


class ExplainJob(Config):
    """What ``saelab explain`` needs."""

    store: str
    """Feature store."""
    sae: Ref | None = None
    """SAE folder; default: looked for beside the store, by its fingerprint."""
    model: Ref | None = None
    """Subject model, if not found under the name recorded in the store."""
    explainers: list[str] | None = None
    """token-set, llm, llm-contrastive, llm-logits; default: token-set, and llm when there is a judge."""
    scorers: list[str] | None = None
    """Scores to take; default: all that the judge, the SAE and the model allow, but simulation."""
    features: list[int] | None = None
    """Features; default: all that fire."""
    max_features: int | None = Field(default=None, ge=1)
    """Take this many of the features, drawn at random."""
    control_features: int = Field(default=200, ge=1)
    """Features of each control."""
    embedder: str = CHARACTERS
    """Embedder: characters, or the name or folder of a sentence-transformers model."""
    batch: int = Field(default=128, ge=1)
    """Features worked on at once."""
    device: str = "cpu"
    """Torch device of model, SAE and embedder."""
    examples: ExamplesConfig = ExamplesConfig()
    """Which windows are shown."""
    scoring: ScoringConfig = ScoringConfig()
    """How much each scorer looks at."""
    judge: JudgeConfig = JudgeConfig()
    """Language model that explains and judges."""


@dataclass
class Subject:
    """A store whose features are explained: the user's, or a control's."""

    control: str
    """Empty for the user's."""
    store: FeatureStore
    """The store."""
    features: np.ndarray
    """Features to explain."""
    dictionary: Any
    """Its dictionary; None when it was not found."""
    site: str
    """Where in the model."""
    corpus: Corpus | None = None
    """Its windows, once they are cut."""


class Setup:
    """Opens what the job names. ``judge`` stands in for the job's own (a dry run's counter)."""

    def __init__(self, job: ExplainJob, judge: Judge | None = None) -> None:
        self.job = job
        self.store = open_features(job.store)
        """The store whose features are explained."""
        self.book = Explanations(self.store)
        """Where results go."""
        self.notes: list[str] = []
        """What could not be done, and why."""
        self.seconds: dict[str, float] = {}
        """Time spent in each part."""
        self.counts: dict[str, int] = {}
        """Features that went through each part."""
        self._embedder: Embedder | None = None
        self._embeddings: np.ndarray | None = None
        self.names = self._names()
        """Scorers to use."""
        self.judge = judge if judge is not None else self._open_judge()
        """The judge; None without one."""

    @contextmanager
    def timed(self, name: str, count: int) -> Iterator[None]:
        """Add the time of a block, which handles ``count`` features, to the account."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.counts[name] = self.counts.get(name, 0) + count

    def _open_judge(self) -> CachedJudge | None:
        config = self.job.judge
        if config.model is None:
            return None
        judge: Judge
        if config.local:
            from saelab.analysis.autointerp.local import LocalJudge

            judge = LocalJudge(config.model, self.job.device)
        else:
            judge = HttpJudge(config)
        path = self.book.path.with_name(self.book.path.name.replace(".explanations.db", ".replies.db"))
        return CachedJudge(judge, path, config.input_price, config.output_price)

    def _names(self) -> list[str]:
        """Scorers to use; raises for those that cannot be."""
        wanted = self.job.scorers
        for name in wanted or []:
            if name not in ORDER:
                raise ConfigError(f"unknown scorer '{name}'{nearest(name, ORDER)} (known: {', '.join(ORDER)})")
            if name == "simulation" and self.job.judge.model is None:
                raise ConfigError("the simulation scorer needs a judge; give --judge.model")
        SAMPLERS[self.job.examples.sampler]  # raises for an unknown one
        for name in self.job.explainers or []:
            known = (TOKEN_SET, *VARIANTS)
            if name not in known:
                raise ConfigError(f"unknown explainer '{name}'{nearest(name, known)} (known: {', '.join(known)})")
            if name in VARIANTS and self.job.judge.model is None:
                raise ConfigError(f"the explainer '{name}' needs a judge; give --judge.model")
        return list(wanted or SCORERS)

    @cached_property
    def sae(self) -> "SAE | None":
        """The SAE of the store; None, with a note, when it is not found."""
        from saelab.sae.folder import load_sae
        from saelab.workflows.browse import survey

        if self.job.sae is not None:
            from saelab.features.build import dictionary_fingerprint

            sae = load_sae(self.job.sae, self.job.device)
            if dictionary_fingerprint(sae) != self.store.manifest.get("sae_fingerprint"):
                raise ConfigError(f"{self.job.sae} is not the SAE that {self.store.path} was built with")
            return sae
        found = [place.sae for place in survey([self.store.path]).places if place.store == self.store.path.resolve()]
        if not found or found[0] is None:
            self.notes.append("the SAE was not found beside the store (give --sae): no intervention, no controls of it")
            return None
        return load_sae(found[0], self.job.device)

    @cached_property
    def model(self) -> Any:
        """The model under study; None, with a note, when it cannot be loaded."""
        from saelab.models.subject import load_model

        try:
            model = load_model(self.job.model or str(self.store.manifest["model"]), device=self.job.device)
        except SaelabError as error:
            self.notes.append(f"the model could not be loaded ({error}): no surprisal, no intervention, no controls")
            return None
        if model.fingerprint != self.store.manifest.get("model_fingerprint"):
            self.notes.append(
                f"{model.name} is not the model that the store was built with (its fingerprint "
                "differs): no surprisal, no intervention, no controls"
            )
            return None
        return model

    def live(self) -> np.ndarray:
        """Features to explain."""
        job = self.job
        if job.features is not None:
            wrong = [i for i in job.features if not 0 <= i < self.store.n_features]
            if wrong:
                raise ConfigError(f"feature {wrong[0]} does not exist; the store has 0 to {self.store.n_features - 1}")
            found = np.unique(job.features).astype(np.int64)
        else:
            found = np.flatnonzero(np.asarray(self.store.column("count")) > 0)
        if job.max_features is not None and len(found) > job.max_features:
            found = np.sort(
                np.random.default_rng([job.examples.seed, 5]).choice(found, job.max_features, replace=False)
            )
        return found.astype(np.int64)

    def corpus(self, subject: Subject) -> Corpus:
        """Return the windows of a subject, with embeddings, which all subjects share: their text is the same."""
        if subject.corpus is None:
            corpus = Corpus(
                subject.store,
                self.job.examples,
                features=subject.features,
                W_dec=getattr(subject.dictionary, "W_dec", None),
            )
            if self._embedder is None:
                self._embedder = open_embedder(self.job.embedder, corpus.texts, self.job.device)
            corpus.embedder = self._embedder
            if self._embeddings is None:
                self._embeddings = corpus.embeddings
            corpus.share_embeddings(self._embeddings)
            subject.corpus = corpus
        return subject.corpus

    def explainers(self) -> list[Any]:
        """Explainers of this run."""
        names = self.job.explainers or [TOKEN_SET, *(["llm"] if self.judge else [])]
        made: list[Any] = []
        for name in names:
            if name == TOKEN_SET:
                made.append(TokenSetExplainer())
            else:
                assert self.judge is not None, "checked in _names"
                made.append(LanguageModelExplainer(self.judge, name))
        return made

    def scorers(self, author: str, subject: Subject, *, asking: bool = False) -> list[Scorer]:
        """Scorers for the explanations of an author, or, without an author, those that need no explanation.

        ``asking``: only those that ask the judge.
        """
        # A token set is scored by its own rule: a judge would be paid for reading a list.
        judge = None if author == TOKEN_SET else self.judge
        made = (self._scorer(name, judge, subject) for name in self.names)
        fitting = [one for one in made if one is not None and one.needs_explanation == (author != NO_AUTHOR)]
        return [one for one in fitting if not asking or getattr(one, "judge", None) is not None]

    def _scorer(self, name: str, judge: Judge | None, subject: Subject) -> Scorer | None:
        from saelab.analysis.autointerp import scorers

        config, embedder = self.job.scoring, self.corpus(subject).embedder
        assert embedder is not None, "the corpus of a run has an embedder"
        dictionary, model = subject.dictionary, self.model if name in ("surprisal", "intervention") else None
        makers: dict[str, Callable[[], Scorer]] = {
            "detection": lambda: scorers.DetectionScorer(config, judge),
            "fuzzing": lambda: scorers.FuzzingScorer(config, judge),
            "intruder": lambda: scorers.IntruderScorer(config, judge),
            "embedding": lambda: scorers.EmbeddingScorer(config, embedder),
            "example_embedding": lambda: scorers.ExampleEmbeddingScorer(config, embedder),
            "surface": lambda: scorers.SurfaceScorer(config, embedder),
        }
        if judge is not None:
            makers["simulation"] = lambda: scorers.SimulationScorer(config, judge)
        if model is not None:
            makers["surprisal"] = lambda: scorers.SurprisalScorer(config, model)
            if dictionary is not None:
                makers["intervention"] = lambda: scorers.InterventionScorer(config, model, dictionary, subject.site)
        return makers[name]() if name in makers else None
