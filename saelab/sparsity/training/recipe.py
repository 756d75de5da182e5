"""A recipe of sparse training: a choice along the five axes. One YAML file in ``configs/sparsity/training/`` each."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from saelab.core.config import Config
from saelab.sparsity.pattern import Neurons, NofM, Pattern, Unstructured, parse_pattern
from saelab.sparsity.training.gradients import BDWP, SRSTE, STE, Decayed, Masked, SoftThreshold
from saelab.sparsity.training.learned import AutoSparse, FishMask, LearnedScores, Nested, SoRA
from saelab.sparsity.training.penalties import AnyPenalty
from saelab.sparsity.training.schedules import AnySchedule, Cubic, DecayPattern, DropAndGrow, Once, Refresh
from saelab.sparsity.training.scores import ScoreName

AnyGradient = Annotated[
    Masked | STE | SRSTE | SoftThreshold | Decayed | BDWP | AutoSparse | LearnedScores | Nested | FishMask | SoRA,
    Field(discriminator="name"),
]
"""A treatment of masked weights by its ``name``."""


class Cycles(Config):
    """Train, prune, train again: several trainings for one sparse model.

    After round r of ``rounds`` the sparsity is 1 - (1 - s)^(r / rounds): each round prunes the same share of what is
    left. Iterative magnitude pruning (Frankle & Carbin 2019) rewinds the weights; sparse model soups (Zimmer et al.
    2024) go on from them, train copies that differ in the order of the data and in weight decay, and average them.
    """

    rounds: int = Field(default=4, ge=1)
    """Prunings, each followed by a training."""
    rewind: float | None = Field(default=0.0, ge=0, lt=1)
    """Share of the first training to whose weights each round returns (0: the initial ones), going on from that step;
    null: each round starts from the weights just pruned, at step 0 of a new training."""
    copies: int = Field(default=1, ge=1)
    """Models trained per round under one mask; their average is what is pruned next, and at the end the result."""
    decay_factor: float = Field(default=1.0, ge=1)
    """Weight decay of the copies, from 1 / this to this times the usual one, spaced geometrically."""
    control: bool = True
    """With ``rewind``: also train the last mask from other random weights."""

    @model_validator(mode="after")
    def _agree(self) -> "Cycles":
        if self.copies > 1 and self.rewind is not None:
            raise ValueError("copies are averaged, and a round that rewinds forgets the average; use rewind null")
        return self


class TrainingRecipe(Config):
    """How weights are kept sparse while they are trained."""

    score: ScoreName = "magnitude"
    """Which weights stay: by magnitude, at random, by |gradient|, or by |weight x gradient|."""
    pattern: str | None = None
    """"layer" (the default): any weights of a layer; "row": equally many of each output; "N:M": N of every M inputs;
    "neuron": whole outputs."""
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of the weights that go (with N:M the pattern says it)."""
    allocation: Literal["uniform", "erk", "global"] = "uniform"
    """How layers share the sparsity: alike, by Erdos-Renyi-kernel, or by one threshold on all scores."""
    schedule: AnySchedule = Once()
    """When masks are made and changed."""
    gradient: AnyGradient = Masked()
    """What masked weights do in the forward pass, and what gradient they receive."""
    cycles: Cycles | None = None
    """Several trainings, each pruned further, instead of one."""
    penalty: AnyPenalty | None = None
    """What pulls weights towards zero before the schedule's mask takes them away."""
    widen: bool = False
    """Sparse-IFT (Saxena et al. 2023): the model's width is multiplied by sqrt(1 / (1 - sparsity)), so that its sparse
    linear layers cost as many products as the dense ones of the width given. Language models only."""
    masks: str | None = None
    """Folder whose masks are used (a sparse model or SAE); then score, pattern and sparsity are its."""
    include: tuple[str, ...] = ("*",)
    """Layers to make sparse, as shell patterns on their names."""
    exclude: tuple[str, ...] = ()
    """Layers to leave alone; embeddings, norms, biases and the unembedding always are."""
    seed: int = Field(default=0, ge=0)
    """Of what is drawn at random."""

    @model_validator(mode="after")
    def _agree(self) -> "TrainingRecipe":
        if self.masks is not None:
            self._agree_with_masks()
            return self
        if self.gradient.unpatterned:
            if self.pattern is not None or self.sparsity is not None or not isinstance(self.schedule, Once):
                raise ValueError(
                    f"gradient {self.gradient.name} decides by its own settings; "
                    "leave out pattern, sparsity and schedule"
                )
            return self
        pattern = self.pattern_for(self.sparsity)
        self._agree_with(pattern)
        if self.cycles is not None and (
            self.schedule != Once()
            or self.gradient != Masked()
            or self.score != "magnitude"
            or self.penalty is not None
        ):
            raise ValueError(
                "cycles prune by magnitude between trainings; leave score, schedule, gradient and penalty out"
            )
        moving = isinstance(self.schedule, Refresh | DecayPattern)
        if moving and not self.gradient.dense:
            raise ValueError(
                f"schedule {self.schedule.name} chooses among all weights again and again, so masked ones must be "
                "trained; give a gradient other than none"
            )
        if isinstance(self.schedule, DropAndGrow) and self.gradient.dense:
            raise ValueError("schedule drop-and-grow keeps masked weights at zero; use it with gradient none")
        if moving and self.score != "magnitude":
            raise ValueError(f"schedule {self.schedule.name} follows magnitudes; use it with score magnitude")
        if self.gradient.name == "soft" and not moving:
            raise ValueError("gradient soft is a threshold that follows the weights; use it with schedule refresh")
        return self

    def _agree_with_masks(self) -> None:
        if self.pattern is not None or self.sparsity is not None or not isinstance(self.schedule, Once):
            raise ValueError("masks says which weights stay; leave out pattern and sparsity, with schedule once")
        if self.cycles is not None:
            raise ValueError("masks are fixed and cycles make new ones; leave one of them out")
        if self.gradient.name in ("soft", "bdwp", "pst", "dress") or self.gradient.unpatterned:
            raise ValueError(f"gradient {self.gradient.name} chooses its weights itself; leave masks out")

    def _agree_with(self, pattern: Pattern) -> None:
        if self.penalty is not None and not isinstance(pattern, self.penalty.pattern):
            wanted = "neuron" if self.penalty.pattern is Neurons else "layer or row"
            raise ValueError(f"penalty {self.penalty.name} works towards a mask of pattern {wanted}; set pattern so")
        if self.widen and isinstance(pattern, Neurons):
            raise ValueError("widen makes up for zeros in a matrix; pattern neuron makes it smaller, so leave one out")
        if isinstance(pattern, NofM):
            if self.cycles is not None and self.cycles.rounds > 1:
                raise ValueError(f"pattern {self.pattern} has no sparsities between; use cycles with rounds 1")
            if self.allocation != "uniform":
                raise ValueError(f"pattern {self.pattern} leaves nothing to allocate; leave allocation out")
            if isinstance(self.schedule, Cubic):
                raise ValueError(f"schedule cubic has no steps between dense and {self.pattern}; use decay-pattern")
            return
        if self.allocation != "uniform" and (isinstance(pattern, Neurons) or pattern.per_row):
            raise ValueError(f"allocation {self.allocation} counts weights by the layer; use pattern layer")
        if self.gradient.name == "dress" and not (isinstance(pattern, Unstructured) and pattern.per_row):
            raise ValueError("gradient dress has masks of equally many weights of each output; use pattern row")
        if isinstance(self.schedule, DecayPattern):
            raise ValueError("schedule decay-pattern goes from M-1:M to N:M; give a pattern such as 2:4")
        if self.gradient.name == "bdwp":
            raise ValueError("gradient bdwp prunes N:M along inputs and outputs; give a pattern such as 2:4")

    def pattern_for(self, sparsity: float | None) -> Pattern:
        """Return the pattern, with a sparsity. Raises ``ConfigError``."""
        return parse_pattern(self.pattern or "layer", sparsity)
