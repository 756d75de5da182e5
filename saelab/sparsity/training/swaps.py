"""One change of a drop-and-grow training: the masks of all layers, after the gradients are known."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sparsity.training.grow import drop_and_grow, explore_score, shared_growth
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.sparsity.training.schedules import DropAndGrow
from saelab.sparsity.training.scores import draw_like
from saelab.sparsity.training.target import Target


def swap(
    targets: Sequence[Target],
    masks: Mapping[str, Tensor],
    memory: Mapping[str, dict[str, Tensor]],
    recipe: TrainingRecipe,
    at: tuple[int, int],
) -> dict[str, Tensor]:
    """Return new masks with as many entries as the old ones: in each layer, or in all of them with ``share``.

    ``at`` is the step and the number of steps.
    """
    step, steps = at
    schedule = recipe.schedule
    assert isinstance(schedule, DropAndGrow)
    pattern = recipe.pattern_for(recipe.sparsity)
    share = schedule.dropped(step, steps)
    dropped, grown = {}, {}
    for t in targets:
        kept = int(pattern.groups(masks[t.name])[0].sum())
        dropped[t.name] = grown[t.name] = round(share * kept)
    if schedule.share:
        grown = _shared(targets, masks, memory, dropped)
    found = {}
    for index, t in enumerate(targets):
        mask = pattern.groups(masks[t.name])
        score = pattern.groups(_score(t, memory[t.name], schedule, draw_like(t.weight, recipe.seed, step, index), step))
        groups = pattern.groups(t.weight), score, mask
        found[t.name] = drop_and_grow(*groups, dropped[t.name], grown[t.name]).reshape(t.shape)
        if "active" in memory[t.name]:
            memory[t.name]["active"] = memory[t.name]["active"] + found[t.name]
    return found


def _shared(
    targets: Sequence[Target],
    masks: Mapping[str, Tensor],
    memory: Mapping[str, dict[str, Tensor]],
    dropped: Mapping[str, int],
) -> dict[str, int]:
    means, room = {}, {}
    for t in targets:
        mask = masks[t.name]
        means[t.name] = float(memory[t.name]["momentum"].abs()[mask].mean()) if bool(mask.any()) else 0.0
        room[t.name] = mask.numel() - int(mask.sum()) + dropped[t.name]
    return shared_growth(means, room, sum(dropped.values()))


def _score(
    target: Target, memory: Mapping[str, Tensor], schedule: DropAndGrow, draw: Float[Tensor, "out in"], step: int
) -> Float[Tensor, "out in"]:
    if schedule.grow == "random":
        return draw
    if schedule.grow == "momentum":
        return memory["momentum"].abs()
    gradient = target.gradient
    gradient = torch.zeros_like(target.weight) if gradient is None else gradient
    if schedule.grow == "explore":
        return explore_score(gradient, memory["active"], step, schedule.c)
    return gradient.abs()
