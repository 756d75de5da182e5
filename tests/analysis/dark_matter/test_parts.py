"""Synthetic errors, earlier sites, pursuit, SAEs of the error: each on data whose answer is known."""

import pytest
import torch

from saelab.analysis.dark_matter.decompose import measure
from saelab.analysis.dark_matter.earlier import from_earlier
from saelab.analysis.dark_matter.error_saes import GaussianStream, train_on_errors
from saelab.analysis.dark_matter.introduced import introduced_error
from saelab.analysis.dark_matter.pursued import compare_pursuit
from saelab.analysis.dark_matter.tokens import tokens_of_arrays
from saelab.core.errors import ConfigError
from saelab.core.progress import set_progress
from saelab.sae import ARCHITECTURES
from tests.analysis.dark_matter.planted import SITE, contexts, data, half_absent, scaled
from tests.features.fakes import Oracle
from tests.sae.synthetic import ortho, set_oracle, superpos


@pytest.fixture(autouse=True)
def _quiet():
    set_progress(False)
    yield
    set_progress(True)


def test_introduced_error_is_found_on_orthonormal_features():
    planted = ortho(4000, d=32, p=0.2, magnitudes="uniform")
    rows = planted.features.float()
    x = planted.x.float() + 0.1 * torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    fit = contexts(4000) % 2 == 0
    found = introduced_error(
        Oracle(rows.T, rows), x, fit, absent=(0.0, 50.0), sigmas_x=(0.0,), sigmas_r=(0.0, 1.0, 3.0)
    )
    assert len(found.cells) == 5  # without any error there is nothing to split
    for cell in found.cells:
        theory = cell.true_absent / (cell.true_absent + cell.true_introduced)
        assert cell.r2 == pytest.approx(theory, abs=0.03)
        assert cell.linear == pytest.approx(cell.true_absent, abs=0.02)
        assert cell.nonlinear == pytest.approx(cell.true_introduced, abs=0.02)
    assert found.correlation["linear"]["absent"] > 0.99
    assert found.correlation["nonlinear"]["introduced"] > 0.99
    assert len(found.to_frame()) == 5


def test_earlier_reconstruction_explains_what_it_holds():
    """The error of the SAE is half of x; the earlier SAE sees exactly the part that x does not show linearly."""
    g = torch.Generator().manual_seed(0)
    x, hidden = torch.randn(4000, 8, generator=g), torch.randn(4000, 8, generator=g)

    class Noisy(type(scaled(1.0, 8))):
        def decode(self, code):
            x_hat = super().decode(code)
            return x_hat if code.n_tokens == 1 else x_hat - 0.3 * hidden[self.at]

        def encode(self, some):
            self.at = torch.cdist(some, x).argmin(1)
            return super().encode(some)

    base = scaled(0.5, 8)
    sae = Noisy(base.W_enc, base.W_dec)
    tokens = tokens_of_arrays({SITE: x, "earlier": hidden}, contexts(4000))
    linear = measure(tokens, SITE, {"sae": sae}).saes["sae"].linear
    found = {r.predictors: r for r in from_earlier(tokens, SITE, sae, linear, {"earlier": scaled(1.0, 8)})}
    assert list(found) == ["own", "earlier", "own+earlier"]
    assert found["earlier"].nonlinear > 0.95
    assert abs(found["earlier"].linear) < 0.02
    assert found["own+earlier"].error > 0.99
    assert found["own+earlier"].fvu < 0.01
    assert abs(found["own+earlier"].shuffled) < 0.05
    assert found["own+earlier"].width == 16
    with pytest.raises(ConfigError, match="reads width 4"):
        from_earlier(tokens, SITE, sae, linear, {"earlier": scaled(1.0, 4)})


def test_pursuit_beats_the_encoder_in_superposition_at_equal_l0():
    planted = superpos(4000, d=32, n=64, p=0.06)
    config = ARCHITECTURES["topk"].config(architecture="topk", d_in=32, d_sae=64, k=5)
    sae = ARCHITECTURES["topk"].sae(config)
    set_oracle(sae, planted.features)
    sae.requires_grad_(False)
    found = {r.method: r for r in compare_pursuit(data(planted.x), SITE, sae)}
    assert found["gradient"].fvu < 0.6 * found["encoder"].fvu
    assert found["gradient"].l0 <= found["encoder"].l0 + 1e-6
    assert found["random"].fvu > 1.5 * found["gradient"].fvu
    assert found["orthogonal"].fvu < found["encoder"].fvu
    assert all(r.fvu_nonlinear <= r.fvu + 1e-6 and r.tokens_per_second > 0 for r in found.values())


def test_error_saes_find_features_and_not_noise(tmp_path):
    """The error is 8 absent orthonormal features (all linear): an SAE finds them; a Gaussian twin has none to find."""
    planted = ortho(4000, d=16, p=0.15, magnitudes="uniform")
    rows = planted.features[:8].float()
    tokens = data(planted.x.float())
    sae = Oracle(rows.T, rows)
    linear = measure(tokens, SITE, {"sae": sae}).saes["sae"].linear
    results = train_on_errors(
        tokens,
        SITE,
        sae,
        linear,
        tmp_path,
        sae_config={"architecture": "topk", "d_sae": 32, "k": 3},
        training={"tokens": 30_000, "batch_size": 500, "lr": 1e-2, "device": "cpu"},
    )
    error, along, _ = results
    assert [r.part for r in results] == ["error", "linear", "nonlinear"]
    assert error.fvu < 0.2
    assert error.fvu_gaussian > error.fvu + 0.1
    assert along.fvu == pytest.approx(error.fvu, abs=0.05)
    assert (tmp_path / "error" / "error" / "weights.safetensors").is_file()


def test_gaussian_stream_has_the_covariance_and_resumes():
    x, _, _ = half_absent("exp", tokens=2000)
    covariance = torch.cov(x[:, :5].T.double())
    stream = GaussianStream(torch.arange(5.0), covariance, 4000, seed=3)
    batches = iter(stream)
    first = next(batches).x
    torch.testing.assert_close(torch.cov(first.T), covariance.float(), atol=0.02, rtol=0.15)
    torch.testing.assert_close(first.mean(0), torch.arange(5.0), atol=0.05, rtol=0.1)
    state = stream.state_dict()
    second = next(batches).x
    again = GaussianStream(torch.arange(5.0), covariance, 4000, seed=3)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).x, second)
