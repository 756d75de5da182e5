"""The finite state machine: every text can be read back to the walk it was written from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.training.code_metrics import js_divergence, match_codes, precision_at_recall, precision_recall
from saelab.training.tokfsm import TokFSMConfig, make_tokfsm

SMALL = {"states": 25, "edges": 4, "base": 5, "digits": 2, "length": 32}


def machine(**changes):
    return make_tokfsm(parse_config(TokFSMConfig, {**SMALL, **changes}))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(
    states=st.integers(2, 30),
    edges=st.integers(1, 30),
    base=st.integers(2, 6),
    length=st.integers(2, 40),
    seed=st.integers(0, 50),
)
def test_texts_are_legal_walks(states, edges, base, length, seed):
    digits = next(d for d in range(1, 6) if base**d >= states)
    fsm = machine(states=states, edges=min(edges, states), base=base, digits=digits, length=length, seed=seed)
    walk = fsm.walk(7, generator(seed))
    tokens = fsm.write(walk)
    assert tokens.shape == (7, 1 + length)
    assert (tokens[:, 0] == fsm.bos).all()
    assert tokens[:, 1:].max() < fsm.bos < fsm.d_vocab
    read = fsm.read(tokens)
    assert torch.equal(read, walk[:, : length // digits])
    assert fsm.legal(read).all()
    if read.shape[1] > 1:
        assert fsm.accuracy(tokens) == 1


def test_edges_are_distinct_and_equally_likely():
    fsm = machine()
    assert torch.equal(fsm.transitions().sum(1), torch.ones(25))
    assert ((fsm.transitions() > 0).sum(1) == 4).all()
    walk = fsm.walk(20000, generator())
    from_zero = walk[:, 1][walk[:, 0] == 0]
    counts = torch.bincount(from_zero, minlength=25)[fsm.targets[0]]
    assert counts.sum() == len(from_zero)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.06
    assert not torch.equal(machine(seed=1).targets, fsm.targets)
    assert torch.equal(machine().targets, fsm.targets)


def test_accuracy_counts_what_was_written_after_the_prompt():
    fsm = machine(length=6)
    a, b = 0, int(fsm.targets[0, 0])
    wrong = next(s for s in range(25) if s not in fsm.targets[b])
    tokens = fsm.write(torch.tensor([[a, b, wrong]]))
    assert fsm.accuracy(tokens) == 0.5
    assert fsm.accuracy(tokens, prompt=3) == 0.5  # state a was given; both transitions were written
    assert fsm.accuracy(tokens, prompt=5) == 0
    assert fsm.accuracy(torch.randint(5, (4000, 7), generator=generator())) == pytest.approx(4 / 25, abs=0.02)
    with pytest.raises(ConfigError, match="no whole transition"):
        fsm.accuracy(tokens[:, :4])


def test_digits_that_name_no_state():
    fsm = machine(states=20)
    tokens = torch.tensor([[fsm.bos, 4, 4, 0, fsm.bos]])
    assert fsm.read(tokens).tolist() == [[-1, -1]]
    assert not fsm.legal(fsm.read(tokens)).any()


def test_settings():
    with pytest.raises(ConfigError, match="25 states need more than 1 digits of base 5"):
        machine(digits=1)
    with pytest.raises(ConfigError, match="edges = 30"):
        machine(edges=30)


def test_precision_and_recall_by_hand():
    on = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool)
    has = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    precision, recall = precision_recall(on, has)
    torch.testing.assert_close(precision, torch.tensor([[1, 0.5, 0.75], [0, 1, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(recall, torch.tensor([[2 / 3, 1 / 3, 1], [0, 1, 1]], dtype=torch.float64))


def test_codes_are_found_on_one_half_and_judged_on_the_other():
    """Planted: code i is property i; among many random codes the finder's choice is not flattered."""
    g = generator()
    has = torch.rand(4000, 3, generator=g) < 0.2
    noise = torch.rand(4000, 50, generator=g) < 0.02
    found = match_codes(torch.cat([has, noise], 1), has)
    assert found.code.tolist() == [0, 1, 2]
    assert found.precision.tolist() == [1, 1, 1]
    null = match_codes(noise, has)
    assert float(null.precision.mean()) == pytest.approx(0.2, abs=0.08)
    assert match_codes(noise, has, least_recall=0.5).code.tolist() == [-1, -1, -1]
    assert list(found.to_frame().columns) == ["code", "precision", "recall"]


def test_neurons_are_thresholded_at_the_recall_of_a_code():
    values = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.9], [0.1, 0.8]])
    has = torch.tensor([True, True, False, False])
    assert precision_at_recall(values, has, 0.5).tolist() == [1.0, pytest.approx(1 / 3)]
    assert precision_at_recall(values, has, 1.0).tolist() == [1.0, 0.5]
    assert precision_at_recall(values, ~has, 0.01).tolist() == [pytest.approx(1 / 3), 1.0]
    assert precision_at_recall(values, torch.zeros(4, dtype=torch.bool), 0.5).isnan().all()


def test_js_divergence_by_hand():
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    by_hand = (torch.tensor(4 / 3).log() + 0.5 * torch.tensor(2 / 3).log() + 0.5 * torch.tensor(2.0).log()) / 2
    torch.testing.assert_close(js_divergence(p, q), torch.stack([torch.tensor(2.0).log(), torch.tensor(0.0), by_hand]))
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
