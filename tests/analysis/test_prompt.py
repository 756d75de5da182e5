"""A prompt's features, losses and ablations against what a ten-line model says they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saelab.analysis.prompt import ablation_effects, logit_weights, read_prompt, tokenise, write_directions
from saelab.core.errors import ConfigError, TextError
from tests.features.fakes import SITE, FakeModel, Oracle, identity

TOKENS = torch.tensor([0, 3, 7, 2, 9])
KEEP = TOKENS != 0


@pytest.fixture
def reading():
    return read_prompt(FakeModel(), identity(), SITE, TOKENS, KEEP)


def test_code_is_that_of_the_kept_tokens(reading):
    x = FakeModel().embed[TOKENS]
    dense = reading.code.to_dense()
    assert torch.equal(dense[1:], torch.cat([x, -x], 1).relu()[1:])
    assert not dense[0].any()
    assert np.isnan(reading.unexplained[0])
    np.testing.assert_allclose(reading.unexplained[1:], 0, atol=1e-12)
    assert reading.feature(2).tolist() == dense[:, 2].tolist()


def test_loss_is_that_of_the_model(reading):
    logits = FakeModel().logits(TOKENS[None])[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, TOKENS[1:], reduction="none")
    np.testing.assert_allclose(reading.loss[1:], wanted.numpy(), rtol=1e-5)
    assert np.isnan(reading.loss[0])


def test_surprise_is_relative_value_times_bits(reading):
    density = np.full(12, 0.25)
    density[3] = 0
    frame = reading.to_frame(density, np.full(12, 2.0, np.float32), n_kept=8)
    assert len(frame) == reading.code.nnz
    one = frame[frame["feature"] != 3].iloc[0]
    assert one["relative"] == pytest.approx(one["value"] / 2)
    assert one["surprise"] == pytest.approx(one["value"] / 2 * 2)
    unseen = frame[frame["feature"] == 3]
    assert (unseen["surprise"] / unseen["relative"]).to_numpy() == pytest.approx(4)  # half a time in 8 tokens: 1/16


def test_ablation_is_the_intervention_done_by_hand(reading):
    model, sae = FakeModel(), identity()
    effects = ablation_effects(model, sae, SITE, reading, [2, 9])
    for effect, feature in zip(effects, (2, 9), strict=True):
        code = reading.code.to_dense()[:, feature]

        def without(x, code=code, feature=feature):
            return x - code[:, None] * sae.W_dec[feature]

        logits = model.logits(TOKENS[None], replace={SITE: without})[0, :-1]
        ablated = torch.nn.functional.cross_entropy(logits, TOKENS[1:], reduction="none")
        np.testing.assert_allclose(effect[1:], ablated.numpy() - reading.loss[1:], atol=1e-5)


def test_ablating_what_never_fires_changes_nothing(reading):
    silent = Oracle(torch.zeros(6, 3), torch.randn(3, 6), b_enc=-torch.ones(3))
    quiet = read_prompt(FakeModel(), silent, SITE, TOKENS, KEEP)
    np.testing.assert_allclose(ablation_effects(FakeModel(), silent, SITE, quiet, [1])[0, 1:], 0, atol=1e-6)
    assert ablation_effects(FakeModel(), silent, SITE, quiet, []).shape == (0, 5)


def test_directions_are_decoder_rows_without_the_bias():
    sae = Oracle(torch.randn(6, 4), torch.randn(4, 6), b_dec=torch.randn(6))
    torch.testing.assert_close(write_directions(sae, [2, 0]), sae.W_dec[[2, 0]])


def test_logit_weights():
    model, sae = FakeModel(), identity()
    centred = model.W_U - model.W_U.mean(1, keepdim=True)
    np.testing.assert_allclose(logit_weights(model, sae, SITE, 1), centred[1].numpy(), atol=1e-6)
    assert logit_weights(FakeModel(residual=False), sae, SITE, 1) is None
    with pytest.raises(ConfigError, match="features 0 to 11"):
        logit_weights(model, sae, SITE, 12)


def test_tokenise():
    def encode(text, add_special_tokens, verbose):
        return {"input_ids": [ord(c) % 11 for c in text]}

    class Tokenizer(SimpleNamespace):
        __call__ = staticmethod(encode)

    model = SimpleNamespace(tokenizer=Tokenizer(bos_token_id=0), n_ctx=4, name="m")
    assert tokenise(model, "ab").tolist() == [0, 97 % 11, 98 % 11]
    assert tokenise(model, "ab", bos=False).tolist() == [97 % 11, 98 % 11]
    assert tokenise(model, "a\ud800").tolist() == [0, 97 % 11, ord("?") % 11]
    with pytest.raises(TextError, match="the prompt is empty"):
        tokenise(model, "")
    with pytest.raises(TextError, match="has 5 tokens, the model reads at most 4"):
        tokenise(model, "abcd")
