import numpy as np
import pytest
import torch

from saelab.analysis.dark_matter.decompose import measure
from saelab.analysis.dark_matter.decomposition import decompositions, to_frame
from tests.analysis.dark_matter.planted import SITE, data, half_absent, scaled, superposition


def decompose(x, sae, **options):
    tokens = data(x, **options)
    (result,) = decompositions(tokens, measure(tokens, SITE, {"sae": sae}), {"sae": sae.d_sae})
    return result


@pytest.mark.parametrize(("magnitudes", "norm"), [("const", 1.0), ("uniform", 0.934), ("exp", 0.754)])
def test_absent_orthonormal_features_are_linear_error(magnitudes, norm):
    x, sae, _ = half_absent(magnitudes)
    found = decompose(x, sae)
    assert found.r2 == pytest.approx(1.0, abs=1e-3)
    assert found.norm_r2["error"] == pytest.approx(norm, abs=0.02)
    assert found.fvu_nonlinear < 1e-3
    assert abs(found.r2_shuffled) < 0.03
    assert abs(found.norm_r2_shuffled["error"]) < 0.05


@pytest.mark.parametrize(("introduced", "expected"), [(0.5, 0.791), (1.0, 0.485), (2.0, 0.183)])
def test_r2_introduced_error_theory(introduced, expected):
    x, sae, theory = half_absent("uniform", introduced=introduced)
    found = decompose(x, sae)
    assert found.r2 == pytest.approx(theory, abs=0.02)
    assert found.r2 == pytest.approx(expected, abs=0.02)
    assert found.r2_interval[0] < found.r2 < found.r2_interval[1]
    # Not above 0; below it by the overfit of 128 coefficients, and as eta is smaller on the tokens W was fitted on.
    assert -0.08 < found.norm_r2["nonlinear"] < 0.01
    assert found.fvu == pytest.approx(found.fvu_linear + found.fvu_nonlinear)


def test_superposition():
    x, sae = superposition()
    found = decompose(x, sae)
    assert found.r2 == pytest.approx(0.43, abs=0.03)
    assert found.norm_r2["error"] == pytest.approx(0.22, abs=0.03)


def test_shrinkage_flagged():
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)) + 1
    found = decompose(x, scaled(0.9))
    assert found.r2 == pytest.approx(1.0, abs=1e-6)  # a perfect "linear error" that is no absent feature
    assert found.shrinkage.flagged
    assert found.shrinkage.shrinkage == pytest.approx(0.9, abs=1e-5)
    assert found.shrinkage.factor == pytest.approx(1 / 0.9, abs=1e-5)
    assert found.shrinkage.removed == pytest.approx(1, abs=1e-5)
    assert np.isnan(found.shrinkage.r2_rescaled)
    absent, sae, _ = half_absent("uniform", tokens=8000)
    honest = decompose(absent, sae)
    assert not honest.shrinkage.flagged
    assert honest.shrinkage.r2_rescaled == pytest.approx(honest.r2, abs=0.01)


def test_split_is_by_context_and_seeded():
    x, sae, _ = half_absent("uniform", tokens=6000)
    a, b, c = data(x), data(x), data(x, seed=1)
    assert torch.equal(a.fit, b.fit)
    assert not torch.equal(a.fit, c.fit)
    for context in a.context.unique():
        assert a.fit[a.context == context].unique().numel() == 1
    assert decompose(x, sae) == decompose(x, sae)


def test_two_saes_at_once_are_each_as_alone():
    x, first, _ = half_absent("uniform", tokens=6000, introduced=1)
    second = scaled(0.7, 128)
    tokens = data(x)
    both = decompositions(tokens, measure(tokens, SITE, {"a": first, "b": second}), {"a": 64, "b": 256})
    alone = decompositions(tokens, measure(tokens, SITE, {"b": second}), {"b": 256})
    assert both[1].r2 == pytest.approx(alone[0].r2)
    assert both[1].norm_r2 == pytest.approx(alone[0].norm_r2)
    assert list(to_frame(both)["name"]) == ["a", "b"]


def test_no_intercept_differs_where_the_error_has_a_mean():
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    sae = scaled(0.5)
    sae.b_dec = torch.full((16,), -3.0)
    found = decompose(x, sae)
    assert found.r2 == pytest.approx(1, abs=1e-5)
    assert found.r2_no_intercept < 0


def test_latents_probe_tracks_mean_values():
    """Features of different magnitudes: the probe of ||x_hat||^2 points along the strong ones."""
    g = torch.Generator().manual_seed(0)
    size = torch.linspace(0.5, 4, 32)
    codes = (torch.rand(8000, 32, generator=g) < 0.1) * size
    eye = torch.eye(32)
    from tests.features.fakes import Oracle

    found = decompose(codes, Oracle(eye, eye))
    assert found.latents["n"] == 32
    assert found.latents["pearson"] > 0.95


def test_baselines_know_what_they_are_told():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (4000,), generator=g)
    x = torch.randn(4000, 16, generator=g) * (1 + ids[:, None].float())
    tokens = data(x, token_id=ids)
    sae = scaled(0.5)
    measured = measure(tokens, SITE, {"sae": sae})
    losses = {"loss": np.where(np.arange(4000) % 50 == 49, np.nan, measured.saes["sae"].total).astype(np.float32)}
    (found,) = decompositions(tokens, measured, {"sae": 32}, losses)
    assert found.baselines["x_norm_squared"] == pytest.approx(1, abs=1e-5)
    assert found.baselines["loss"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < found.baselines["token"] < 0.95
    assert abs(found.baselines["l0"]) < 0.02
    assert abs(found.norm_r2["error"]) < 0.05  # a norm is no linear function of a symmetric x
