import pytest
import torch

from saelab.core.errors import ActivationError, ConfigError, ResumeError
from saelab.training.pairs import PairedBatches


def source(n=10, batch_size=6, context=False, **settings):
    plus = torch.arange(n)[:, None] * torch.ones(1, 3)
    return PairedBatches(plus, -plus, batch_size, context=plus[:, :2] * 10 if context else None, **settings)


def test_rows_2i_and_2i_plus_1_are_a_pair():
    batch = next(iter(source(context=True)))
    assert batch.x.shape == (6, 5)
    for i in range(3):
        plus, minus = batch.x[2 * i], batch.x[2 * i + 1]
        assert torch.equal(plus[:2], minus[:2])  # the context is theirs in common
        assert torch.equal(plus[2:], -minus[2:])
        assert torch.equal(plus[:2], plus[2:4] * 10)


def test_every_pair_comes_once_an_epoch_in_another_order():
    it = iter(source(n=9))
    epochs = [torch.cat([next(it).x[::2, 0] for _ in range(3)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(9))
    assert epochs[0] != epochs[1]


def test_resume_is_exact():
    a = source()
    it = iter(a)
    for _ in range(5):
        next(it)
    state = a.state_dict()
    b = source()
    b.load_state_dict(state)
    for x, y in zip((next(it) for _ in range(4)), b, strict=False):
        assert torch.equal(x.x, y.x)
    with pytest.raises(ResumeError, match="data"):
        source(fingerprint="other").load_state_dict(state)


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="even number"):
        source(batch_size=5)
    with pytest.raises(ConfigError, match="10 pairs, fewer than the 20"):
        source(batch_size=40)
    with pytest.raises(ActivationError, match="as many positive as negative"):
        PairedBatches(torch.zeros(3, 2), torch.zeros(4, 2), 2)
