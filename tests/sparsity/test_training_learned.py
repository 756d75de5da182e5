"""Regularised training, learned masks, and sparse fine-tuning: each method's own stated property."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sparsity.pattern import Unstructured
from saelab.sparsity.training import TrainingRecipe
from saelab.sparsity.training.gradients import View
from saelab.sparsity.training.groups import envelope, envelope_factors, marked_lasso_factors
from saelab.sparsity.training.learned import AutoSparse, LearnedScores
from saelab.sparsity.training.penalties import largest_saliency, lobster_decay
from tests.sparsity.test_training_engine import STEPS, Task


def slow_factors(norms: np.ndarray, weights: np.ndarray, k: int, strength: float) -> np.ndarray:
    """The prox's factors by a general solver over the group variables u."""
    offset = strength * weights**2
    solved = minimize(
        lambda u: 0.5 * np.sum(offset * norms**2 / (u + offset)),
        np.full(len(norms), k / len(norms)),
        jac=lambda u: -0.5 * offset * norms**2 / (u + offset) ** 2,
        bounds=[(0, 1)] * len(norms),
        constraints=[{"type": "ineq", "fun": lambda u: k - u.sum(), "jac": lambda u: -np.ones(len(u))}],
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-15},
    )
    return solved.x / (solved.x + offset)


@pytest.mark.parametrize("seed", range(40))
def test_wgsef_prox_equals_a_slow_solver_and_is_a_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 9))
    k, strength = int(rng.integers(1, m + 1)), float(10 ** rng.uniform(-2, 1))
    norms, weights = np.abs(rng.normal(size=m)), rng.uniform(0.3, 2, size=m)
    found = envelope_factors(torch.tensor(norms), k, strength, torch.tensor(weights)).numpy()
    np.testing.assert_allclose(found, slow_factors(norms, weights, k, strength), atol=2e-6)

    def objective(factors: np.ndarray) -> float:
        left = torch.tensor(norms * factors)
        return float(0.5 * np.sum((norms - norms * factors) ** 2)) + strength * envelope(left, k, torch.tensor(weights))

    best = objective(found)
    assert all(best <= objective(np.abs(found + rng.normal(size=m) * 0.05)) + 1e-9 for _ in range(20))


def test_envelope_is_the_ridge_below_k_groups_and_the_k_support_norm_above() -> None:
    few = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    assert envelope(few, 2) == pytest.approx(12.5)
    assert envelope(few, 4) == pytest.approx(12.5)
    assert envelope(few, 1) == pytest.approx(0.5 * 7**2)  # k = 1: half the squared l1 norm
    equal = torch.ones(4, dtype=torch.float64)
    assert envelope(equal, 2) == pytest.approx(0.5 * 4**2 / 2)


@pytest.mark.parametrize("seed", range(10))
def test_wgsef_prox_leaves_k_groups_or_one_more_as_its_strength_grows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    norms = torch.tensor(np.abs(rng.normal(size=30)))
    for k in (1, 7, 29):
        left = envelope_factors(norms, k, 1e5) > 0
        assert k <= int(left.sum()) <= k + 1
        assert set(norms.topk(k).indices.tolist()) <= set(left.nonzero()[:, 0].tolist())


def test_wgsef_takes_neurons_away_in_training_and_the_mask_makes_it_k() -> None:
    recipe = parse_config(
        TrainingRecipe,
        {
            "pattern": "neuron",
            "sparsity": 0.5,
            "schedule": {"name": "once", "at": 0.75},
            "penalty": {"name": "wgsef", "strength": 20.0},
        },
    )
    left: list[int] = []
    task = Task(recipe)
    task.run(look=lambda task, step: left.append(sum(int(t.weight.any(dim=1).sum()) for t in task.sparse.targets)))
    every = sum(t.shape[0] for t in task.sparse.targets)
    assert left[0] == every > left[STEPS // 2] > every // 2
    assert set(left[round(0.75 * STEPS) :]) == {every // 2}


def test_marked_lasso_leaves_unmarked_groups_alone() -> None:
    norms, marked = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([True, False, True])
    assert marked_lasso_factors(norms, marked, 0.25).tolist() == [0.75, 1.0, 0.0]


def test_lobster_spares_what_the_loss_is_sensitive_to() -> None:
    weight, sensitivity = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0.0, 0.5, 3.0])
    assert lobster_decay(weight, sensitivity, 0.1).tolist() == pytest.approx([1.8, 1.9, 2.0])


def test_gsm_lets_exactly_q_gradients_through() -> None:
    recipe = parse_config(
        TrainingRecipe,
        {
            "sparsity": 0.9,
            "allocation": "global",
            "schedule": {"name": "once", "at": 0.99},
            "penalty": {"name": "gsm"},
        },
    )
    counted: list[int] = []

    def look(task: Task, step: int) -> None:
        counted.append(sum(int(t.gradient.count_nonzero()) for t in task.sparse.targets if t.gradient is not None))

    task = Task(recipe)
    task.run(0, 5, look)
    size = sum(t.weight.numel() for t in task.sparse.targets)
    assert counted == [size - round(0.9 * size)] * 5
    ties = largest_saliency([torch.ones(3), torch.ones(2, 2)], 4)
    assert [m.tolist() for m in ties] == [[True] * 3, [[True, False], [False, False]]]


