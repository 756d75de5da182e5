"""What programs say about features: explanations and their scores. Kept in one SQLite file beside the store.

``features.explanations.db`` beside ``features/`` holds, for each SAE (by the fingerprint of its weights), every
explanation (feature, author, text) and every score (feature, author, scorer, control). A store that is built again
keeps them; a store of another SAE in its place does not get them. SQLite gives what a long run needs: each batch is
written whole or not at all, a killed process loses nothing that was written, and several processes may write.

An *author* is who explained: explainer, model and prompt version (``token-set``, ``llm:some-model:v1``). A *control*
is what the score was taken on instead of the SAE's own features (``shuffled``, ``untrained`` ...), ``""`` for the SAE
itself. Features of a control other than ``shuffled`` are that control's own, not the SAE's.
"""

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from saelab.core.errors import CorruptError, OutputError
from saelab.features.store import FeatureStore

if TYPE_CHECKING:
    import pandas as pd

NO_AUTHOR = ""
"""Author of scores that need no explanation (intruder, example-embedding)."""
FLOOR = "token-set"
"""Explainer without a language model; where another author has explained a feature too, that one is shown."""
SHUFFLED = "shuffled"
"""The control that scores each feature with another feature's explanation."""
WAIT_SECONDS = 60.0
"""How long a writer waits for another one."""

_SCHEMA = """
create table if not exists explanations (
    sae text, control text, feature integer, author text, text text, explainer text, model text, prompt text,
    detail text, primary key (sae, control, feature, author)
);
create table if not exists scores (
    sae text, control text, feature integer, author text, scorer text, value real, low real, high real,
    n integer, failures integer, judge text, settings text, detail text,
    primary key (sae, control, author, scorer, feature)
);
"""


@dataclass(frozen=True)
class Explanation:
    """What one author says about one feature."""

    feature: int
    """The feature."""
    author: str
    """Who says it: explainer, model and prompt version in one name."""
    text: str
    """The explanation, one line."""
    explainer: str = ""
    """Kind of explainer (``token-set``, ``llm``, ``llm-contrastive``, ``imported``)."""
    model: str = ""
    """Model that wrote it, empty for none."""
    prompt: str = ""
    """Version of the prompt."""
    control: str = ""
    """What it explains instead of the SAE's feature: the name of a control."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, JSON-able (token ids of a token set, say)."""


