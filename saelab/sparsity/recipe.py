"""A recipe: method, pattern, allocation and layers. One YAML file in ``configs/sparsity/`` each."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from saelab.core.config import Config
from saelab.sparsity.methods import AnyMethod, Magnitude, Method, Wanda
from saelab.sparsity.pattern import NofM, Pattern, parse_pattern


class Recipe(Config):
    """How a model's weights are made sparse."""

    method: AnyMethod = Wanda()
    """Which weights go, and what happens to the others."""
    pattern: str | None = None
    """"row": equally many of each output row; "layer": of the layer as a whole; "N:M": N of every M inputs stay."""
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of the weights that go (with N:M the pattern says it)."""
    allocation: Literal["uniform", "erk", "global", "sensitivity"] = "uniform"
    """How layers share the sparsity: alike, by Erdos-Renyi-kernel, by one threshold on all magnitudes, or by a scan of
    how much each layer's pruning raises the loss."""
    include: tuple[str, ...] = ("*",)
    """Layers to prune, as shell patterns on their names."""
    exclude: tuple[str, ...] = ()
    """Layers to leave alone; embeddings, norms, biases and the unembedding always are."""
    calibration_tokens: int = Field(default=32_768, gt=0)
    """Positions of calibration text to run."""

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _agree(self) -> "Recipe":
        patterned = isinstance(self.method, Method) and self.method.patterned
        if not patterned:
            given = [name for name in ("pattern", "sparsity") if getattr(self, name) is not None]
            if given or self.allocation != "uniform":
                raise ValueError(
                    f"method {self.method.name} decides by its own settings how much goes; leave out "
                    f"{', '.join(given) or 'allocation'}"
                )
            return self
        found = self.pattern_for(self.sparsity)
        if self.allocation != "uniform" and isinstance(found, NofM):
            raise ValueError(f"pattern {self.pattern} leaves nothing to allocate; leave allocation out")
        if self.allocation == "global" and not isinstance(self.method, Magnitude):
            raise ValueError("allocation global compares magnitudes over layers; use it with method magnitude")
        return self

    def pattern_for(self, sparsity: float | None) -> Pattern:
        """Return the pattern, with a layer's own sparsity. Raises ``ConfigError``."""
        return parse_pattern(self.pattern or "row", sparsity)
