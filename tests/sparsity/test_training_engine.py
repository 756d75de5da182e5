"""The engine at work on a tiny network: counts, masks, gradients, resuming, files."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saelab.core.artifacts import read_json
from saelab.core.assets import asset
from saelab.core.config import load_config, parse_config
from saelab.core.errors import ConfigError
from saelab.sparsity.folder import load_masks
from saelab.sparsity.pattern import NofM
from saelab.sparsity.training import SparseTraining, TrainingRecipe, targets_of_model
from saelab.sparsity.training.gradients import BDWP

STEPS = 40
RECIPES = sorted(asset("configs/sparsity/training").glob("*.yaml"))


def made(path: Path) -> TrainingRecipe:
    """A recipe of the project, with changes often enough for a short training."""
    recipe = load_config(TrainingRecipe, path)
    if hasattr(recipe.schedule, "every") and recipe.schedule.name != "refresh":
        recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"every": 4})})
    if recipe.gradient.name == "fish":
        recipe = recipe.model_copy(update={"gradient": recipe.gradient.model_copy(update={"batches": 4, "share": 0.1})})
    return recipe.model_copy(update={"include": ("*",)})


def promised(recipe: TrainingRecipe) -> float:
    """The sparsity that a recipe says it ends with; 0 where it says none."""
    if recipe.gradient.unpatterned or recipe.schedule.name == "release":
        return 0.0
    return 0.5 if recipe.pattern == "2:4" else recipe.sparsity or 0.0


class Task:
    """A regression task, its network, optimiser and engine."""

    def __init__(self, recipe: TrainingRecipe, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8))
        draw = torch.Generator().manual_seed(7)
        self.x, self.y = torch.randn(256, 16, generator=draw), torch.randn(256, 8, generator=draw)
        self.y += self.x[:, :8] * self.x[:, 8:]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        self.sparse = SparseTraining(targets_of_model(self.net), recipe, self.optimizer, STEPS)

    def loss(self, step: int) -> torch.Tensor:
        rows = torch.arange(32) + 32 * (step % 8)
        return nn.functional.mse_loss(self.net(self.x[rows]), self.y[rows])

    def run(self, first: int = 0, last: int = STEPS, look: Callable[["Task", int], None] | None = None) -> None:
        for step in range(first, last):
            self.sparse.before_forward(step)
            self.loss(step).backward()
            self.sparse.after_backward(step)
            self.optimizer.step()
            self.sparse.after_step(step)
            if look is not None:
                look(self, step)
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        copied["net"] = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        copied["moments"] = {
            n: {k: v.clone() for k, v in self.optimizer.state[p].items()} for n, p in self.net.named_parameters()
        }
        copied["hook"] = {n: t.clone() for n, t in self.sparse.state().items()}
        return copied

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(state["net"][name])
                self.optimizer.state[parameter] = {k: v.clone() for k, v in state["moments"][name].items()}
        self.sparse.load(state["hook"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_counts_what_it_promises_and_resumes_bit_for_bit(path: Path, tmp_path: Path) -> None:
    recipe = made(path)
    task = Task(recipe)
    first = float(task.loss(0).detach())
    task.run()
    task.sparse.finish()
    assert float(task.loss(0).detach()) < first
    report = task.sparse.report()
    size = sum(layer.outputs * layer.inputs for layer in report.layers)
    masked = sum(layer.masked * layer.outputs * layer.inputs for layer in report.layers)
    wanted = promised(recipe)
    if wanted and recipe.pattern is None:
        assert masked == pytest.approx(
            round(wanted * size), abs=len(report.layers) if recipe.allocation == "uniform" else 1e-6
        )
    for target in task.sparse.targets:
        mask = task.sparse.masks[target.name]
        assert not bool(target.weight[~mask].any())
        if recipe.pattern == "2:4":
            assert bool((mask.view(-1, 4).sum(1) == 2).all())
        if recipe.pattern == "row":
            assert set(mask.sum(1).tolist()) == {mask.shape[1] - round((wanted or 0) * mask.shape[1])}
        if recipe.pattern == "neuron":
            assert int(mask.any(1).sum()) == int(mask.all(1).sum()) == mask.shape[0] // 2

    half = Task(recipe)
    half.run(0, 17)
    resumed = Task(recipe, seed=1)
    resumed.load(half.state())
    resumed.run(17)
    resumed.sparse.finish()
    for a, b in zip(task.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.sparse.report().history == report.history
    assert resumed.sparse.report().average_density == report.average_density

    task.sparse.write(tmp_path)
    saved = load_masks(tmp_path)
    assert all(torch.equal(saved[name], mask) for name, mask in task.sparse.masks.items())
    written = read_json(tmp_path / "sparsity.json")
    assert written["sparsity"] == report.sparsity >= wanted - (0.03 if recipe.pattern == "row" else 0.01)
    assert (tmp_path / "masks.safetensors").stat().st_size < size / 8 + 2000


@pytest.mark.parametrize("grow", ["random", "gradient", "momentum", "explore"])
def test_drop_and_grow_keeps_the_number_of_weights_at_every_step(grow: str) -> None:
    recipe = parse_config(
        TrainingRecipe,
        {
            "score": "random", "sparsity": 0.8, "allocation": "erk",
            "schedule": {"name": "drop-and-grow", "grow": grow, "every": 3, "share": grow == "momentum"},
        },
    )  # fmt: skip
    counts, nonzero, masks = set(), set(), []

    def look(task: Task, step: int) -> None:
        counts.add(sum(int(m.sum()) for m in task.sparse.masks.values()))
        nonzero.add(sum(int((t.weight != 0).sum()) for t in task.sparse.targets))
        masks.append({n: m.clone() for n, m in task.sparse.masks.items()})
        for t in task.sparse.targets:
            assert not bool(t.weight[~task.sparse.masks[t.name]].any())

    task = Task(recipe)
    task.run(look=look)
    budget = round(0.2 * (16 * 32 + 32 * 24 + 24 * 8))
    assert counts == {budget}
    # A weight that grows where it has no effect has no gradient and stays zero; growth by gradients never does that.
    assert max(nonzero) == budget
    if grow == "gradient":
        assert nonzero == {budget}
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert {step + 1 for step, moved in enumerate(changed) if moved} == set(range(3, 30, 3))
    layers = {n: {int(m[n].sum()) for m in masks} for n in masks[0]}
    assert all(len(found) == 1 for found in layers.values()) == (grow != "momentum")


def test_rigl_grows_the_largest_dense_gradients() -> None:
    recipe = parse_config(
        TrainingRecipe,
        {"score": "random", "sparsity": 0.8, "schedule": {"name": "drop-and-grow", "every": 5, "fraction": 0.5}},
    )
    task = Task(recipe)
    task.run(0, 5)
    before = {n: m.clone() for n, m in task.sparse.masks.items()}
    task.loss(5).backward()
    dense = {t.name: t.gradient.abs().clone() for t in task.sparse.targets if t.gradient is not None}
    task.optimizer.zero_grad()
    task.run(5, 6)
    for name, old in before.items():
        grown = task.sparse.masks[name] & ~old
        assert bool(grown.any())
        never = ~task.sparse.masks[name] & ~old
        assert float(dense[name][grown].min()) >= float(dense[name][never].max())


def test_gradual_pruning_never_brings_a_weight_back() -> None:
    recipe = parse_config(TrainingRecipe, {"sparsity": 0.9, "schedule": {"name": "cubic", "every": 2}})
    seen: list[dict[str, torch.Tensor]] = []
    task = Task(recipe)
    task.run(look=lambda t, step: seen.append({n: m.clone() for n, m in t.sparse.masks.items()}))
    for earlier, later in pairwise(seen):
        assert all(not bool((later[n] & ~earlier[n]).any()) for n in later)
    report = task.sparse.report()
    assert 0.1 < report.average_density < 1
    assert report.average_parameters == pytest.approx(report.average_density * (16 * 32 + 32 * 24 + 24 * 8))


def test_masks_settle_and_sad_says_so() -> None:
    recipe = parse_config(
        TrainingRecipe,
        {"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "sr-ste", "decay": 0.1}},
    )
    task = Task(recipe)
    task.run()
    changes = [line["sad"] for line in task.sparse.report().history]
    assert changes[0] > 0  # from dense
    assert sum(changes[-10:]) < sum(changes[1:11])


def test_the_optimiser_sees_stored_weights_and_a_look_sees_effective_ones() -> None:
    recipe = load_config(TrainingRecipe, asset("configs/sparsity/training/ste-2of4.yaml"))
    task = Task(recipe)
    task.run(0, 10)
    target = task.sparse.targets[0]
    stored = target.weight.clone()
    assert int((stored == 0).sum()) == 0
    with task.sparse.look():
        assert int((target.weight == 0).sum()) == stored.numel() // 2
        assert torch.equal(target.weight[target.weight != 0], stored[target.weight != 0])
    assert torch.equal(target.weight, stored)


def test_bdwp_prunes_the_gradient_of_the_input_along_the_outputs() -> None:
    recipe = load_config(TrainingRecipe, asset("configs/sparsity/training/bdwp-2of4.yaml"))
    task = Task(recipe)
    layer = task.sparse.targets[1]
    assert isinstance(layer.module, nn.Linear)
    stored = layer.weight.clone()
    task.sparse.before_forward(0)
    x = torch.randn(5, 32, requires_grad=True)
    out = layer.module(x)
    upstream = torch.randn(5, 24)
    out.backward(upstream)
    pattern = NofM(2, 4)
    torch.testing.assert_close(out, x @ (stored * pattern.mask(stored.abs())).T + layer.module.bias)
    torch.testing.assert_close(x.grad, upstream @ (stored * BDWP.backward_mask(stored, pattern)))
    torch.testing.assert_close(layer.gradient, upstream.T @ x.detach())


def test_given_masks_are_used_and_checked(tmp_path: Path) -> None:
    task = Task(parse_config(TrainingRecipe, {"sparsity": 0.7, "allocation": "global"}))
    task.run(0, 1)
    task.sparse.write(tmp_path)
    other = Task(parse_config(TrainingRecipe, {"masks": str(tmp_path)}), seed=3)
    other.run()
    assert all(torch.equal(mask, task.sparse.masks[name]) for name, mask in other.sparse.masks.items())
    net = nn.Sequential(nn.Linear(16, 30))
    with pytest.raises(ConfigError, match=r"the mask of layer 0 .* is \(32, 16\), the weight is \(30, 16\)"):
        SparseTraining(targets_of_model(net), other.sparse.recipe, torch.optim.SGD(net.parameters()), 5)


def test_a_pattern_must_divide_each_layer() -> None:
    net = nn.Sequential(nn.Linear(16, 30), nn.Linear(30, 16))
    optimizer = torch.optim.SGD(net.parameters())
    recipe = {"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "bdwp"}}
    with pytest.raises(ConfigError, match="does not divide layer 1, which has 30 inputs"):
        SparseTraining(targets_of_model(net, exclude=["0"]), parse_config(TrainingRecipe, recipe), optimizer, 5)
    with pytest.raises(ConfigError, match="does not divide the 30 outputs of layer 0"):
        SparseTraining(targets_of_model(net, include=["0"]), parse_config(TrainingRecipe, recipe), optimizer, 5)
    with pytest.raises(ConfigError, match="no layer is called 'mlp"):
        targets_of_model(net, include=["mlp.*"])