@dataclass(frozen=True)
class Score:
    """How good an explanation (or, for scorers that need none, a feature) is by one scorer."""

    feature: int
    """The feature."""
    scorer: str
    """Name of the scorer."""
    value: float
    """The score; nan where it is not defined (a constant simulation)."""
    low: float
    """Lower end of its 95 % confidence interval."""
    high: float
    """Upper end."""
    n: int
    """Number of judgements it is made of."""
    failures: int = 0
    """Judgements that could not be parsed or were refused; counted as wrong."""
    author: str = NO_AUTHOR
    """Whose explanation was scored; empty when the scorer needs none."""
    control: str = ""
    """Control it was taken on, empty for the SAE itself."""
    judge: str = ""
    """Model (or rule) that judged."""
    settings: str = ""
    """Fingerprint of examples, prompts and settings; a score of other settings is taken again."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """The parts: TPR, TNR, per decile, per kind of negative, JSON-able."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Explanations:
    """The explanations and scores of one store. Reading sees what every process has written."""

    def __init__(self, store: FeatureStore) -> None:
        self.path = explanations_path(store.path)
        """Where they are."""
        self.n_features = store.n_features
        self._sae = str(store.manifest.get("sae_fingerprint", ""))

    # writing ----------------------------------------------------------------------------------------------------

    def add(self, explanations: Iterable[Explanation] = (), scores: Iterable[Score] = ()) -> None:
        """Write some, all or none; an older one of the same key is replaced. Raises :class:`OutputError`."""
        texts = [
            (
                self._sae,
                e.control,
                e.feature,
                e.author,
                e.text,
                e.explainer,
                e.model,
                e.prompt,
                json.dumps(dict(e.detail)),
            )
            for e in explanations
        ]
        numbers = [
            (
                *(self._sae, s.control, s.feature, s.author, s.scorer, *map(_number, (s.value, s.low, s.high))),
                *(s.n, s.failures, s.judge, s.settings, json.dumps(_plain(dict(s.detail)))),
            )
            for s in scores
        ]
        with self._open() as database, database:
            database.executemany("insert or replace into explanations values (?,?,?,?,?,?,?,?,?)", texts)
            database.executemany("insert or replace into scores values (?,?,?,?,?,?,?,?,?,?,?,?,?)", numbers)

    # reading ----------------------------------------------------------------------------------------------------

    def stamp(self) -> tuple[int, int]:
        """Return numbers that change when something is written."""
        try:
            about = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return (about.st_mtime_ns, about.st_size)

    def explanations(
        self, author: str | None = None, control: str = "", features: Sequence[int] | None = None
    ) -> list[Explanation]:
        """Explanations by feature and author, of one author when it is given."""
        rows = self._select(
            "select feature, author, text, explainer, model, prompt, control, detail from explanations",
            {"control": control, "author": author},
            features,
        )
        return [_explanation(*row) for row in rows]

    def scores(
        self,
        author: str | None = None,
        scorer: str | None = None,
        control: str | None = None,
        features: Sequence[int] | None = None,
    ) -> list[Score]:
        """Scores by feature and author, those of one author, scorer or control when given."""
        rows = self._select(
            "select feature, scorer, value, low, high, n, failures, author, control, judge, settings, detail "
            "from scores",
            {"control": control, "author": author, "scorer": scorer},
            features,
        )
        return [_score(*row) for row in rows]

    def settings(self, control: str, author: str, scorer: str, features: Sequence[int]) -> dict[int, str]:
        """Settings of the scores of some features that are there already."""
        conditions: dict[str, str | None] = {"control": control, "author": author, "scorer": scorer}
        return dict(self._select("select feature, settings from scores", conditions, features))

    def authors(self, control: str = "") -> list[str]:
        """Who has explained features: the most industrious first, token sets last."""
        query = (
            "select author from explanations where sae = ? and control = ? group by author "
            "order by min(explainer = ?), -count(*), author"
        )
        with self._open(read=True) as database:
            return [row[0] for row in database.execute(query, (self._sae, control, FLOOR))] if database else []

    def texts(self) -> dict[int, str]:
        """One explanation for each feature that has any, of the first of :meth:`authors` who explained it."""
        found: dict[int, str] = {}
        for author in self.authors():
            for explanation in self.explanations(author):
                found.setdefault(explanation.feature, explanation.text)
        return found

    def columns(self) -> dict[str, Float64[np.ndarray, " n_features"]]:
        """One column for each scorer, nan where a feature has no score, for the table of features.

        Named ``detection`` ... for the first of :meth:`authors`; those of another are ``detection (author)``.
        """
        query = (
            "select author, scorer, feature, value from scores where sae = ? and control = '' and value is not null "
            "and feature between 0 and ? order by scorer, author"
        )
        with self._open(read=True) as database:
            rows = database.execute(query, (self._sae, self.n_features - 1)).fetchall() if database else []
        first = (self.authors() or [NO_AUTHOR])[0]
        made: dict[str, np.ndarray] = {}
        for author, scorer, feature, value in rows:
            name = scorer if author in (first, NO_AUTHOR) else f"{scorer} ({author})"
            if name not in made:
                made[name] = np.full(self.n_features, np.nan)
            made[name][feature] = value
        return dict(sorted(made.items()))

    def to_frame(self, control: str | None = None) -> "pd.DataFrame":
        """One row for each score."""
        import pandas as pd

        rows = [score.to_dict() for score in self.scores(control=control)]
        return pd.DataFrame(rows, columns=list(Score.__dataclass_fields__))

    def jsonl(self) -> Iterator[bytes]:
        """Yield everything as JSON lines: ``{"kind": "explanation", ...}`` and ``{"kind": "score", ...}``."""
        controls = [""]
        with self._open(read=True) as database:
            if database:
                rows = database.execute("select distinct control from explanations where sae = ?", (self._sae,))
                controls = sorted(row[0] for row in rows) or [""]
        for control in controls:
            for explanation in self.explanations(control=control):
                yield _line({"kind": "explanation", **asdict(explanation)})
        for score in self.scores():
            yield _line({"kind": "score", **score.to_dict()})

    # the file ---------------------------------------------------------------------------------------------------

    def _select(
        self, query: str, conditions: Mapping[str, str | None], features: Sequence[int] | None
    ) -> list[tuple[Any, ...]]:
        given = {name: value for name, value in conditions.items() if value is not None}
        clauses = ["sae = ?", *(f"{name} = ?" for name in given)]
        values: list[Any] = [self._sae, *given.values()]
        if features is not None:
            clauses.append(f"feature in ({','.join('?' * len(features))})")
            values += [int(i) for i in features]
        order = " order by control, author, feature"
        with self._open(read=True) as database:
            if database is None:
                return []
            return list(database.execute(f"{query} where {' and '.join(clauses)}{order}", values))

    @contextmanager
    def _open(self, read: bool = False) -> Iterator[Any]:
        """Yield a connection; None for reading when there is no file yet."""
        if read and not self.path.exists():
            yield None
            return
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as database:
                database.executescript(_SCHEMA)
                yield database
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"cannot use {self.path} ({error}); is the folder writable and the disk not full?"
            ) from None
        except sqlite3.DatabaseError as error:
            raise CorruptError(f"{self.path} does not hold explanations ({error}); mend it or move it away") from None


def explanations_path(store: Path) -> Path:
    """Return the file of the explanations on the store in this folder."""
    folder = store.resolve()
    return folder.with_name(folder.name + ".explanations.db")


def attach_explanations(store: FeatureStore) -> None:
    """Give a store the scores as columns and the explanations as texts, as they are now (cheap when nothing changed).

    From then on the table of features sorts, filters, searches and exports by them.
    """
    explanations = Explanations(store)
    stamp = explanations.stamp()
    if stamp != store.attached_stamp:
        store.attach(explanations.columns(), explanations.texts(), stamp)


def _explanation(feature: int, author: str, text: str, *rest: str) -> Explanation:
    explainer, model, prompt, control, detail = rest
    return Explanation(feature, author, text, explainer, model, prompt, control, json.loads(detail))


def _score(feature: int, scorer: str, value: float | None, low: float | None, high: float | None, *rest: Any) -> Score:
    n, failures, author, control, judge, settings, detail = rest
    return Score(
        *(feature, scorer, _float(value), _float(low), _float(high), n, failures),
        author=author,
        control=control,
        judge=judge,
        settings=settings,
        detail=json.loads(detail),
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(data: Any) -> Any:
    if isinstance(data, float | np.floating):
        return float(data) if math.isfinite(data) else None
    if isinstance(data, np.integer):
        return int(data)
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data


def _line(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(_plain(data), ensure_ascii=False) + "\n").encode()
