"""Masks of a step: scores, shared out by the allocation, cut to the pattern."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saelab.core.errors import ConfigError
from saelab.sparsity.allocation import by_global_score, erk, uniform
from saelab.sparsity.folder import load_masks
from saelab.sparsity.pattern import Neurons, NofM, Pattern, Unstructured
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.sparsity.training.scores import NEED_GRADIENT, SCORES, draw_like
from saelab.sparsity.training.target import Target


class Masking:
    """Makes the masks of a recipe. Raises :class:`ConfigError` for a pattern that does not divide a layer."""

    def __init__(self, targets: Sequence[Target], recipe: TrainingRecipe, steps: int) -> None:
        self._targets, self._recipe, self._steps = targets, recipe, steps
        self._shapes = {t.name: t.shape for t in targets}
        patterned = recipe.masks is None and not recipe.gradient.unpatterned
        if patterned and isinstance(pattern := recipe.pattern_for(recipe.sparsity), NofM):
            for t in targets:
                pattern.require(t.shape[1], f"layer {t.name}")
                if recipe.gradient.needs_modules and t.shape[0] % pattern.m:
                    raise ConfigError(
                        f"pattern {recipe.pattern} does not divide the {t.shape[0]} outputs of layer {t.name}, along "
                        f"which gradient {recipe.gradient.name} prunes too; exclude the layer"
                    )

    @property
    def needs_gradient(self) -> bool:
        """Whether a mask can only be made after a backward pass."""
        return self._recipe.masks is None and self._recipe.score in NEED_GRADIENT

    def masks(self, step: int, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks made of the targets' weights (and gradients) as they are now.

        With gradient ``none``, what was masked stays masked: it has no value to come back with.
        """
        scores = {}
        for index, t in enumerate(self._targets):
            draw = draw_like(t.weight, self._recipe.seed, step, index)
            score = SCORES[self._recipe.score](t.weight, t.gradient, draw).float().contiguous()
            if not self._recipe.gradient.dense:
                score = torch.where(old[t.name], score, -torch.inf)
            scores[t.name] = score
        return {
            name: torch.ones_like(old[name]) if pattern is None else pattern.mask(scores[name])
            for name, pattern in self._patterns(step, scores).items()
        }

    def pattern(self, step: int) -> Pattern | None:
        """Return the pattern of this step's masks: which weights compete; None where there is none."""
        recipe = self._recipe
        if recipe.masks is not None or recipe.gradient.unpatterned:
            return None
        final = recipe.pattern_for(recipe.sparsity)
        return recipe.schedule.pattern(step, self._steps, final) if isinstance(final, NofM) else final

    def _patterns(self, step: int, scores: Mapping[str, Tensor]) -> dict[str, Pattern | None]:
        recipe = self._recipe
        final = self.pattern(step)
        if not isinstance(final, Unstructured | Neurons):
            return dict.fromkeys(scores, final)
        sparsity = recipe.schedule.sparsity(step, self._steps, final.sparsity)
        if isinstance(final, Neurons):
            return dict.fromkeys(scores, Neurons(sparsity))
        if recipe.allocation == "global":
            shares = by_global_score(scores, sparsity)
        else:
            shares = erk(self._shapes, sparsity) if recipe.allocation == "erk" else uniform(self._shapes, sparsity)
        return {name: Unstructured(share, final.per_row) for name, share in shares.items()}


def given_masks(folder: str, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return the masks in a folder for these weights. Raises :class:`ConfigError` when they are of others."""
    found = load_masks(folder)
    masks = {}
    for t in targets:
        if t.name not in found:
            raise ConfigError(f"{folder} has no mask for layer {t.name}; it has {', '.join(found) or 'none'}")
        if tuple(found[t.name].shape) != t.shape:
            raise ConfigError(
                f"the mask of layer {t.name} in {folder} is {tuple(found[t.name].shape)}, the weight is {t.shape}"
            )
        masks[t.name] = found[t.name].to(t.weight.device)
    return masks
