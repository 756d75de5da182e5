import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.core.errors import ConfigError
from saelab.sparsity.methods import DSnoT, Magnitude, NetTrim, SparseGPT, SpQR, Wanda
from saelab.sparsity.methods.dsnot import expected_error
from saelab.sparsity.methods.net_trim import net_trim
from saelab.sparsity.methods.spqr import QuantisedLayer, pack_bits, unpack_bits
from saelab.sparsity.pattern import NofM, Unstructured
from saelab.sparsity.statistics import InputStatistics

HALF = Unstructured(0.5, per_row=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed=0, rows=12, columns=32, n=400):
    """A layer whose inputs differ in size, mean and correlation."""
    g = generator(seed)
    weight = torch.randn(rows, columns, generator=g)
    mixing = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    x = torch.randn(n, columns, generator=g) @ mixing * torch.rand(columns, generator=g).add(0.1) + torch.randn(
        columns, generator=g
    )
    return weight, x


def statistics(x, need="inputs"):
    found = InputStatistics(x.shape[1], need)
    for part in x.split(150):
        found.update(part)
    return found


def distance(weight, new, x):
    return float((x @ (weight - new).T).square().mean())


def test_statistics_are_those_of_the_inputs():
    _, x = problem()
    found = statistics(x)
    assert torch.allclose(found.mean, x.double().mean(0), atol=1e-6)
    assert torch.allclose(found.variance, x.double().var(0, unbiased=False), atol=1e-5)
    assert torch.allclose(found.norm, x.double().norm(dim=0), rtol=1e-6)
    assert torch.allclose(found.gram, x.double().T @ x.double(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found.inputs, x)


def test_wanda_is_magnitude_when_inputs_are_alike_and_differs_when_not():
    weight, x = problem()
    alike = x / x.norm(dim=0)
    wanda = Wanda().prune(weight, statistics(alike), HALF, generator())
    magnitude = Magnitude().prune(weight, None, HALF, generator())
    assert torch.equal(wanda.mask, magnitude.mask)
    real = Wanda().prune(weight, statistics(x), HALF, generator())
    assert not torch.equal(real.mask, magnitude.mask)
    assert distance(weight, real.weight, x) < distance(weight, magnitude.weight, x)


def squared_error(weight, mask, x):
    """Mean squared error of each row's output."""
    return (x.double() @ (weight.double() * ~mask).T).square().mean(0)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, True), NofM(2, 4)])
@pytest.mark.parametrize("start", ["wanda", "magnitude"])
def test_dsnot_keeps_counts_and_never_lets_the_error_grow(pattern, start):
    gain, outputs = [], []
    for seed in range(5):
        weight, x = problem(seed)
        inputs = statistics(x)
        first = (Wanda() if start == "wanda" else Magnitude()).prune(weight, inputs, pattern, generator())
        after = DSnoT(start=start, tolerance=0.0).prune(weight, inputs, pattern, generator())
        assert torch.equal(first.mask.sum(1), after.mask.sum(1))
        if isinstance(pattern, NofM):
            assert (after.mask.view(len(weight), -1, 4).sum(2) == 2).all()
        before, now = (expected_error(weight, mask, inputs).abs() for mask in (first.mask, after.mask))
        assert (now <= before + 1e-12).all()
        assert after.facts["trades"] > 0
        worse = [squared_error(weight, mask, x) for mask in (after.mask, first.mask)]
        assert (worse[0] <= worse[1] * (1 + 1e-6)).all()  # x^T x was summed in float32
        gain.append(1 - float(now.sum() / before.sum()))
        outputs.append(distance(weight, after.weight, x) / distance(weight, first.weight, x))
    assert sum(gain) / len(gain) > 0.1  # and it does something
    assert sum(outputs) / len(outputs) < 1


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.5, False), NofM(2, 4), Unstructured(0.37, False)])
def test_sparsegpt_makes_up_for_what_goes(pattern):
    weight, x = problem()
    inputs = statistics(x)
    pruned = SparseGPT(block=8).prune(weight, inputs, pattern, generator())
    plain = Wanda().prune(weight, inputs, pattern, generator())
    assert int((~pruned.mask).sum()) == int((~plain.mask).sum())
    assert (pruned.weight[~pruned.mask] == 0).all()
    if isinstance(pattern, NofM):
        assert (pruned.mask.view(len(weight), -1, 4).sum(2) == 2).all()
    assert distance(weight, pruned.weight, x) < 0.8 * distance(weight, plain.weight, x)


def test_sparsegpt_is_the_least_squares_solution_when_one_column_goes():
    weight, x = problem(rows=3, columns=6)
    pruned = SparseGPT(block=6, damping=1e-9).prune(weight, statistics(x), Unstructured(1 / 6, True), generator())
    for row in range(3):
        kept = pruned.mask[row]
        first_gone = int((~kept).nonzero()[0])
        # Columns to the left of the one that went cannot make up for it; those to the right do so exactly.
        free = torch.arange(6) > first_gone
        target = x.double() @ weight[row].double() - x[:, ~free & kept].double() @ weight[row][~free & kept].double()
        best = torch.linalg.lstsq(x[:, free].double(), target[:, None]).solution[:, 0]
        assert torch.allclose(pruned.weight[row][free].double(), best, atol=1e-3)


