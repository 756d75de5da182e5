"""What ``quality.py`` trains, in which order, and which learning rates it settles on. Pure data and functions."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POINTS = (8, 16, 32, 64)
"""Features per token."""
REFERENCE = 32
"""L0 at which learning rates are compared where the knob is not k."""
SEEDS = (0, 1, 2)
SWEEP_SEED = 100
"""Seed of the learning-rate sweep, which none of the reported runs has."""
SLACK = 0.02
"""Relative difference in validation FVU that is not worth a higher learning rate."""
BATCH = 512
MOST_SWEPT = 5
"""Learning rates tried at most."""
MAIN_SUBJECT = "embedded"
"""Where every variant is trained; on the other subjects those that are marked ``everywhere``."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One line of the table: an architecture of one package, with its settings."""

    package: str
    name: str
    knob: str = "k"
    """Which setting moves L0."""
    points: tuple[float, ...] = POINTS
    """Values of the knob."""
    sweep: tuple[float, ...] = POINTS
    """Values at which learning rates are compared; another value takes the nearest one's rate."""
    points_elsewhere: tuple[float, ...] | None = None
    """Values of the knob on the other subjects, if not the same: a coefficient is in units of the activations."""
    sweep_elsewhere: tuple[float, ...] | None = None
    """Values swept there."""
    lrs: tuple[float, ...] = (8e-3, 1.2e-2, 1.6e-2)
    """First learning rates tried; the sweep goes on by factors of 2 beyond the end that is best."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the SAE."""
    lr_of: str | None = None
    """Takes the learning rate of this variant instead of a sweep of its own."""
    everywhere: bool = True
    """Whether it is trained on every subject, and not on the main one alone."""

    @property
    def label(self) -> str:
        """Name with package."""
        return f"{self.package} {self.name}"

    @property
    def architecture(self) -> str:
        """Name of the architecture in its package."""
        return str(self.settings.get("architecture", self.name))

    def swept(self, subject: str) -> tuple[float, ...]:
        """Return the values of the knob at which learning rates are compared on a subject."""
        return self.sweep if subject == MAIN_SUBJECT else (self.sweep_elsewhere or self.sweep)

    def points_on(self, subject: str) -> tuple[float, ...]:
        """Return the values of the knob on a subject."""
        return self.points if subject == MAIN_SUBJECT else (self.points_elsewhere or self.points)

    def own_settings(self) -> dict[str, Any]:
        """Return the settings without the architecture's name."""
        return {key: value for key, value in self.settings.items() if key != "architecture"}


def _saelab(name: str, **about: Any) -> Variant:
    return Variant("saelab", name, **about)


SAELAB = (
    _saelab("topk"),
    _saelab("mutual_choice"),
    _saelab("gradient", lr_of="topk"),
    _saelab(
        "mutual_choice, aux_zipf",
        settings={"architecture": "mutual_choice", "aux": "zipf"},
        lr_of="mutual_choice",
        everywhere=False,
    ),
    _saelab("feature_choice"),
    _saelab(
        "feature_choice, uniform",
        settings={"architecture": "feature_choice", "quotas": "uniform"},
        lr_of="feature_choice",
        everywhere=False,
    ),
    _saelab(
        "feature_choice, aux_zipf",
        settings={"architecture": "feature_choice", "aux": "zipf"},
        lr_of="feature_choice",
        everywhere=False,
    ),
    _saelab(
        "relu",
        knob="sparsity",
        points=(0.75, 1.5, 3.0, 5.0, 8.0),
        sweep=(2.0, 5.0),
        points_elsewhere=(0.25, 0.5, 1.0, 2.0),
        sweep_elsewhere=(0.5, 2.0),
        lrs=(2e-3, 4e-3),
    ),
    _saelab(
        "gated",
        knob="sparsity",
        points=(1.5, 3.0, 5.0, 8.0),
        points_elsewhere=(0.5, 1.0, 2.0, 4.0),
        lr_of="relu",
    ),
    _saelab("jumprelu", knob="target_l0", sweep=(24, 44), lrs=(4e-3, 8e-3)),
    _saelab("matryoshka", lrs=(4e-3, 8e-3)),
)
PEERS = (
    Variant("saelens", "topk"),
    Variant("saelens", "batchtopk"),
    Variant("dictionary_learning", "topk", sweep=(32,), lrs=(8e-3, 1.6e-2), everywhere=False),
    Variant("dictionary_learning", "batchtopk", sweep=(32,), lrs=(8e-3, 1.6e-2), everywhere=False),
    Variant("sparsify", "topk", sweep=(32,), lrs=(1e-2, 2e-2)),
)


