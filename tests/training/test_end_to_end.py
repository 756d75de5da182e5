"""Training with the model in the loop, on a model of two matrices: every loss by hand, exact resume, truth found."""

import os
import signal

import pytest
import torch
from torch import nn

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ActivationError, ConfigError, ResumeError, TextError
from saelab.sae import StepContext, TopKConfig, TopKSAE, load_sae, save_sae
from saelab.sae.transcoder import TranscoderConfig, TranscoderSAE
from saelab.training import FitConfig, Stopped, fit
from saelab.training.end_to_end import EndToEnd, EndToEndConfig, TextBatch
from saelab.training.initialise import initial_sae
from saelab.training.texts import TextStream
from tests.features.fakes import FakeRows

SITE, LATER, VOCAB, D = "a", "b", 7, 6


class Texts(FakeRows):
    def describe(self):
        return {"source": "fake"}


def texts(n_rows=40, length=9, seed=1):
    tokens = torch.randint(1, VOCAB, (n_rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return Texts(tokens)


class TwoLayers:
    """x = E[token] at site a, y = tanh(x M) at site b, logits from y."""

    fingerprint = "two"

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.E, self.M, self.U = (nn.Parameter(torch.randn(*s, generator=g)) for s in ((VOCAB, D), (D, D), (D, VOCAB)))
        for p in (self.E, self.M, self.U):
            p.requires_grad_(False)

    def width(self, site):
        return D

    def logits(self, tokens, replace=None, grad=False):
        replace = replace or {}
        with torch.set_grad_enabled(grad):
            x = replace.get(SITE, lambda a: a)(self.E[tokens])
            return replace.get(LATER, lambda a: a)(torch.tanh(x @ self.M)) @ self.U


def stream(batch_size=40, rows=None, later=(), **settings):
    return TextStream(TwoLayers(), rows or texts(), SITE, batch_size, later=later, **settings)


def an_sae(**settings):
    return TopKSAE(parse_config(TopKConfig, {"d_in": D, "d_sae": 24, "k": 2, "input_scale": 1.3, **settings}), seed=0)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_losses_by_hand(loss):
    model, sae = TwoLayers(), an_sae()
    batch = next(iter(stream(later=[LATER])))
    config = EndToEndConfig(loss=loss, weight=2.0, reconstruction=0.5, downstream=0.25)
    passed = EndToEnd(model, SITE, [LATER], config)(sae, batch, StepContext())
    x = model.E[batch.tokens]
    x_hat = x.clone()
    x_hat[batch.keep] = sae(x[batch.keep]).detach()
    clean, spliced = (torch.tanh(v @ model.M) for v in (x, x_hat))
    log_p, log_q = ((v @ model.U)[:, :-1][batch.keep[:, 1:]].log_softmax(-1) for v in (clean, spliced))
    error = (x - x_hat)[batch.keep].square().sum(1).mean() * 1.3**2
    truth = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean(),
        "ce": -log_q.gather(1, batch.tokens[:, 1:][batch.keep[:, 1:]][:, None]).mean(),
    }[loss]
    there, were = spliced[batch.keep], clean[batch.keep]
    nmse = (there - were).square().sum() / (were - were.mean(0)).square().sum()
    torch.testing.assert_close(passed.losses[loss], D * 2 * truth)
    torch.testing.assert_close(passed.losses["downstream"], D * 0.25 * nmse)
    torch.testing.assert_close(passed.losses["mse"], 0.5 * error)
    torch.testing.assert_close(passed.squared_error, error)
    sum(passed.losses.values()).backward()
    assert sae.W_dec.grad.abs().sum() > 0
    assert sae.w_enc_t.grad.abs().sum() > 0
    assert model.U.grad is None


def test_gradient_of_the_prediction_loss_is_exact():
    model, sae = TwoLayers(), an_sae().double()
    for name in ("E", "M", "U"):
        setattr(model, name, nn.Parameter(getattr(model, name).double(), requires_grad=False))
    batch = next(iter(TextStream(model, texts(4), SITE, 36)))
    batch = TextBatch(batch.x.double(), tokens=batch.tokens, keep=batch.keep, clean=batch.clean)
    objective = EndToEnd(model, SITE, [], EndToEndConfig(reconstruction=0.0))

    def loss(bias):
        with torch.no_grad():
            sae.b_dec.copy_(bias)
        return objective(sae, batch, StepContext()).losses["kl"]

    bias = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
    # b_dec moves the encoder's input too: the encoder is held still by taking it out of the sum
    sae.w_enc_t.requires_grad_(False)
    (gradient,) = torch.autograd.grad(loss(bias), sae.b_dec)
    for i in range(D):
        step = torch.zeros(D, dtype=torch.float64)
        step[i] = 1e-5
        difference = (loss(bias + step) - loss(bias - step)) / 2e-5
        torch.testing.assert_close(gradient[i], difference, rtol=1e-4, atol=1e-7)


def test_a_perfect_reconstruction_costs_nothing():
    sae = an_sae(d_sae=2 * D, k=D, input_scale=1.0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.w_enc_t.copy_(sae.W_dec)
    config = EndToEndConfig(downstream=1.0)
    passed = EndToEnd(TwoLayers(), SITE, [LATER], config)(sae, next(iter(stream(later=[LATER]))), StepContext())
    assert all(float(value.detach()) < 1e-5 for value in passed.losses.values())


def test_batches_are_whole_rows_and_every_row_comes_once_an_epoch():
    rows = texts(10)
    source = stream(batch_size=30, rows=rows, window=6)
    it = iter(source)
    batches = [next(it) for _ in range(4)]  # windows of 6 and 4 rows: 4 + 2, then 4, then the next epoch
    assert [b.tokens.shape[0] for b in batches] == [4, 2, 4, 4]
    seen = torch.cat([b.tokens for b in batches[:3]])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, rows.tokens.tolist()))
    for b in batches:
        assert torch.equal(b.x, TwoLayers().E[b.tokens][b.keep])
        assert b.x.shape[0] == b.tokens.shape[0] * 8


