from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saelab.features import weights
from saelab.features.weights import weight_columns
from tests.features.fakes import SITE, FakeModel, Oracle


def dictionary(d_sae=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Oracle(torch.randn(6, d_sae, generator=generator), torch.randn(d_sae, 6, generator=generator))


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_columns_equal_dense_algebra(monkeypatch, block):
    monkeypatch.setattr(weights, "BLOCK", block)
    model, sae = FakeModel(), dictionary()
    columns = weight_columns(model, sae, SITE, None)
    W = sae.W_dec.double().numpy()
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(23)
    assert columns["nearest"].tolist() == cosine.argmax(1).tolist()
    np.testing.assert_allclose(columns["nearest_cosine"], cosine.max(1), rtol=1e-5)
    np.testing.assert_allclose(columns["decoder_norm"], np.linalg.norm(W, axis=1), rtol=1e-6)
    E = sae.W_enc.double().numpy().T
    expected = (E * W).sum(1) / np.linalg.norm(E, axis=1) / np.linalg.norm(W, axis=1)
    np.testing.assert_allclose(columns["encoder_decoder_cosine"], expected, rtol=1e-4)
    logits = W @ model.W_U.double().numpy()
    logits -= logits.mean(1, keepdims=True)
    assert columns["logit_top_ids"].tolist() == np.argsort(-logits, axis=1)[:, :10].tolist()
    assert columns["logit_bottom_ids"].tolist() == np.argsort(logits, axis=1)[:, :10].tolist()
    np.testing.assert_allclose(columns["logit_top"], -np.sort(-logits, axis=1)[:, :10], rtol=1e-4, atol=1e-5)


def test_final_layer_norm_is_folded_in():
    """With LayerNorm, a constant added to a decoder row changes no logit weight; norm weight 0 silences a dimension."""
    model, sae = FakeModel(), dictionary()
    scale = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    model.bridge.ln_final = SimpleNamespace(weight=scale, bias=torch.zeros(6))
    before = weight_columns(model, sae, SITE, False)["logit_top"]
    sae.W_dec = sae.W_dec + 3.0
    np.testing.assert_allclose(weight_columns(model, sae, SITE, False)["logit_top"], before, atol=1e-4)
    centred = sae.W_dec - sae.W_dec.mean(1, keepdim=True)
    logits = (centred * scale) @ model.W_U
    logits -= logits.mean(1, keepdim=True)
    np.testing.assert_allclose(before, logits.topk(10).values, atol=1e-4)


def test_no_logit_weights_outside_the_residual_stream():
    model = FakeModel()
    assert "logit_top" not in weight_columns(model, dictionary(), "blocks.0.attn.hook_z", None)
    del model.bridge
    assert "logit_top" not in weight_columns(model, dictionary(), SITE, None)


def test_neighbours_can_be_left_out_and_one_feature_has_none():
    assert "nearest" not in weight_columns(FakeModel(), dictionary(), SITE, False)
    assert weight_columns(FakeModel(), dictionary(1), SITE, None)["nearest"].tolist() == [-1]
