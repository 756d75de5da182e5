"""Some features as one HTML document that needs nothing else: to send to a colleague, or to show in a notebook.

No script, no request: a content security policy in the document forbids both, and everything from outside is escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab import __version__
from saelab.core.artifacts import atomic_writer
from saelab.core.errors import ConfigError, StoreError
from saelab.core.result import Result
from saelab.features.explanations import Explanations, Score
from saelab.features.html import CSS, bars_html, contexts_html, interval_html, legend_html, weights_html
from saelab.features.notes import Note, Notes
from saelab.features.query import interval_samples
from saelab.features.store import FeatureStore, open_features
from saelab.features.table import quoted

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

PAGE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2.4rem) 3rem}
"""
PANES = """
.sd section{border-top:2px solid rgba(128,128,128,.35);padding:.4rem 0 1.6rem}
.sd h2{font-size:1.25rem;margin:.5rem 0 .1rem}.sd h3{font-size:.95rem;margin:1rem 0 .2rem}
.sd p{margin:.2rem 0}.sd .m{opacity:.75;font-size:.85rem}
.sd dl{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem;margin:.5rem 0}
.sd dt{font-size:.74rem;opacity:.75}.sd dd{margin:0;font-size:1.05rem;font-variant-numeric:tabular-nums}
.sd .p{display:grid;grid-template-columns:minmax(220px,1fr) 2.2fr;gap:0 2rem}
.sd .r{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}
.sd a{color:inherit}.sd summary{cursor:pointer;margin:.8rem 0 .2rem}
@media (max-width:760px){.sd .p{grid-template-columns:1fr}}
"""
FACTS = {
    "density": ("density", "Share of the encoded tokens on which it fires."),
    "count": ("tokens", "Tokens on which it fires."),
    "max": ("max", "Largest activation, in the SAE's scaled units."),
    "mean": ("mean", "Mean of its nonzero activations."),
    "rows": ("rows", "Rows of text in which it fires."),
    "token_entropy": ("entropy", "Entropy (nats) of the tokens it fires on: 0 for a single token."),
    "encoder_decoder_cosine": ("read·write", "Cosine between the direction it reads and the one it writes."),
}
"""Columns in the head of a feature: title and meaning."""


@dataclass(frozen=True)
class Panes:
    """How much of each feature is shown."""

    contexts: int = 20
    """Strongest contexts, one for each row of text."""
    intervals: int = 10
    """Parts of equal width that the range is cut into; 0 leaves them out."""
    per_interval: int = 5
    """Contexts from each part."""
    before: int = 20
    """Tokens before the peak."""
    after: int = 10
    """Tokens after it."""
    together: int = 8
    """Features active on the same tokens."""


@dataclass(frozen=True, eq=False, repr=False)
class Dashboard(Result):
    """Some features as HTML; a notebook shows it by itself."""

    title: str
    """What it shows."""
    body: str
    """The panes, with their style, as a piece of a page."""
    store: FeatureStore
    """The store of the features."""
    features: tuple[int, ...]
    """Their numbers."""

    def __repr__(self) -> str:
        return f"Dashboard({self.title})"

    def to_frame(self) -> "pd.DataFrame":
        """One row per feature: its part of the store's summary."""
        return self.store.summary().loc[list(self.features)]

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Histogram of each feature's activations."""
        from saelab.features.figures import activation_histogram

        return {f"feature {i}": activation_histogram(self.store.histogram(i)) for i in self.features}

    def _repr_html_(self) -> str:
        return self.body

    def document(self) -> str:
        """Return a whole page that needs no other file."""
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{PAGE}</style></head>\n"
            f"<body><h1>{escape(self.title)}</h1>\n{self.body}\n</body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page, atomically. Raises :class:`OutputError`."""
        with atomic_writer(path) as file:
            file.write(self.document().encode())
        return Path(path)


def show(
    feature: int | Sequence[int], store: FeatureStore | str | Path | None = None, panes: Panes | None = None
) -> Dashboard:
    """Show one feature, or several, in a notebook; ``.save(path)`` writes the same as one HTML file.

        store = saelab.open_features("saelab-demo/features")
        saelab.show(123)                       # of the store opened last
        saelab.show([1, 2, 3], store).save("three.html")

    Raises :class:`StoreError` for a feature that does not exist, :class:`ConfigError` when no store is given or open.
    """
    from saelab.features import store as stores

    if store is None:
        store = stores.opened_last()
        if store is None:
            raise ConfigError("no feature store is open; give one: saelab.show(123, 'saelab-demo/features')")
    opened = store if isinstance(store, FeatureStore) else open_features(store)
    return dashboard(opened, [feature] if isinstance(feature, int | np.integer) else list(feature), panes)


