"""The tokens an analysis looks at: which rows of a store, of which contexts, and which contexts fits may see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.core.errors import ActivationError, ConfigError, SiteError, StoreError, nearest

CHUNK = 8192
"""Tokens read and encoded at a time."""
HONEST = 20
"""Tokens per dimension of x from which on a held-out R2 is to be trusted."""
REFUSED = 4
"""Tokens per dimension below which nothing is fitted."""

Gather = Callable[[str, Int64[Tensor, " n"]], Shaped[Tensor, "n ..."]]


class Chunk(NamedTuple):
    """Some consecutive tokens."""

    where: slice
    """Their places among the chosen tokens."""
    x: dict[str, Float[Tensor, "n d"]]
    """Their raw activations at each site, float32."""
    fit: Bool[Tensor, " n"]
    """Which of them are of the fit."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Chosen tokens of an activation store, in text order; activations are read when they are needed."""

    gather: Gather
    """Reads rows of a site: ``(site, row numbers) -> (n, d)``."""
    widths: Mapping[str, int]
    """Width of each site."""
    index: Int64[Tensor, " n"]
    """Row number of each token in the store."""
    context: Int64[Tensor, " n"]
    """Context (row of text) of each token."""
    position: Int64[Tensor, " n"]
    """Its position in the context."""
    token_id: Int64[Tensor, " n"]
    """What token it is."""
    fit: Bool[Tensor, " n"]
    """Whether fits may see it; the others are for testing. Tokens of one context go together."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the results should know about the choice."""

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.index.numel()

    def width(self, site: str) -> int:
        """Width of the activations at a site; :class:`SiteError` with near matches for one that is not there."""
        if site not in self.widths:
            known = ", ".join(self.widths)
            raise SiteError(
                f"the store holds no site '{site}'{nearest(site, self.widths)} (it holds {known}); harvest it too"
            )
        return self.widths[site]

    def n_contexts(self, fit: bool) -> int:
        """Number of contexts of the fit, or of the test."""
        return len(torch.unique(self.context[self.fit == fit]))

    def only(self, which: Bool[Tensor, " n"]) -> "Tokens":
        """Return some of the tokens."""
        columns = {name: getattr(self, name)[which] for name in ("index", "context", "position", "token_id", "fit")}
        return Tokens(self.gather, self.widths, notes=self.notes, **columns)

    def first(self, n: int) -> "Tokens":
        """Return the first n tokens of the fit and the first n of the test (whole contexts are not kept)."""
        which = torch.zeros_like(self.fit)
        for part in (self.fit, ~self.fit):
            which[part.nonzero().squeeze(1)[:n]] = True
        return self.only(which)

    def chunks(self, sites: str | Sequence[str], size: int = CHUNK) -> Iterator[Chunk]:
        """Yield the tokens with their activations. Raises :class:`ActivationError` for NaN or infinity, naming rows."""
        names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
        for name in names:
            self.width(name)
        for start in range(0, self.n, size):
            where = slice(start, min(start + size, self.n))
            x = {name: self.gather(name, self.index[where]).float() for name in names}
            for name, values in x.items():
                self._require_finite(values, where, name)
            yield Chunk(where, x, self.fit[where])

    def _require_finite(self, x: Tensor, where: slice, site: str) -> None:
        if torch.isfinite(x.sum()):
            return
        broken = (~torch.isfinite(x).all(1)).nonzero().squeeze(1)
        if broken.numel():
            first = broken[:5]
            rows = sorted(set(self.context[where][first].tolist()))
            raise ActivationError(
                f"activations at {site} hold NaN or infinity in {broken.numel()} tokens (rows of text "
                f"{', '.join(map(str, rows))}, first at position {int(self.position[where][broken[0]])}); harvest "
                "again in float32"
            )