def test_stream_resumes_exactly_and_refuses_others():
    source = stream(batch_size=30, rows=texts(10), window=6)
    it = iter(source)
    for _ in range(3):
        next(it)
    state = source.state_dict()
    expected = [next(it).tokens for _ in range(5)]
    other = stream(batch_size=30, rows=texts(10), window=6)
    other.load_state_dict(state)
    assert all(torch.equal(a, b.tokens) for a, b in zip(expected, other, strict=False))
    with pytest.raises(ResumeError, match="batch_size"):
        stream(batch_size=20).load_state_dict(state)
    with pytest.raises(TextError):
        next(iter(stream(rows=texts(0))))


def test_broken_activations_are_one_line():
    source = stream()
    source._model.E[3] = float("nan")
    with pytest.raises(ActivationError, match="NaN"):
        next(iter(source))


def a_run(**settings):
    training = {"tokens": 40 * 300, "batch_size": 40, "lr": 1e-2, "init_tokens": 40, "checkpoint_every": 7}
    return parse_config(FitConfig, {"sae": {"d_in": D, "d_sae": 12, "k": 1}, "training": training, **settings})


def objective(**settings):
    return EndToEnd(TwoLayers(), SITE, [], EndToEndConfig(**settings))


def test_training_end_to_end_lowers_the_divergence_and_resumes_bit_for_bit(tmp_path):
    (plain,) = fit([a_run()], stream(), tmp_path / "plain")
    start = a_run(start=str(plain.path))
    (tuned,) = fit([start], stream(), tmp_path / "tuned", objective=objective(reconstruction=0.0))
    batch = next(iter(stream(batch_size=400, seed=9)))

    def kl(path):
        sae = load_sae(path)
        return float(objective()(sae, batch, StepContext()).losses["kl"])

    assert kl(tuned.path) < 0.7 * kl(plain.path)
    assert load_sae(tuned.path).input_scale == load_sae(plain.path).input_scale

    class Stopping(TextStream):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 150:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    interrupted = Stopping(TwoLayers(), texts(), SITE, 40)
    with pytest.raises(Stopped):
        fit([start], interrupted, tmp_path / "again", objective=objective(reconstruction=0.0))
    (again,) = fit([start], stream(), tmp_path / "again", True, objective=objective(reconstruction=0.0))
    assert torch.equal(load_sae(again.path).W_dec, load_sae(tuned.path).W_dec)
    assert again.metrics == tuned.metrics


def test_start_keeps_weights_and_takes_new_settings(tmp_path):
    save_sae(an_sae(d_sae=12), tmp_path / "s")
    run = parse_config(FitConfig, {"sae": {"d_in": D, "d_sae": 12, "k": 5}, "start": str(tmp_path / "s")})
    started = initial_sae(run, torch.zeros(1, D), torch.zeros(1, D))
    assert torch.equal(started.W_dec, load_sae(tmp_path / "s").W_dec)
    assert (started.config.k, started.input_scale) == (5, 1.3)
    assert started.W_dec.requires_grad
    other = parse_config(FitConfig, {"sae": {"d_in": D, "d_sae": 13, "k": 5}, "start": str(tmp_path / "s")})
    with pytest.raises(ConfigError, match=r"d_sae = 12, but the run wants 13; leave sae\.d_sae out"):
        initial_sae(other, torch.zeros(1, D), torch.zeros(1, D))


def test_an_ordinary_batch_is_no_text():
    with pytest.raises(AssertionError):
        objective()(an_sae(), Batch(torch.zeros(3, D)), StepContext())


def test_a_transcoder_is_judged_by_what_it_puts_at_its_target():
    """Site a -> site b with the true map as skip path and no features: nothing is lost; without it, something is."""
    model = TwoLayers()
    model.M.mul_(1e-3)  # tanh is then the identity, and b = a M
    batch = next(iter(TextStream(model, texts(), SITE, 40, target_site=LATER)))
    torch.testing.assert_close(batch.target, torch.tanh(batch.x @ model.M))
    sae = TranscoderSAE(parse_config(TranscoderConfig, {"d_in": D, "d_sae": 24, "k": 2, "skip": True}), seed=0)
    objective = EndToEnd(model, LATER, [], EndToEndConfig())
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_skip.copy_(model.M)
    assert float(objective(sae, batch, StepContext()).losses["kl"].detach()) < 1e-6
    with torch.no_grad():
        sae.W_skip.neg_()
    assert float(objective(sae, batch, StepContext()).losses["kl"].detach()) > 1e-6