def dashboard(store: FeatureStore, features: Sequence[int], panes: Panes | None = None) -> Dashboard:
    """Make the dashboard of some features of a store, in the order given. Raises :class:`StoreError`."""
    features = list(dict.fromkeys(int(i) for i in features))
    if not features:
        raise ConfigError("no feature was given; give at least one number")
    for i in features:
        if not 0 <= i < store.n_features:
            raise StoreError(f"feature {i} does not exist; {store.path} holds features 0 to {store.n_features - 1}")
    notes, said = Notes(store).all(), Explanations(store)
    shown = frozenset(features)
    sections = [
        _section(store, i, panes or Panes(), note=notes.get(i, Note()), said=said, others=shown) for i in features
    ]
    about = store.manifest
    foot = (
        f"{about['sae']} SAE of {about['model']} at {about['site']}: {store.n_features:,} features on "
        f"{store.n_kept:,} tokens of {about['source']}. Colour: activation over the feature's largest; point at a "
        f"token for its value. Made by saelab {__version__}."
    )
    links = " ".join(f'<a href="#feature-{i}">{i}</a>' for i in features) if len(features) > 1 else ""
    body = (
        f'<div class="sd"><style>{CSS}{PANES}</style><p class="m">{escape(foot)}</p>'
        f"{f'<p>Features: {links}</p>' if links else ''}{''.join(sections)}</div>"
    )
    title = f"Feature {features[0]}" if len(features) == 1 else f"{len(features)} features"
    return Dashboard(f"{title} of {about['model']} at {about['site']}", body, store, tuple(features))


def _section(
    store: FeatureStore, i: int, panes: Panes, *, note: Note, said: Explanations, others: frozenset[int]
) -> str:
    maximum = float(store.column("max")[i])
    head = f"<h2>Feature {i}{' ★' if note.star else ''}</h2>"
    head += f"<p>{escape(note.label)}</p>" if note.label else ""
    head += f'<p class="m">{escape(note.note)}</p>' if note.note else ""
    head += _explained(said, i) + _facts(store, i)
    if not len(store.feature(i)[0]):
        return f'<section id="feature-{i}">{head}<p>Dead on this text: it never fires.</p></section>'
    left = "<h3>Activations</h3>" + bars_html(store.histogram(i), "activation", "tokens", logarithmic=True)
    left += _writes(store, i) + _together(store, i, panes, others)
    contexts = store.top_contexts(i, panes.contexts, panes.before, panes.after)
    right = "<h3>Top contexts</h3>" + legend_html(maximum) + contexts_html(contexts, store.vocabulary, maximum)
    right += _range(store, i, panes, maximum)
    return f'<section id="feature-{i}">{head}<div class="p"><div>{left}</div><div>{right}</div></div></section>'


def _facts(store: FeatureStore, i: int) -> str:
    cells = []
    for name, (title, meaning) in FACTS.items():
        if name not in store.columns:
            continue
        value = float(store.column(name)[i])
        text = f"{value:.3%}" if name == "density" else f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
        cells.append(f'<div title="{escape(meaning)}"><dt>{escape(title)}</dt><dd>{text}</dd></div>')
    return f"<dl>{''.join(cells)}</dl>"


def _explained(said: Explanations, i: int) -> str:
    """Return the explanations with their scores; the scores that need none come last."""
    scores: dict[str, list[Score]] = {}
    for score in said.scores(control="", features=[i]):
        scores.setdefault(score.author, []).append(score)
    lines = [
        f'<p>{escape(e.text)} <span class="m">{escape(e.author)}{_scores(scores.pop(e.author, []))}</span></p>'
        for e in said.explanations(features=[i])
    ]
    lines += [f'<p class="m">{escape(author)}{_scores(some)}</p>' for author, some in scores.items()]
    return "".join(lines)


def _scores(scores: Sequence[Score]) -> str:
    return "".join(f" · {escape(s.scorer)} {s.value:.3f} [{s.low:.3f}, {s.high:.3f}], n = {s.n:,}" for s in scores)


def _writes(store: FeatureStore, i: int) -> str:
    if "logit_top_ids" not in store.columns:
        return ""
    ends = [np.asarray(store.column(name)[i]) for name in ("logit_top", "logit_bottom")]
    most = float(np.abs(ends).max())
    cells = [
        weights_html(title, [store.vocabulary.bytes_of(int(t)) for t in store.column(ids)[i]], values, most)
        for title, ids, values in zip(("raises", "lowers"), ("logit_top_ids", "logit_bottom_ids"), ends, strict=True)
    ]
    return f'<h3>What it writes</h3><div class="r"><div>{cells[0]}</div><div>{cells[1]}</div></div>'


def _together(store: FeatureStore, i: int, panes: Panes, others: frozenset[int]) -> str:
    frame = store.co_active(i, panes.together)
    lines = []
    tops = np.asarray(store.column("top_token"))[frame["feature"].to_numpy(np.int64)].tolist()
    for feature, share, lift, top in zip(frame["feature"], frame["share"], frame["lift"], tops, strict=True):
        token = quoted(store.vocabulary.strings([top])[0]) if top >= 0 else ""
        name = f'<a href="#feature-{feature}">{feature}</a>' if feature in others else str(feature)
        lines.append(
            f'<div class="w"><span>{name} {escape(token)}</span><span>{share:.0%}, lift {lift:.1f}</span></div>'
        )
    return f'<h3>Active together</h3><div class="sl">{"".join(lines)}</div>' if lines else ""


def _range(store: FeatureStore, i: int, panes: Panes, maximum: float) -> str:
    if not panes.intervals:
        return ""
    total = int(store.column("count")[i])
    sampled = interval_samples(
        store, i, panes.intervals, panes.per_interval, by="value", before=panes.before, after=panes.after
    )
    parts = [interval_html(part, total) + contexts_html(part.contexts, store.vocabulary, maximum) for part in sampled]
    return f"<details><summary>Across the range</summary>{''.join(parts)}</details>"