def tokens_of_store(
    store: ActivationStore,
    site: str,
    *,
    max_tokens: int | None = None,
    skip_positions: int = 0,
    fit_share: float = 0.5,
    seed: int = 0,
) -> Tokens:
    """Choose tokens of a store: the first ``max_tokens`` after leaving out the first positions of each context.

    ``fit_share`` of the contexts, drawn by ``seed``, are for fits. Raises :class:`StoreError` when there are too few
    tokens for the width of ``site`` or only one context, :class:`SiteError`, :class:`CorruptError`.
    """
    d = store.d_in(site)
    every = torch.arange(store.n_rows)
    columns = {name: store.read_rows(name, every).to(torch.int64) for name in ("row", "position", "token_id")}
    chosen = (columns["position"] >= skip_positions).nonzero().squeeze(1)[:max_tokens]
    widths = {name: store.d_in(name) for name in store.sites}
    return choose(
        store.read_rows,
        widths,
        d,
        chosen,
        columns["row"][chosen],
        columns["position"][chosen],
        columns["token_id"][chosen],
        fit_share=fit_share,
        seed=seed,
        name=str(store.path),
    )


def tokens_of_arrays(
    activations: Mapping[str, Float[Tensor, "n _"]],
    context: Int64[Tensor, " n"],
    token_id: Int64[Tensor, " n"] | None = None,
    *,
    fit_share: float = 0.5,
    seed: int = 0,
) -> Tokens:
    """Tokens of activations that are in memory: the first site's width is the one that counts."""
    d = next(iter(activations.values())).shape[1]
    n = context.numel()
    starts = torch.arange(n)
    position = starts - torch.searchsorted(context, context) if n and bool((context.diff() >= 0).all()) else starts

    def gather(site: str, rows: Tensor) -> Tensor:
        return activations[site][rows]

    widths = {name: values.shape[1] for name, values in activations.items()}
    ids = torch.zeros(n, dtype=torch.int64) if token_id is None else token_id
    return choose(gather, widths, d, starts, context, position, ids, fit_share=fit_share, seed=seed, name="the data")


def choose(  # noqa: PLR0917
    gather: Gather,
    widths: Mapping[str, int],
    d: int,
    index: Int64[Tensor, " n"],
    context: Int64[Tensor, " n"],
    position: Int64[Tensor, " n"],
    token_id: Int64[Tensor, " n"],
    *,
    fit_share: float,
    seed: int,
    name: str,
) -> Tokens:
    """Split tokens by context and check that there are enough of them; see :func:`tokens_of_store`."""
    if not 0 < fit_share < 1:
        raise ConfigError(f"fit_share is {fit_share:g}, expected a share between 0 and 1, such as 0.5")
    contexts: Tensor = torch.unique(context)
    if contexts.numel() < 2:
        raise StoreError(
            f"{name} has {index.numel()} tokens of {contexts.numel()} context to look at, but fit and test need "
            "different contexts; harvest more text or shorter contexts"
        )
    order = contexts[torch.randperm(contexts.numel(), generator=torch.Generator().manual_seed(seed))]
    n_fit = min(max(1, round(fit_share * contexts.numel())), contexts.numel() - 1)
    fit = torch.isin(context, order[:n_fit])
    fewest = min(int(fit.sum()), int((~fit).sum()))
    if fewest < REFUSED * d:
        raise StoreError(
            f"{name} has {int(fit.sum())} tokens to fit and {int((~fit).sum())} to test, too few for activations of "
            f"width {d}: give at least {REFUSED * d} each ({HONEST * d} in all for an honest R2)"
        )
    notes = []
    if fewest < HONEST * d / 2:
        notes.append(
            f"{index.numel()} tokens are fewer than {HONEST} per dimension ({HONEST * d}): a held-out R2 is too low"
        )
    if contexts.numel() < 20:
        notes.append(f"only {contexts.numel()} contexts: intervals are rough")
    return Tokens(gather, dict(widths), index, context, position, token_id, fit, tuple(notes))
