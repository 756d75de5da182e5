"""Explain: a feature store in, explanations and scores beside it, with controls, out.

The work is resumable: explanations and scores are written after every batch of features, replies of a judge as they
come in. Started again with the same settings, a run does what is missing and asks no judge anything twice.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.controls import CONTROLS, NEURONS, RANDOM, UNTRAINED, control_features, shuffled
from saelab.analysis.autointerp.examples import FeatureExamples
from saelab.analysis.autointerp.judge import CachedJudge, CountingJudge, Estimate, Usage
from saelab.analysis.autointerp.report import ExplainReport, report
from saelab.analysis.autointerp.scorers.base import Item, Scorer, settings_of
from saelab.core.errors import ConfigError
from saelab.core.progress import progress
from saelab.core.result import Result
from saelab.features.explanations import NO_AUTHOR, SHUFFLED, Explanation, Explanations
from saelab.features.store import open_features
from saelab.workflows.explain_controls import control_subject
from saelab.workflows.explain_setup import ExplainJob, Setup, Subject

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

__all__ = ["ExplainJob", "ExplainResult", "dry_run", "make_report", "run_explain"]

DRY_FEATURES = 32
"""Features whose prompts a dry run counts; the rest is in proportion."""


@dataclass(frozen=True, repr=False)
class ExplainResult(Result):
    """What a run did."""

    report: ExplainReport
    """All scores on the store, also those of earlier runs."""
    features: int
    """Features that were explained or scored, or had been."""
    left_out: int
    """Features with too few windows, or without negatives."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by part: examples, each explainer, each scorer, controls' stores."""
    counts: dict[str, int] = field(default_factory=dict)
    """Features that each part went through in this run, controls included."""
    usage: Usage = field(default_factory=Usage)
    """What the judge was asked, and the bill."""
    notes: tuple[str, ...] = ()
    """What could not be done, and why."""

    def __repr__(self) -> str:
        return f"ExplainResult({self.features:,} features, {self.left_out:,} left out; {self.report!r})"

    def to_frame(self) -> "pd.DataFrame":
        """One row for each score: its mean on the SAE beside its controls."""
        return self.report.side_by_side()

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """The report's figures."""
        return self.report.figures()

    def to_dict(self) -> dict[str, Any]:
        """The one JSON object of ``saelab explain --json``."""
        return {
            "features": self.features,
            "left_out": self.left_out,
            "seconds": self.seconds,
            "counts": self.counts,
            "usage": self.usage.to_dict(),
            "notes": list(self.notes),
            "report": self.report.to_dict(),
        }


def run_explain(job: ExplainJob, *, say: Callable[[str], None] = lambda text: None) -> ExplainResult:
    """Explain and score the features of a store, and controls; results go beside the store.

    Raises :class:`ConfigError` (unknown names, a judge that is needed and not given), :class:`JudgeError`.
    """
    return _Run(Setup(job)).run(say)


def dry_run(job: ExplainJob) -> Estimate:
    """Return what a run would ask a judge, from the prompts of a few features; asks and writes nothing."""
    if job.judge.model is None:
        raise ConfigError("a dry run estimates what a judge would cost; name one with --judge.model")
    counter = CountingJudge(job.judge.model, stand_in="[EXPLANATION]: " + "a description of usual length " * 3)
    setup = Setup(job, judge=counter)
    run = _Run(setup)
    live = setup.live()
    sample = live[np.linspace(0, len(live) - 1, min(DRY_FEATURES, len(live))).astype(np.int64)]
    subject = replace(run.subject(), features=sample)
    corpus = setup.corpus(subject)
    items = [examples for i in sample.tolist() if (examples := corpus.examples(i)) is not None]
    for explainer in setup.explainers():
        explained = {e.feature: e for e in explainer.explain(items)}
        for scorer in setup.scorers(explainer.author, subject, asking=True):
            scorer.score([(one, explained[one.feature]) for one in items if one.feature in explained])
    for scorer in setup.scorers(NO_AUTHOR, subject, asking=True):
        scorer.score([(one, None) for one in items])
    # The SAE's features, and each control's; shuffled explanations are not written again but scored again.
    times = (len(live) + len(CONTROLS) * min(job.control_features, len(live))) / max(len(sample), 1)
    found = counter.estimate
    found.requests = round(found.requests * times)
    found.prompt_tokens = round(found.prompt_tokens * times)
    found.completion_tokens = round(found.completion_tokens * times)
    return found


def make_report(store: str | Path) -> ExplainReport:
    """Return the report of the explanations and scores beside a store."""
    opened = open_features(store)
    found = Explanations(opened).scores()
    if not found:
        raise ConfigError(f"no feature of {store} has been scored; run saelab explain {store}")
    return report(found, np.asarray(opened.column("density"), np.float64))


