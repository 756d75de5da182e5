"""The axes of sparse training: scores, schedules, gradients, drop and grow, as pure functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sparsity.allocation import erk
from saelab.sparsity.pattern import NofM, Unstructured
from saelab.sparsity.training import TrainingRecipe
from saelab.sparsity.training.gradients import BDWP, SRSTE, STE, Decayed, SoftThreshold, View, soft_threshold
from saelab.sparsity.training.grow import drop_and_grow, explore_score, shared_growth
from saelab.sparsity.training.schedules import Cubic, DecayPattern, DropAndGrow


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def view(weight: torch.Tensor, pattern: NofM | Unstructured, progress: float = 0.5) -> View:
    return View(weight, pattern.mask(weight.abs()), pattern, progress)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=8),
    st.floats(0, 0.98),
)
def test_the_erk_budget_is_exact(shapes: list[tuple[int, int]], sparsity: float) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    total = sum(r * c for r, c in shapes)
    kept = sum(int(Unstructured(s, False).mask(torch.rand(named[n])).sum()) for n, s in erk(named, sparsity).items())
    assert kept == round((1 - sparsity) * total)


def test_erk_caps_a_layer_and_the_others_take_its_surplus() -> None:
    shares = erk({"small": (4, 4), "large": (100, 100)}, 0.5)
    assert shares["small"] == 0
    assert shares["large"] == pytest.approx(1 - (5008 - 16) / 10000)


@settings(deadline=None)
@given(st.floats(0.01, 0.98), st.integers(1, 9), st.integers(30, 400), st.floats(0, 0.5))
def test_the_gradual_schedule_rises_to_its_target(target: float, every: int, steps: int, initial: float) -> None:
    schedule = Cubic(initial=min(initial, target), start=0.25, stop=0.75, every=every)
    due = [t for t in range(steps) if schedule.due(t, steps)]
    path = [schedule.sparsity(t, steps, target) for t in due]
    assert due[0] == int(0.25 * steps)
    assert due[-1] == int(0.75 * steps)
    assert path == sorted(path)
    assert path[0] == pytest.approx(min(initial, target))
    assert path[-1] == target
    # Zhu & Gupta's equation 1, in the middle of the window
    t0, t1 = due[0], due[-1]
    for t in due:
        wanted = target + (min(initial, target) - target) * (1 - (t - t0) / (t1 - t0)) ** 3
        assert schedule.sparsity(t, steps, target) == pytest.approx(wanted)


def test_a_gradual_schedule_to_the_very_end_still_hits_its_target() -> None:
    schedule = Cubic(start=0.0, stop=1.0, every=7)
    assert schedule.due(99, 100)
    assert schedule.sparsity(99, 100, 0.8) == 0.8


def test_the_pattern_decays_one_by_one() -> None:
    schedule = DecayPattern(start=0.1, stop=0.7)
    found = [schedule.pattern(t, 100, NofM(1, 4)) for t in range(100)]
    assert found[:10] == [None] * 10
    assert list(dict.fromkeys(found)) == [None, NofM(3, 4), NofM(2, 4), NofM(1, 4)]
    assert found.index(NofM(1, 4)) == 70
    assert DecayPattern(start=0.1, stop=0.7).pattern(69, 100, NofM(3, 4)) == NofM(3, 4)


def test_sr_ste_decays_masked_weights_only() -> None:
    at = view(weights(6, 8), NofM(2, 4))
    gradient = weights(6, 8, 1)
    found = SRSTE(decay=0.01).backward(gradient, at)
    assert torch.equal(found[at.mask], gradient[at.mask])
    torch.testing.assert_close(found[~at.mask], gradient[~at.mask] + 0.01 * at.weight[~at.mask])
    assert torch.equal(STE().backward(gradient, at), gradient)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_s_ste_is_continuous(seed: int) -> None:
    """Along a line through weight space S(W) is Lipschitz, whatever ties and changes of the mask lie on it."""
    start, stop = weights(4, 8, seed), weights(4, 8, seed + 1)
    pattern = NofM(2, 4)

    def at(position: float) -> torch.Tensor:
        weight = start + position * (stop - start)
        return soft_threshold(weight, pattern.mask(weight.abs()), pattern)

    points = torch.linspace(0, 1, 301).tolist()
    path = torch.stack([at(p) for p in points])
    step = float((stop - start).abs().max()) / 300
    assert float((path[1:] - path[:-1]).abs().max()) <= 2 * step + 1e-6


def test_the_hard_threshold_jumps_where_the_soft_one_does_not() -> None:
    pattern = NofM(2, 4)
    below, above = torch.tensor([[1.0, 0.5, 0.499, 0.1]]), torch.tensor([[1.0, 0.499, 0.5, 0.1]])
    hard = [w * pattern.mask(w.abs()) for w in (below, above)]
    soft = [soft_threshold(w, pattern.mask(w.abs()), pattern) for w in (below, above)]
    assert float((hard[0] - hard[1]).abs().max()) > 0.4
    assert float((soft[0] - soft[1]).abs().max()) < 0.0021
    tie = torch.tensor([[1.0, 0.5, -0.5, 0.1]])
    assert torch.equal(soft_threshold(tie, pattern.mask(tie.abs()), pattern), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))


def test_s_ste_by_hand_and_its_scale_is_fixed() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    at = view(weight, NofM(2, 4))
    shrunk = torch.tensor([[2.0, -1.0, 0.0, 0.0]])
    beta = (8 + 3) / 5
    torch.testing.assert_close(SoftThreshold().forward(at), beta * shrunk)
    later = View(2 * weight, at.mask, at.pattern, 0.7, at.memory)
    torch.testing.assert_close(SoftThreshold().forward(later), beta * 2 * shrunk)


def test_mdgf_goes_from_dense_to_masked_by_the_chain_rule() -> None:
    weight, pattern = weights(4, 8), NofM(2, 4)
    way = Decayed(start=0.0, stop=0.8)
    assert torch.equal(way.forward(view(weight, pattern, 0.0)), weight)
    end = view(weight, pattern, 0.8)
    assert torch.equal(way.forward(end), weight * end.mask)
    middle = view(weight, pattern, 0.4)
    trained = weight.clone().requires_grad_()
    (trained * (middle.mask + 0.5 * ~middle.mask)).square().sum().backward()
    assert trained.grad is not None
    seen = way.forward(middle)
    torch.testing.assert_close(way.backward(2 * seen, middle), trained.grad)
    factors = [Decayed(shape="exponential", stop=0.8).factor(p) for p in (0.0, 0.2, 0.4, 0.8, 1.0)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[-1]) == (1.0, 0.0)


def test_bdwp_has_two_masks_each_n_of_m_along_its_own_axis() -> None:
    weight, pattern = weights(8, 12), NofM(1, 4)
    forward, backward = pattern.mask(weight.abs()), BDWP.backward_mask(weight, pattern)
    assert bool((forward.view(8, 3, 4).sum(2) == 1).all())
    assert bool((backward.view(2, 4, 12).sum(1) == 1).all())
    assert not torch.equal(forward, backward)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 1000))
def test_drop_and_grow_keeps_counts_and_takes_the_right_ones(drop: int, groups: int, seed: int) -> None:
    weight, score = weights(groups, 40, seed), weights(groups, 40, seed + 1).abs()
    mask = Unstructured(0.75, per_row=True).mask(weights(groups, 40, seed + 2))
    found = drop_and_grow(weight * mask, score, mask, drop, drop)
    assert torch.equal(found.sum(1), mask.sum(1))
    for row in range(groups):
        kept = mask[row].nonzero().squeeze(1)
        smallest = kept[weight[row, kept].abs().argsort()[:drop]]
        left = mask[row].clone()
        left[smallest] = False
        outside = (~left).nonzero().squeeze(1)
        grown = outside[score[row, outside].argsort(descending=True)[:drop]]
        left[grown] = True
        assert torch.equal(found[row], left)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50)), min_size=1, max_size=6), st.integers(0, 200))
def test_shared_growth_is_exact_and_within_room(layers: list[tuple[float, int]], total: int) -> None:
    momentum = {str(i): m for i, (m, _) in enumerate(layers)}
    room = {str(i): r for i, (_, r) in enumerate(layers)}
    grown = shared_growth(momentum, room, total)
    assert all(0 <= grown[n] <= room[n] for n in room)
    assert sum(grown.values()) == min(total, sum(room.values()))


def test_shared_growth_goes_by_momentum() -> None:
    assert shared_growth({"a": 3.0, "b": 1.0}, {"a": 100, "b": 100}, 40) == {"a": 30, "b": 10}
    assert shared_growth({"a": 3.0, "b": 1.0}, {"a": 10, "b": 100}, 40) == {"a": 10, "b": 30}


def test_exploration_prefers_what_was_not_tried() -> None:
    gradient = torch.tensor([[1.0, 1.0]])
    score = explore_score(gradient, torch.tensor([[0.0, 3.0]]), 100, 0.5)
    torch.testing.assert_close(score, 1 + 0.5 * torch.log(torch.tensor(100.0)) / torch.tensor([[1.0, 4.0]]))


def test_the_dropped_share_follows_a_cosine() -> None:
    schedule = DropAndGrow(fraction=0.4, every=10, stop=0.5)
    assert [t for t in range(100) if schedule.swaps(t, 100)] == [10, 20, 30, 40]
    assert schedule.dropped(0, 100) == pytest.approx(0.4)
    assert schedule.dropped(25, 100) == pytest.approx(0.2)
    assert schedule.dropped(50, 100) == pytest.approx(0.0)
    assert DropAndGrow(fraction=0.4, anneal="constant").dropped(40, 100) == 0.4


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({}, "needs a sparsity"),
        ({"sparsity": 0.5, "schedul": {}}, "unknown key 'schedul'"),
        ({"sparsity": 0.5, "schedule": {"name": "cubic", "evry": 3}}, "unknown key 'schedule.evry'"),
        ({"sparsity": 0.5, "schedule": {"name": "cubic", "start": 0.8, "stop": 0.2}}, "not before stop"),
        ({"pattern": "2:4", "schedule": {"name": "refresh"}}, "gradient other than none"),
        ({"pattern": "2:4", "allocation": "erk"}, "leave allocation out"),
        ({"pattern": "2:4", "schedule": {"name": "cubic"}}, "decay-pattern"),
        ({"pattern": "4:2"}, "keeps 4 of 2"),
        ({"sparsity": 0.5, "schedule": {"name": "drop-and-grow"}, "gradient": {"name": "ste"}}, "gradient none"),
        ({"sparsity": 0.5, "gradient": {"name": "bdwp"}, "schedule": {"name": "refresh"}}, "pattern such as 2:4"),
        ({"sparsity": 0.5, "gradient": {"name": "soft"}}, "schedule refresh"),
        ({"masks": "x", "sparsity": 0.5}, "leave out pattern and sparsity"),
        ({"sparsity": 0.5, "pattern": "row", "allocation": "global"}, "pattern layer"),
        ({"sparsity": 0.5, "schedule": {"name": "drop-and-grow", "share": True}}, "grow momentum"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_line(recipe: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(TrainingRecipe, recipe)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
