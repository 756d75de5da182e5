import torch

from saelab.sae.decoder import normalize_rows_, remove_parallel_


def test_slices_do_not_show():
    g = torch.Generator().manual_seed(0)
    w, gradient = torch.randn(3000, 300, generator=g), torch.randn(3000, 300, generator=g)
    expected = w / w.norm(dim=1, keepdim=True)
    normalize_rows_(w)
    torch.testing.assert_close(w, expected)
    projected = gradient - (gradient * w).sum(1, keepdim=True) * w
    remove_parallel_(gradient, w)
    torch.testing.assert_close(gradient, projected)


def test_zero_rows_stay_zero():
    w = torch.zeros(2, 3)
    normalize_rows_(w)
    assert torch.equal(w, torch.zeros(2, 3))