@pytest.mark.parametrize("relu", [False, True])
def test_net_trim_recovers_a_planted_support(relu):
    g = generator(3)
    d, out, n, s = 40, 6, 400, 5
    x = torch.randn(n, d, generator=g)
    u = torch.zeros(d, out)
    for k in range(out):
        where = torch.randperm(d, generator=g)[:s]
        u[where, k] = torch.randn(s, generator=g).sign() * (0.5 + torch.rand(s, generator=g))
    # Dense weights with nearly the same outputs: noise too small to matter.
    dense = u + 0.003 * torch.randn(d, out, generator=g)
    found = net_trim(x, x @ dense, 0.02 if not relu else 0.03, relu=relu, iterations=600)
    for k in range(out):
        assert set((found[:, k].abs() > 0.05).nonzero()[:, 0].tolist()) == set(u[:, k].nonzero()[:, 0].tolist())


def test_net_trim_keeps_outputs_within_epsilon():
    weight, x = problem()
    y = x @ weight.T
    for epsilon in (0.05, 0.2):
        pruned = NetTrim(epsilon=epsilon, iterations=800).prune(weight, statistics(x), None, generator())
        relative = ((x @ pruned.weight.T - y).norm(dim=0) / y.norm(dim=0)).max()
        assert relative < epsilon * 1.1
        assert pruned.facts["nonzeros"] < weight.numel()


def test_spqr_is_within_its_bound_and_says_its_true_bits():
    weight, x = problem(rows=32, columns=64)
    inputs = statistics(x)
    method = SpQR(bits=8, second_bits=8, outliers=0.02)
    layer = method.prune(weight, inputs, None, generator())
    assert distance(weight, layer.weight, x) < 1e-3 * float((x @ weight.T).square().mean())
    kept = {name: t for name, t in layer.tensors.items() if name.startswith("outlier")}
    assert len(kept["outlier_values"]) == round(0.02 * weight.numel())
    # codes, and per group of 16 inputs and 16 rows a scale and a zero of 8 bits for each row plus 2 x 16 bits twice
    rows, columns = weight.shape
    groups = columns // 16
    bits = rows * columns * 8 + 2 * (rows * groups * 8 + groups * (rows // 16) * 32)
    bits += len(kept["outlier_values"]) * 32 + 32 * (rows + 1)
    assert layer.facts["bits_per_weight"] == pytest.approx(bits / weight.numel())


@pytest.mark.parametrize("dropped", [0.0, 0.5])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_spqr_round_trips_within_its_bound(bits, dropped):
    """With uncorrelated inputs nothing is made up for: each weight is within half a step of what its group can say."""
    weight, _ = problem(rows=24, columns=48)
    x = torch.eye(48).repeat(4, 1)  # X^T X is diagonal
    method = SpQR(bits=bits, second_bits=3, outliers=0.05, dropped=dropped)
    found = method.prune(weight, statistics(x), None, generator())
    layer = QuantisedLayer.from_tensors(found.tensors)
    assert torch.equal(layer.dequantised(), found.weight)  # stored and read back, bit for bit
    step = layer.scales.values().T.repeat_interleave(16, 1)
    zero = layer.zeros.values().T.repeat_interleave(16, 1)
    low, high = -zero * step, (2**bits - 1 - zero) * step
    outside = (low - weight).clamp_min(0) + (weight - high).clamp_min(0)  # what the second level's rounding costs
    plain = found.mask & ~layer.loud
    error = (weight - found.weight).abs()
    assert (error <= step.abs() / 2 + outside + 1e-6)[plain].all()
    assert (error <= weight.abs() * 2**-10)[layer.loud].all()  # 16 bits
    assert (found.weight[~found.mask] == 0).all()
    stored = 8 * sum(t.numel() * t.element_size() for name, t in found.tensors.items() if name != "layout")
    assert stored / weight.numel() <= found.facts["bits_per_weight"] + 0.1


@given(st.integers(1, 8), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_bits_are_packed_and_unpacked(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator(seed), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, (rows, columns)), codes)


def test_more_bits_and_outliers_are_better_and_dropped_groups_are_zero():
    weight, x = problem(rows=16, columns=64)
    inputs = statistics(x)
    lossy, finer, careful = (
        distance(weight, SpQR(**options).prune(weight, inputs, None, generator()).weight, x)
        for options in ({"bits": 2, "outliers": 0}, {"bits": 4, "outliers": 0}, {"bits": 2, "outliers": 0.1})
    )
    assert finer < lossy
    assert careful < lossy
    dropped = SpQR(bits=8, second_bits=8, outliers=0, dropped=0.5).prune(weight, inputs, None, generator())
    groups = dropped.mask.view(16, 4, 16)
    assert (groups.all(2) | ~groups.any(2)).all()
    assert int(groups.any(2).sum()) == 32
    assert (dropped.weight[~dropped.mask] == 0).all()


def test_a_group_that_does_not_divide_is_refused():
    weight, x = problem(columns=24)
    with pytest.raises(ConfigError, match="groups of 16 do not divide a layer of 24 inputs"):
        SpQR().prune(weight, statistics(x), None, generator())


def test_net_trim_with_rotated_tokens_is_that_with_all():
    weight, x = problem(n=300)
    whole = net_trim(x, x @ weight.T, 0.2, iterations=100).T
    assert torch.allclose(
        NetTrim(epsilon=0.2, iterations=100).prune(weight, statistics(x), None, generator()).weight, whole, atol=1e-3
    )
