"""Description length: entropies known in closed form."""

import numpy as np
import pytest
import torch

from saelab.analysis.saebench.mdl import description_length, mdl, quantise
from saelab.core.code import SparseCode
from tests.features.fakes import Oracle


def entropy(p):
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def test_constant_value_costs_the_coin_alone():
    dense = torch.zeros(1000, 3)
    dense[:100, 0] = 2.5
    dense[:, 1] = 1.0
    code = SparseCode.from_dense(dense)
    for bins in (4, 32):
        assert description_length(code, bins) == pytest.approx(entropy(0.1), abs=1e-12)


def test_uniform_values_cost_the_bins_too():
    """On for half of the tokens, values evenly over 8 bins: H(1/2) + 1/2 * 3 bits."""
    dense = torch.zeros(1600, 1)
    dense[:800, 0] = (torch.arange(800) + 0.5) / 800
    dense[799, 0] = 1.0
    assert description_length(SparseCode.from_dense(dense), 8) == pytest.approx(1 + 0.5 * 3, abs=1e-9)


def test_quantised_values_are_the_middles():
    code = SparseCode.from_dense(torch.tensor([[0.1], [0.26], [0.5], [1.0]]))
    quantised, number = quantise(code, 4)
    assert number.tolist() == [0, 1, 1, 3]
    assert quantised.values.tolist() == pytest.approx([0.125, 0.375, 0.375, 0.875])


def test_least_accepted_number_of_bins():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(2000, 6, generator=generator) * (torch.rand(2000, 6, generator=generator) < 0.3)
    rows = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:6]
    code = SparseCode.from_dense(dense)
    always = SparseCode.from_dense(torch.rand(2000, 6, generator=generator))
    sae = Oracle(rows.T, rows)
    found = mdl(dense @ rows, {"sae": sae, "untrained": sae}, {"sae": code, "untrained": always})
    accepted = [row for row in found.details if row["within_threshold"]]
    assert 0 < len(accepted) < len(found.details)
    assert found.value("description_length") == min(row["description_length"] for row in accepted)
    assert found.value("fvu_quantised") < 0.01
    assert found.value("description_length", "untrained") > found.value("description_length")
    assert found.flags() == []
