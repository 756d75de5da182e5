"""What every architecture promises; a new one is tested by being registered."""

import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.core.config import parse_config
from saelab.core.errors import ActivationError
from saelab.sae import ARCHITECTURES, SAE, StepContext, build_sae, load_sae, save_sae

D_IN, D_SAE, N = 8, 32, 12


def make(name: str, **settings: object) -> SAE:
    """An SAE with no weight at its initial value, in float64 so that equality means equality."""
    sae = build_sae(
        parse_config(
            ARCHITECTURES[name].config,
            {"architecture": name, "d_in": D_IN, "d_sae": D_SAE, "input_scale": 1.7} | settings,
        ),
        seed=3,
    ).double()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
        sae.after_step()  # norms exact in float64
        sae.w_enc_t += torch.randn(sae.w_enc_t.shape, generator=g) * 0.1
    return sae


def draw(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(sae: SAE, n: int = N) -> Batch:
    return sae.scale_batch(Batch(draw(n), None, draw(n, seed=1)))


@pytest.fixture(params=list(ARCHITECTURES))
def sae(request: pytest.FixtureRequest) -> SAE:
    return make(request.param)


def test_shapes_and_names(sae):
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_dec.shape == (D_SAE, D_IN)
    assert (sae.b_enc.shape, sae.b_dec.shape) == ((D_SAE,), (D_IN,))
    assert (sae.d_in, sae.d_sae, sae.input_scale) == (D_IN, D_SAE, 1.7)


@pytest.mark.parametrize("n", [0, 1, N])
def test_encode_decode(sae, n):
    code = sae.encode(draw(n))
    assert isinstance(code, SparseCode)
    assert (code.n_tokens, code.d_sae) == (n, D_SAE)
    assert (code.values >= 0).all()
    assert sae.decode(code).shape == (n, D_IN)
    torch.testing.assert_close(sae(draw(n)), sae.decode(code))
    torch.testing.assert_close(sae.decode(code), (code.to_dense() @ sae.W_dec + sae.b_dec) / sae.input_scale)


def test_rows_are_independent_at_inference(sae):
    x, order = draw(), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.encode(x).to_dense()[order], sae.encode(x[order]).to_dense())
    torch.testing.assert_close(sae.encode(x).to_dense()[2:3], sae.encode(x[2:3]).to_dense())


def test_permuting_a_training_batch_permutes_its_code(sae):
    whole = batch(sae)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    permuted = Batch(whole.x[order], None, whole.gradient[order])
    a, b = (sae.encode_training(some, StepContext()).code.to_dense() for some in (whole, permuted))
    torch.testing.assert_close(a[order], b)


@pytest.mark.parametrize("shape", [(2, 3, D_IN), (D_IN,), (4, D_IN + 1)])
def test_wrong_input_is_one_line(sae, shape):
    with pytest.raises(ActivationError) as error:
        sae.encode(torch.zeros(shape))
    assert "\n" not in str(error.value)
    assert str(D_IN) in str(error.value)


def test_code_of_another_sae_is_refused(sae):
    other = SparseCode.from_dense(torch.eye(3, D_SAE + 1, dtype=torch.float64))
    with pytest.raises(ActivationError, match=f"over {D_SAE + 1} features, this SAE has {D_SAE}"):
        sae.decode(other)


def test_save_and_load_are_bit_equal(sae, tmp_path):
    sae = sae.float()
    save_sae(sae, tmp_path / "sae", {"note": 1})
    loaded = load_sae(tmp_path / "sae")
    assert loaded.config == sae.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors().values(), sae.tensors().values(), strict=True))
    assert torch.equal(loaded(draw()), sae(draw()))


def test_folding_the_scale_changes_nothing_but_units(sae):
    folded = sae.fold_scale()
    assert folded.input_scale == 1.0
    torch.testing.assert_close(folded(draw()), sae(draw()))
    torch.testing.assert_close(folded.encode(draw()).to_dense() * sae.input_scale, sae.encode(draw()).to_dense())
    torch.testing.assert_close(folded.W_dec, sae.W_dec)


@pytest.mark.parametrize("dead", [None, [5], [0, 1, 2, 30, 31], list(range(24))], ids=["none", "1", "5", "24"])
def test_gradients_equal_dense_autograd(sae, dead):
    """Losses and all gradients, AuxK's included, of the sparse kernels and of plain dense torch."""
    results = []
    for impl in ("sparse", "reference"):
        context = StepContext(
            dead=None if dead is None else torch.tensor(dead), aux_k=2, aux_coefficient=0.5, impl=impl
        )
        losses = sae.training_pass(batch(sae), context).losses
        gradients = torch.autograd.grad(sum(losses.values()), list(sae.parameters()), allow_unused=True)
        results.append((losses, gradients))
    torch.testing.assert_close(*results)
    assert ("aux" in results[0][0]) == (dead is not None)


