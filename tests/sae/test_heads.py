"""Which head a feature of an attention-output SAE belongs to."""

import pytest
import torch

from saelab.core.errors import ConfigError
from saelab.sae.heads import head_activations, head_shares, heads_of, recorded_heads


def test_shares_by_hand():
    rows = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(head_shares(rows, 2), expected)
    assert head_shares(rows, 1).flatten().tolist() == [1, 1, 1]


def test_shares_sum_to_one_and_ignore_the_scale():
    rows = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    shares = head_shares(rows, 6)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    torch.testing.assert_close(head_shares(rows * 7, 6), shares)


def test_heads_add_up_to_the_pre_activation():
    g = torch.Generator().manual_seed(0)
    z, w_enc = torch.randn(9, 24, generator=g), torch.randn(24, 30, generator=g)
    parts = head_activations(z, w_enc, 5, 4)
    assert parts.shape == (9, 4)
    torch.testing.assert_close(parts.sum(1), (z @ w_enc)[:, 5])
    torch.testing.assert_close(parts[:, 2], z[:, 12:18] @ w_enc[12:18, 5])


def test_widths_that_do_not_fit():
    with pytest.raises(ConfigError, match="width of 24 does not fall into 5 heads"):
        head_shares(torch.zeros(2, 24), 5)


def test_what_meta_records(tmp_path):
    assert heads_of({"provenance": {"n_heads": 6, "d_head": 32}}) == (6, 32)
    assert heads_of({"provenance": {"site": "blocks.0.hook_resid_post"}}) is None
    from saelab.sae import save_sae
    from tests.sae.test_contract import make

    save_sae(make("topk").float(), tmp_path / "s", {})
    with pytest.raises(ConfigError, match="records no heads"):
        recorded_heads(tmp_path / "s")
