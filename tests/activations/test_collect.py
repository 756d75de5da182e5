import torch

from saelab.activations.collect import Collector
from tests.activations.fakes import FakeBatch, FakeModel


def collector(**settings: object) -> Collector:
    chosen: dict[str, object] = {"dtype": torch.float32, "outlier_norm": None, "gradients": False, "padded": False}
    return Collector(FakeModel(), ["a", "b"], **{**chosen, **settings})  # type: ignore[arg-type]


def test_rows_come_in_text_order_with_their_origin() -> None:
    tokens = torch.tensor([[0, 5, 6], [7, 0, 8]])
    columns = collector().collect(FakeBatch(tokens, tokens != 0), torch.tensor([9, 3]))
    assert columns["row"].tolist() == [9, 9, 3, 3]
    assert columns["position"].tolist() == [1, 2, 0, 2]
    assert columns["token_id"].tolist() == [5, 6, 7, 8]
    assert columns["a"].shape == (4, 4)
    assert columns["b"].shape == (4, 6)


def test_the_declared_tensors_are_the_ones_that_come() -> None:
    tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    for gradients in (False, True):
        found = collector(gradients=gradients, dtype=torch.float16)
        columns = found.collect(FakeBatch(tokens, tokens != 0), torch.arange(4))
        assert {n: (tuple(c.shape[1:]), c.dtype) for n, c in columns.items()} == found.tensors()


def test_the_last_kept_position_has_no_loss_after_it() -> None:
    keep = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, False]])
    found = collector(gradients=True, padded=True)
    columns = found.collect(FakeBatch(torch.ones(3, 4, dtype=torch.int64), keep), torch.arange(3))
    assert columns["row"].tolist() == [0, 1, 1, 1]
    assert columns["position"].tolist() == [1, 0, 1, 2]
    assert found.excluded == {"bos": 2, "padding": 2, "special": 1, "last": 3}


def test_state_goes_back_exactly() -> None:
    tokens = torch.randint(1, 50, (3, 8, 12), generator=torch.Generator().manual_seed(0))
    batches = [FakeBatch(part, part > 3) for part in tokens]
    straight, resumed = collector(outlier_norm=1.3), collector(outlier_norm=1.3)
    expected = [straight.collect(batch, torch.arange(8)) for batch in batches][-1]
    other = collector(outlier_norm=1.3)
    for batch in batches[:2]:
        other.collect(batch, torch.arange(8))
    resumed.load_state(other.state())
    found = resumed.collect(batches[2], torch.arange(8))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert resumed.state() == straight.state()
    assert straight.excluded["outlier_norm"] > 0