ESTIMATED = {"jumprelu", "gated", "feature_choice"}
"""Architectures whose backward pass is, by design, not the derivative of the forward one."""


def test_gradcheck(sae):
    """All gradients against finite differences: the dense reference could share a mistake with the kernels."""
    if sae.config.architecture in ESTIMATED:
        pytest.skip("gradients are straight-through estimates here")
    sae.eval()  # nothing is learned on the way
    rows, context = batch(sae, 5), StepContext(dead=torch.tensor([3, 9]), aux_k=1, aux_coefficient=0.0, impl="sparse")
    names = [name for name, _ in sae.named_parameters()]

    def loss(*values):
        for name, value in zip(names, values, strict=True):
            sae._parameters[name] = value
        return sum(sae.training_pass(rows, context).losses.values())

    values = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-5, rtol=1e-4)


def dense_code(sae, x):
    """The code by its definition, from the full matrix of pre-activations."""
    scaled = x * sae.input_scale
    z = (scaled if sae.center is None else scaled - sae.b_dec) @ sae.W_enc + sae.b_enc
    name = sae.config.architecture
    if name == "gated":
        magnitude = ((z - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
        return magnitude * (z > 0)
    if sae.threshold is not None:
        return z.relu() * (z > sae.threshold)
    if hasattr(sae.config, "k"):
        k = max(1, round(sae.config.k))
        return torch.zeros_like(z).scatter(1, z.topk(k).indices, z.topk(k).values.relu())
    return z.relu()


SPARSE = {"k": 5}


def test_sparsity_delivered(sae):
    """Inference codes are those of the definition; training spends k per token, and not one entry more."""
    name, x = sae.config.architecture, draw()
    settings = {key: value for key, value in SPARSE.items() if key in type(sae.config).model_fields}
    sae = make(name, **settings)
    if name in ("mutual_choice", "feature_choice", "matryoshka"):
        for _ in range(3):
            sae.encode_training(batch(sae), StepContext())  # learns its thresholds
    torch.testing.assert_close(sae.encode(x).to_dense(), dense_code(sae, x))
    trained = sae.eval().encode_training(batch(sae), StepContext()).code
    if settings:
        assert trained.nnz == 5 * N
        assert int(trained.l0().sum()) <= 5 * N
        if sae.threshold is None:
            assert (sae.encode(x).l0() <= 5).all()
    assert torch.unique(trained.rows() * D_SAE + trained.indices).numel() == trained.nnz  # nothing is counted twice


def test_reconstruct_is_forward_and_takes_a_code(sae):
    x = draw()
    torch.testing.assert_close(sae.reconstruct(x), sae(x))
    torch.testing.assert_close(sae.reconstruct(x, sae.encode(x)), sae(x))


def test_training_pass_gives_its_reconstruction(sae):
    """What end-to-end training puts into the model: the scaled reconstruction, with gradient."""
    rows = batch(sae)
    passed = sae.training_pass(rows, StepContext())
    code = sae.encode_training(rows, StepContext()).code
    torch.testing.assert_close(passed.x_hat / sae.input_scale, sae.reconstruct(rows.x / sae.input_scale, code))
    torch.testing.assert_close(passed.squared_error, (rows.x - passed.x_hat).square().sum(1).mean())
    assert passed.x_hat.requires_grad


def test_aux_loss_alone_reaches_encoder_and_decoder_of_dead_features_only(sae):
    """What sparsify's fused encoder drops: the gradient of AuxK to the encoder."""
    dead = torch.tensor([3, 9, 20])
    losses = sae.training_pass(batch(sae), StepContext(dead=dead, aux_k=2, aux_coefficient=1.0)).losses
    if "aux" not in losses:
        pytest.skip("no AuxK here")
    w_enc, w_dec = torch.autograd.grad(losses["aux"], (sae.w_enc_t, sae.W_dec))
    alive = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, dead, False)
    for gradient in (w_enc, w_dec):
        assert gradient[dead].abs().sum() > 0
        assert gradient[alive].eq(0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_training_pass_of_tiny_batches_is_finite(sae, n):
    losses = sae.training_pass(batch(sae, n), StepContext(dead=torch.tensor([1]), aux_k=2, aux_coefficient=0.1)).losses
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())


def test_steps_keep_decoder_rows_at_norm_one(sae):
    if not sae.unit_norm_decoder:
        pytest.skip("this architecture does not constrain its decoder")
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.01)
    sum(sae.training_pass(batch(sae), StepContext()).losses.values()).backward()
    sae.before_step()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    optimizer.step()
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


def test_initialisation_is_tied_and_seeded(sae):
    a, b, c = (build_sae(sae.config, seed) for seed in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, c.W_dec)
    if sae.center is not None:  # a transcoder's two live in different spaces
        torch.testing.assert_close(a.W_enc, sae.encoder_start * a.W_dec.T, rtol=1e-6, atol=0)