class _Run:
    """One run."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.job, self.book = setup, setup.job, setup.book
        self._shared: dict[tuple[str, str], str] = {}

    def subject(self) -> Subject:
        """Return the user's features."""
        setup = self.setup
        return Subject("", setup.store, setup.live(), setup.sae, str(setup.store.manifest["site"]))

    def run(self, say: Callable[[str], None]) -> ExplainResult:
        """Do everything."""
        setup, main = self.setup, self.subject()
        say(f"explain {len(main.features):,} features of {setup.store.path}")
        left_out = self._work(main)
        self._shuffled(main, control_features(main.features, self.job.control_features, self.job.examples.seed))
        for name in (RANDOM, UNTRAINED, NEURONS):
            subject = control_subject(setup, name)
            if subject is not None:
                say(f"control: {name}")
                self._work(subject)
        return ExplainResult(
            report=make_report(setup.store.path),
            features=len(main.features) - left_out,
            left_out=left_out,
            seconds={name: round(value, 3) for name, value in setup.seconds.items()},
            counts=dict(setup.counts),
            usage=setup.judge.usage if isinstance(setup.judge, CachedJudge) else Usage(),
            notes=tuple(dict.fromkeys(setup.notes)),
        )

    def _work(self, subject: Subject) -> int:
        """Explain and score the features of a subject, batch after batch; returns how many were left out."""
        with self.setup.timed("corpus", 0):
            corpus = self.setup.corpus(subject)
        explainers = self.setup.explainers()
        tasks = [(explainer, self.setup.scorers(explainer.author, subject)) for explainer in explainers]
        plain = self.setup.scorers(NO_AUTHOR, subject)
        left_out = 0
        with progress(f"explain {subject.control}".strip(), len(subject.features), unit="features") as bar:
            for k in range(0, len(subject.features), self.job.batch):
                part = subject.features[k : k + self.job.batch]
                with self.setup.timed("examples", len(part)):
                    found = [corpus.examples(i) for i in part.tolist()]
                items = [examples for examples in found if examples is not None]
                left_out += len(part) - len(items)
                for explainer, scorers in tasks:
                    with self.setup.timed(explainer.name, len(items)):
                        explained = explainer.explain(items, subject.control)
                    self.book.add(explained)
                    by_feature = {e.feature: e for e in explained}
                    pairs = [(one, by_feature[one.feature]) for one in items if one.feature in by_feature]
                    self._score(scorers, pairs, subject.control, explainer.author)
                self._score(plain, [(one, None) for one in items], subject.control, NO_AUTHOR)
                bar.advance(len(part))
        for explainer in explainers:
            if getattr(explainer, "failures", 0):
                self.setup.notes.append(f"{explainer.author}: {explainer.failures} replies held no explanation")
        return left_out

    def _shuffled(self, subject: Subject, sample: np.ndarray) -> None:
        """Score the sample's features with one another's explanations."""
        corpus = self.setup.corpus(subject)
        items = {i: examples for i in sample.tolist() if (examples := corpus.examples(i)) is not None}
        for explainer in self.setup.explainers():
            own = self.book.explanations(explainer.author, features=list(items))
            mixed = shuffled(own, self.job.examples.seed)
            if not mixed:
                continue
            scorers = self.setup.scorers(explainer.author, replace(subject, control=SHUFFLED))
            with progress(SHUFFLED, len(mixed), unit="features") as bar:
                for k in range(0, len(mixed), self.job.batch):
                    part = mixed[k : k + self.job.batch]
                    pairs = [(items[e.feature], e) for e in part]
                    self._score(scorers, pairs, SHUFFLED, explainer.author)
                    bar.advance(len(part))

    def _score(
        self,
        scorers: Sequence[Scorer],
        pairs: Sequence[tuple[FeatureExamples, Explanation | None]],
        control: str,
        author: str,
    ) -> None:
        for scorer in scorers:
            wanted = {one.feature: self._settings(scorer, text) for one, text in pairs}
            have = self.book.settings(control, author, scorer.name, list(wanted))
            missing: list[Item] = [(one, text) for one, text in pairs if have.get(one.feature) != wanted[one.feature]]
            if not missing:
                continue
            with self.setup.timed(scorer.name, len(missing)):
                scores = scorer.score(missing)
            signed = [replace(s, control=control, author=author, settings=wanted[s.feature]) for s in scores]
            self.book.add(scores=signed)

    def _settings(self, scorer: Scorer, explanation: Explanation | None) -> str:
        """Return a fingerprint of all that a score depends on."""
        key = (scorer.name, scorer.judge_name)
        if key not in self._shared:
            manifest = self.setup.store.manifest
            about = [manifest.get("source_fingerprint"), manifest.get("n_tokens"), self.job.embedder, prompts.VERSION]
            self._shared[key] = settings_of(*key, *about, self.job.examples, self.job.scoring)
        text = explanation.text if explanation is not None else ""
        return f"{self._shared[key]}:{zlib.crc32(text.encode()):08x}"