def test_autosparse_threshold_gradient_is_that_of_the_loss() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64)
    s = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 7, dtype=torch.float64)
    (weight.sign() * (weight.abs() - s.sigmoid()).clamp_min(0) * direction).sum().backward()
    method = AutoSparse(lr=1.0, decay=0.0, alpha=0.5)
    view = View(weight, weight.abs() > s.detach().sigmoid(), None, 0.0, {"s": s.detach().clone()})
    given = method.backward(direction, view)
    assert s.grad is not None
    assert float(view.memory["s"]) == pytest.approx(-1.0 - float(s.grad))
    assert torch.equal(given, torch.where(view.mask, direction, 0.5 * direction))


def test_pst_scores_follow_the_straight_through_gradient() -> None:
    torch.manual_seed(0)
    method = LearnedScores(rank=3, lr=1.0)
    weight = torch.randn(6, 8, dtype=torch.float64)
    view = View(weight, torch.ones(6, 8, dtype=torch.bool), Unstructured(0.5, per_row=True), 0.0)
    view.mask = method.own_mask(view)
    parts = {name: value.clone().requires_grad_() for name, value in view.memory.items()}
    direction = torch.randn(6, 8, dtype=torch.float64)
    score = weight.abs() + parts["A"] @ parts["B"] + parts["r"][:, None] + parts["c"]
    (score * direction * weight).sum().backward()  # dL/dS = dL/dW_eff * W
    before = {name: value.clone() for name, value in view.memory.items()}
    method.backward(direction, view)
    for name, part in parts.items():
        assert part.grad is not None
        torch.testing.assert_close(view.memory[name], before[name] - part.grad)


def test_dress_masks_are_nested_and_magnitude_pruning_finds_them_again() -> None:
    recipe = parse_config(
        TrainingRecipe,
        {"pattern": "row", "sparsity": 0.25, "gradient": {"name": "dress", "sparsities": [0.5, 0.75]}},
    )
    task = Task(recipe)
    masks: list[dict[str, torch.Tensor]] = []
    task.run(0, 3, lambda task, step: masks.append(dict(task.sparse.masks)))
    for target in task.sparse.targets:
        dense, middle, sparse = (m[target.name] for m in masks)
        assert int(dense.sum()) > int(middle.sum()) > int(sparse.sum())
    task.run(3)
    task.sparse.finish()
    for target in task.sparse.targets:
        for sparsity in (0.5, 0.75):
            nested = Unstructured(sparsity, per_row=True).mask(target.weight.abs())
            assert not bool((nested & ~task.sparse.masks[target.name]).any())


def test_spdf_is_sparse_then_dense() -> None:
    recipe = parse_config(
        TrainingRecipe, {"score": "random", "sparsity": 0.8, "schedule": {"name": "release", "until": 0.5}}
    )
    task = Task(recipe)
    zeros: list[float] = []
    task.run(look=lambda task, step: zeros.append(task.sparse.report().sparsity))
    assert all(z == pytest.approx(0.8, abs=0.01) for z in zeros[: STEPS // 2])
    assert zeros[-1] == 0.0


@pytest.mark.parametrize("gradient", [{"name": "fish", "share": 0.1, "batches": 4}, {"name": "sora", "rank": 4}])
def test_fine_tuning_changes_only_what_it_says(gradient: dict[str, Any], tmp_path: Path) -> None:
    task = Task(parse_config(TrainingRecipe, {"gradient": gradient}))
    before = {name: p.detach().clone() for name, p in task.net.named_parameters()}
    loss = float(task.loss(0).detach())
    task.run()
    task.sparse.finish()
    assert float(task.loss(0).detach()) < loss
    for name, parameter in task.net.named_parameters():
        change = parameter.detach() - before[name]
        if name.endswith("bias"):
            assert not bool(change.any())
        elif gradient["name"] == "fish":
            assert 0 < int(change.count_nonzero()) <= round(0.1 * change.numel())
        else:
            assert 1 <= int(torch.linalg.matrix_rank(change, atol=1e-5)) <= 4
    facts = task.sparse.write(tmp_path) and task.sparse.report().facts
    assert 0.05 < facts["trained"] <= 0.11 if gradient["name"] == "fish" else 1 <= facts["rank"] <= 4


def test_sora_penalty_lowers_the_rank() -> None:
    ranks = []
    for penalty in (0.0, 20.0):
        task = Task(parse_config(TrainingRecipe, {"gradient": {"name": "sora", "rank": 8, "penalty": penalty}}))
        task.run()
        task.sparse.finish()
        ranks.append(task.sparse.report().facts["rank"])
    assert ranks[0] == 8 > ranks[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.5, "penalty": {"name": "wgsef"}}, "pattern neuron"),
        ({"pattern": "neuron", "sparsity": 0.5, "penalty": {"name": "gsm"}}, "pattern layer or row"),
        ({"sparsity": 0.5, "gradient": {"name": "sora"}}, "leave out pattern, sparsity and schedule"),
        ({"sparsity": 0.5, "gradient": {"name": "dress"}}, "use pattern row"),
        ({"pattern": "neuron", "sparsity": 0.5, "allocation": "erk"}, "use pattern layer"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config(TrainingRecipe, settings)
    assert "\n" not in str(caught.value)