def planned(variants: Iterable[Variant], subject: str) -> list[Variant]:
    """Return the variants that are trained on a subject."""
    return [variant for variant in variants if variant.everywhere or subject == MAIN_SUBJECT]


def key_of(row: Row) -> tuple[Any, ...]:
    """Identify a run: a row with this key is not made again."""
    return tuple(row[name] for name in ("stage", "subject", "package", "name", "point", "lr", "seed", "tokens"))


def at_l0(points: Iterable[tuple[float, float]], l0: float) -> float:
    """Return the value at an L0 between measured (L0, value) pairs, linear in log L0; nan outside of them.

    A pair within 3 % of the L0 asked for is taken as it is.
    """
    pairs = sorted(points)
    near = min(pairs, key=lambda pair: abs(math.log(pair[0] / l0)), default=None)
    if near is not None and abs(math.log(near[0] / l0)) < 0.03:
        return near[1]
    for (low, a), (high, b) in itertools.pairwise(pairs):
        if low <= l0 <= high:
            share = math.log(l0 / low) / math.log(high / low)
            return a + share * (b - a)
    return math.nan


def scores(variant: Variant, subject: str, rows: Iterable[Row], point: float) -> dict[float, float]:
    """Return the validation FVU of each learning rate tried so far for one value of the knob; lower is better.

    Where inference goes by thresholds, L0 is not quite k: FVU is then brought to k features by ``FVU ~ L0^-1/2``, about
    its slope here. With a knob other than k there is one rate for all values: the score is the FVU at
    :data:`REFERENCE` features per token; where the L0 of a rate's runs does not enclose that, the nearest run's FVU,
    times how far off it is, so that such a rate loses to one that does.
    """
    found: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        if row["stage"] != "lr" or row["subject"] != subject:
            continue
        mine = (row["package"], row["name"]) == (variant.package, variant.name)
        if mine and (variant.knob != "k" or row["point"] == point):
            found.setdefault(row["lr"], []).append((row["l0"], row["fvu"]))
    result = {}
    for lr, points in found.items():
        if variant.knob == "k":
            result[lr] = points[0][1] * math.sqrt(points[0][0] / point)
            continue
        value = at_l0(points, REFERENCE)
        if math.isnan(value):
            l0, fvu = min(points, key=lambda point: abs(math.log(max(point[0], 1e-3) / REFERENCE)))
            value = fvu * (1 + abs(math.log(max(l0, 1e-3) / REFERENCE)))
        result[lr] = value
    return result


def sweep_next(variant: Variant, subject: str, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return the (knob, learning rate) pairs to try next; none when every rate is found."""
    if variant.lr_of is not None:
        return []
    points = variant.swept(subject)
    if variant.knob != "k":
        rates = next_rates(variant, scores(variant, subject, rows, REFERENCE))
        return [(point, lr) for lr in rates for point in points]
    return [(point, lr) for point in points for lr in next_rates(variant, scores(variant, subject, rows, point))]


def next_rates(variant: Variant, tried: Mapping[float, float]) -> list[float]:
    """Return the learning rates to try next: the first ones, then one beyond the best while that is at an end."""
    missing = [lr for lr in variant.lrs if lr not in tried]
    if missing:
        return missing
    if len(tried) >= MOST_SWEPT:
        return []
    best = min(tried, key=lambda lr: tried[lr])
    if best == max(tried):
        return [best * 2]
    return [best / 2] if best == min(tried) else []


def best_rate(variant: Variant, subject: str, rows: Sequence[Row], variants: Sequence[Variant], point: float) -> float:
    """Return the learning rate for one value of the knob: the lowest one within :data:`SLACK` of the best FVU.

    Of rates that rebuild equally well, a lower one leaves fewer features dead, in every package.
    """
    source = variant
    if variant.lr_of is not None:
        source = next(v for v in variants if v.package == variant.package and v.name == variant.lr_of)
    nearest = min(source.swept(subject), key=lambda swept: abs(math.log(swept / point)))
    tried = scores(source, subject, rows, nearest)
    return min(lr for lr, fvu in tried.items() if fvu <= (1 + SLACK) * min(tried.values()))
