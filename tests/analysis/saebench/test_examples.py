"""Pooled examples of a fake model; the shuffled control must not know the class."""

import numpy as np
import pytest
import torch

from saelab.analysis.saebench.controls import Shuffled
from saelab.analysis.saebench.examples import LabelledSet, collect
from saelab.analysis.saebench.sparse_probing import sparse_probing
from saelab.core.errors import ActivationError
from tests.features.fakes import SITE, FakeModel, identity


def test_shuffled_control_is_chance_where_classes_come_in_order():
    """Rows of class 0 first, then those of class 1, as the windows of two files do."""
    model, sae = FakeModel(d_vocab=20), identity(6)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randint(0, 10, (400, 5), generator=generator) + 10 * k for k in (0, 1)])
    example = np.tile(np.arange(800)[:, None], (1, 5))
    pooled = collect(model, SITE, {"sae": sae, "shuffled": Shuffled(sae)}, tokens, example)
    np.testing.assert_allclose(pooled.x, model.embed[tokens].mean(1), atol=1e-5)
    train = np.random.default_rng(0).random(800) < 0.7
    found = sparse_probing([LabelledSet("order", ("a", "b"), pooled, np.repeat([0, 1], 400), train)])
    assert found.value("sae_top_5_test_accuracy") > 0.8
    assert found.value("sae_top_5_test_accuracy", "shuffled") == pytest.approx(0.5, abs=0.12)


def test_nan_is_refused():
    model = FakeModel()
    model.embed[3] = torch.nan
    tokens = torch.tensor([[1, 3]])
    with pytest.raises(ActivationError, match="NaN or infinity on the examples"):
        collect(model, SITE, {"sae": identity(6)}, tokens, np.array([[0, 0]]))
    assert collect(model, SITE, {"sae": identity(6)}, tokens, np.array([[0, -1]])).x.shape == (1, 6)
