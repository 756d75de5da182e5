"""``SparseTraining``: carries out a recipe around the steps of a training loop.

There is one mechanism for masks. Each weight has a *stored* value, which the optimiser trains, and an *effective* one,
which the forward pass sees. With gradient ``none`` they are equal, zero where masked. Otherwise ``before_forward``
writes the effective weight into the parameter and ``after_backward`` writes the stored one back, so that any forward
and backward pass (autograd, or an SAE's own kernels) works on it without knowing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.core.artifacts import write_json
from saelab.sparsity.folder import REPORT, write_masks
from saelab.sparsity.pattern import NofM, Pattern
from saelab.sparsity.training.backward_mask import prune_backward
from saelab.sparsity.training.gradients import View
from saelab.sparsity.training.masking import Masking, given_masks
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.sparsity.training.report import TrainingReport, count
from saelab.sparsity.training.schedules import DropAndGrow
from saelab.sparsity.training.swaps import swap
from saelab.sparsity.training.target import Target

CHECKS = 100
"""Lines of the history of a training, about."""
MOMENTUM = 0.9
"""Of the averaged gradient that sparse momentum grows by."""


class SparseTraining:
    """A recipe at work on some weights; see the module's docstring.

    Raises :class:`ConfigError` for a pattern that does not divide a layer, and for masks of other layers.
    """

    @torch.no_grad()
    def __init__(
        self, targets: Sequence[Target], recipe: TrainingRecipe, optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self.targets, self.recipe, self.optimizer, self.steps = tuple(targets), recipe, optimizer, steps
        self.masks = {t.name: torch.ones(t.shape, dtype=torch.bool, device=t.weight.device) for t in targets}
        """True where a weight stays, (out, in)."""
        self.memory: dict[str, dict[str, Tensor]] = {t.name: {} for t in targets}
        self._masking = Masking(self.targets, recipe, steps)
        self._given = None if recipe.masks is None else given_masks(recipe.masks, self.targets)
        self._stored: dict[str, Tensor] = {}
        self._checked = {name: mask.clone() for name, mask in self.masks.items()}
        self._history: list[list[float]] = []
        self._density = torch.zeros(2, dtype=torch.float64)  # sum over steps of the density, steps
        self._step, self._seconds, self._finished, self._looking = 0, 0.0, False, False
        self._facts: dict[str, float] = {}
        if self._given is not None and recipe.schedule.due(0, steps):
            self._set(self._given)  # at once: a rewound training does not begin at step 0
        pattern = self._masking.pattern(0)
        self._handles = []
        if recipe.gradient.needs_modules and isinstance(pattern, NofM):
            self._handles = prune_backward(self.targets, pattern, self.stored)

    # the three moments of a step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_forward(self, step: int) -> None:
        """Make the masks that are due, and put the effective weights in."""
        began = time.perf_counter()
        self._step = step
        if self.recipe.schedule.due(step, self.steps) and not self._masking.needs_gradient:
            self._set(self._given or self._masking.masks(step, self.masks))
        if step % max(1, self.steps // CHECKS) == 0:
            self._check(step)
        self._put_in()
        used = self.recipe.gradient.taking_part(self.density, self._progress)
        self._density += torch.tensor([used, 1.0], dtype=torch.float64)
        self._seconds += time.perf_counter() - began

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Put the stored weights back, change masks that gradients decide, and give gradients their treatment."""
        began = time.perf_counter()
        self._put_back()
        schedule = self.recipe.schedule
        if schedule.due(step, self.steps) and self._masking.needs_gradient:
            self._set(self._masking.masks(step, self.masks))
        if isinstance(schedule, DropAndGrow):
            self._note_gradients(schedule)
            if schedule.swaps(step, self.steps):
                self._set(swap(self.targets, self.masks, self.memory, self.recipe, (step, self.steps)))
        for target in self.targets:
            if (gradient := target.gradient) is not None:
                gradient.copy_(self.recipe.gradient.backward(gradient, self.view(target)))
        if self.recipe.gradient.alone:
            self._still_others()
        if (penalty := self.recipe.penalty) is not None:
            penalty.after_backward(self.targets, self.masks, self.memory, self._final, self._progress)
        self._seconds += time.perf_counter() - began

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep masked weights at zero, where they have no values of their own; penalties."""
        if self.recipe.penalty is not None:
            self.recipe.penalty.after_step(self.targets, self.masks, self.memory, self._final, self._lr)
        for target in self.targets:
            self.recipe.gradient.after_step(self.view(target))
        if not self.recipe.gradient.dense:
            for target in self.targets:
                target.weight.mul_(self.masks[target.name])

    # between steps ---------------------------------------------------------------------------------------------------

    @contextmanager
    def look(self) -> Iterator[None]:
        """Within it, parameters hold the effective weights, of masks as they would be made now."""
        kept = self.masks
        with torch.no_grad():
            self.masks = dict(self._latest())
            self._looking = True
            self._put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                self._put_back()
            self.masks, self._looking = kept, False

    @torch.no_grad()
    def finish(self) -> None:
        """Make the effective weights permanent."""
        if not self._finished:
            self._step = self.steps - 1
            self.masks = dict(self._latest())
            self._looking = True
            self._facts = self._told()
            self._put_in()
            self._check(self.steps)
            self._stored.clear()
            for handle in self._handles:
                handle.remove()
            self._finished = True

    def view(self, target: Target) -> View:
        """Return a weight as the axes see it now; ``weight`` is the stored one."""
        pattern, memory = self._masking.pattern(self._step), self.memory[target.name]
        weight, mask = self.stored(target), self.masks[target.name]
        return View(weight, mask, pattern, self._progress, memory, self._step, self._looking)

    def stored(self, target: Target) -> Tensor:
        """Return a target's stored weight, wherever it is."""
        return self._stored.get(target.name, target.weight)

    @property
    def density(self) -> float:
        """Share of the weights that the masks leave."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / sum(mask.numel() for mask in self.masks.values())

    def report(self) -> TrainingReport:
        """Count the weights as the parameters hold them now."""
        layers = count(self.targets, self.masks)
        size = sum(layer.outputs * layer.inputs for layer in layers)
        zeros = sum(layer.sparsity * layer.outputs * layer.inputs for layer in layers)
        density = float(self._density[0] / self._density[1].clamp_min(1))
        history = tuple(dict(zip(("step", "sparsity", "sad"), line, strict=True)) for line in self._history)
        return TrainingReport(
            recipe=self.recipe.model_dump(mode="json"),
            sparsity=zeros / size,
            average_density=density,
            average_parameters=density * size,
            seconds=self._seconds,
            layers=layers,
            history=history,
            facts=self._facts,
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write masks (bit-packed) and report into a folder; return what a manifest says of them."""
        report = self.report()
        write_masks(folder, self.masks)
        write_json(folder / REPORT, report.to_dict())
        return {
            "sparsity": report.sparsity,
            "average_density": report.average_density,
            "recipe": report.recipe,
        }

    # checkpoints -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return masks, memories and counters."""
        tensors = {f"mask/{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"checked/{name}": mask for name, mask in self._checked.items()}
        for name, memory in self.memory.items():
            tensors |= {f"memory/{name}/{key}": value for key, value in memory.items()}
        tensors["density"] = self._density
        tensors["history"] = torch.tensor(self._history, dtype=torch.float64).reshape(-1, 3)
        tensors["seconds"] = torch.tensor(self._seconds, dtype=torch.float64)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Return to a state of :meth:`state`."""
        for target in self.targets:
            device = target.weight.device
            self.masks[target.name] = tensors[f"mask/{target.name}"].to(device).clone()
            self._checked[target.name] = tensors[f"checked/{target.name}"].to(device).clone()
            start = f"memory/{target.name}/"
            found = {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}
            self.memory[target.name] = {key: value.to(device).clone() for key, value in found.items()}
        self._density = tensors["density"].cpu().clone()
        self._history = tensors["history"].tolist()
        self._seconds = float(tensors["seconds"])

    # parts -----------------------------------------------------------------------------------------------------------

    def _latest(self) -> dict[str, Tensor]:
        """Return the masks as they would be made of the stored weights now."""
        if not self.recipe.schedule.follows:
            return self.masks
        return self._masking.masks(self._step, self.masks)

    @property
    def _progress(self) -> float:
        return self._step / max(1, self.steps - 1)

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _final(self) -> Pattern:
        return self.recipe.pattern_for(self.recipe.sparsity)

    def _still_others(self) -> None:
        """Take the gradients of parameters that are no targets away, which leaves them out of the optimiser's step."""
        own = {id(target.parameter) for target in self.targets}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in own:
                    parameter.grad = None

    def _told(self) -> dict[str, float]:
        """Return the method's own facts, means over all weights."""
        told: dict[str, float] = {}
        size = sum(target.weight.numel() for target in self.targets)
        for target in self.targets:
            for key, value in self.recipe.gradient.facts(self.view(target)).items():
                told[key] = told.get(key, 0.0) + value * target.weight.numel() / size
        return told

    def _put_in(self) -> None:
        if not self.recipe.gradient.dense:
            return
        for target in self.targets:
            if (own := self.recipe.gradient.own_mask(self.view(target))) is not None:
                self.masks[target.name] = own
            effective = self.recipe.gradient.forward(self.view(target))
            self._stored[target.name] = target.weight.clone()
            target.weight.copy_(effective)

    def _put_back(self) -> None:
        for target in self.targets:
            if target.name in self._stored:
                target.weight.copy_(self._stored.pop(target.name))

    def _set(self, masks: dict[str, Tensor]) -> None:
        """Take new masks over; what is masked for good loses its value and its moments."""
        self.masks = masks
        if self.recipe.gradient.dense:
            return
        for target in self.targets:
            mask = masks[target.name]
            target.weight.mul_(mask)
            for moment in self.optimizer.state.get(target.parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == target.parameter.shape:
                    target.oriented(moment).mul_(mask)

    def _check(self, step: int) -> None:
        size = sum(mask.numel() for mask in self.masks.values())
        changed = sum(int((mask != self._checked[name]).sum()) for name, mask in self.masks.items())
        self._history.append([float(step), 1 - self.density, changed / size])
        self._checked = {name: mask.clone() for name, mask in self.masks.items()}

    def _note_gradients(self, schedule: DropAndGrow) -> None:
        """Keep what sparse momentum and exploration grow by."""
        for target in self.targets:
            memory, gradient = self.memory[target.name], target.gradient
            if schedule.grow == "momentum" and gradient is not None:
                before = memory.get("momentum", torch.zeros_like(gradient))
                memory["momentum"] = MOMENTUM * before + (1 - MOMENTUM) * gradient
            if schedule.grow == "explore" and (self._step == 0 or "active" not in memory):
                memory["active"] = self.masks[target.name].to(target.weight.dtype)
