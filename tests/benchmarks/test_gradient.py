import gradient
import torch

from saelab.sae.gradient import GradientConfig, GradientSAE


def test_with_beta_keeps_the_dictionary():
    sae = GradientSAE(GradientConfig(d_in=8, d_sae=16, k=2, beta=0.0), seed=1)
    other = gradient.with_beta(sae, 3.0)
    assert other.config.beta == 3.0
    assert torch.equal(other.W_dec, sae.W_dec)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.encode(x).indices, sae.encode(x).indices)


def test_tables_show_choices_and_controls():
    ce = {f"ce_recovered {choice}": 0.9 for choice in gradient.CHOICES}
    sae = {"kind": "sae", "k": 8, "seed": 0, "beta": 1.0, **ce, "fvu magnitude": 0.2, "dead": 0.01}
    rows = [
        {**sae, "steer_kl": 0.02, "steer_logits": 3.0},
        {"kind": "steer", "name": "random", "k": None, "seed": 0, "steer_kl": 0.01, "steer_logits": 2.0},
    ]
    text = gradient.tables(rows)
    assert "| k 8, beta 1, as trained | 0.900 | 0.900 | 0.900 | 0.900 | 0.200 | 1.0 |" in text
    assert "| control: random | 0.0100 | 2.00 |" in text
