import pytest
import torch

from saelab.sae import StepContext, auxk
from saelab.sae.step import Block
from tests.sae.test_contract import batch, make


@pytest.mark.parametrize("n_dead", [2, 3, 12])
def test_dense_block_and_sparse_entries_give_the_same(n_dead, monkeypatch):
    sae = make("topk", k=4)
    context = StepContext(dead=torch.arange(n_dead), aux_k=3, aux_coefficient=1.0)
    kinds, results = [], []
    for limit in (100, 0):
        monkeypatch.setattr(auxk, "DENSE_BLOCK", limit)
        kinds.append(type(sae.encode_training(batch(sae), context).aux))
        losses = sae.training_pass(batch(sae), context).losses
        results.append((losses, torch.autograd.grad(sum(losses.values()), list(sae.parameters()))))
    assert kinds[0] is Block
    assert kinds[1] is not Block
    torch.testing.assert_close(*results)


def test_the_loss_is_the_formula():
    sae = make("topk", k=4)
    some, dead = batch(sae), torch.tensor([1, 8, 9, 30])
    losses = sae.training_pass(some, StepContext(dead=dead, aux_k=2, aux_coefficient=1 / 32)).losses
    pre = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    code = sae.encode_training(some, StepContext()).code
    residual = some.x - (code.to_dense() @ sae.W_dec + sae.b_dec)
    kept = pre[:, dead].topk(2, dim=1)
    f = torch.zeros(some.x.shape[0], 4, dtype=torch.float64).scatter(1, kept.indices, kept.values.relu())
    torch.testing.assert_close(losses["mse"], residual.square().sum(1).mean())
    torch.testing.assert_close(losses["aux"], (residual - f @ sae.W_dec[dead]).square().sum(1).mean() / 32)


def test_off_without_coefficient_or_dead():
    sae = make("topk", k=4)
    for context in (
        StepContext(dead=torch.tensor([1]), aux_k=2),
        StepContext(dead=torch.tensor([], dtype=torch.int64), aux_k=2, aux_coefficient=1.0),
    ):
        assert set(sae.training_pass(batch(sae), context).losses) == {"mse"}
