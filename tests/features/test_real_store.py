"""The feature store of a real model, real text and a real (untrained) SAE."""

import inspect
import json
import textwrap

import numpy as np
import pytest
import torch

from saelab.features.build import build_features


@pytest.fixture(scope="module")
def parts():
    from saelab.core.assets import EMBEDDED_MODEL
    from saelab.models.subject import load_model
    from saelab.models.text import open_text
    from saelab.models.tokens import TokenRows, TokensConfig
    from saelab.sae.registry import build_sae
    from saelab.sae.topk import TopKConfig

    model = load_model(EMBEDDED_MODEL)
    site = f"blocks.{model.n_layers // 2}.hook_resid_post"
    rows = TokenRows(
        model.tokenizer,
        open_text([inspect.getsource(textwrap), inspect.getsource(json.decoder)]),
        TokensConfig(context=64),
        model.n_ctx,
    )
    sae = build_sae(TopKConfig(d_in=model.width(site), d_sae=256, k=8), seed=0).eval().requires_grad_(False)
    return model, sae, rows, site


def test_store_says_what_the_model_and_the_sae_say(parts, tmp_path):
    model, sae, rows, site = parts
    store = build_features(model, sae, rows, site, tmp_path / "f", max_tokens=1000, rows_per_batch=5)
    batch = next(rows.batches(store.n_rows))
    flat, keep = batch.tokens.flatten(), batch.keep.flatten()
    assert store.token_ids(0, store.n_tokens).tolist() == flat.tolist()
    x = model.read(batch.tokens, [site])[site].flatten(0, 1)
    dense = sae.encode(x).to_dense()
    dense[~keep] = 0
    torch.testing.assert_close(store.activations(0, store.n_tokens).to_dense(), dense, rtol=1e-4, atol=1e-4)
    special = set(model.tokenizer.all_special_ids)
    words = [i for i in flat[:64].tolist() if i not in special]
    assert store.vocabulary.text(words) == model.tokenizer.decode(words, clean_up_tokenization_spaces=False)
    assert store.manifest["rows"]["context"] == 64
    assert store.column("logit_top").shape == (256, 10)


def test_logit_weights_are_the_models_own(parts, tmp_path):
    """Adding a multiple of a decoder row before the final norm moves the logits (to first order) as the store says."""
    model, sae, rows, site = parts
    store = build_features(model, sae, rows, site, tmp_path / "f", max_tokens=100)
    tokens = next(rows.batches(1)).tokens[:, :8]
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    feature = int(np.argmax(store.column("count")))
    step = 1e-2
    moved = model.logits(tokens, replace={last: lambda x: x + step * sae.W_dec[feature]})
    change = (moved - model.logits(tokens))[0, -1]
    top, bottom = (store.column(f"logit_{end}_ids")[feature].tolist() for end in ("top", "bottom"))
    # The norm also rescales the old residual a little: orders survive, exact values do not.
    assert float(change[top].mean()) > float(change.mean()) + 2 * float(change.std())
    assert float(change[bottom].mean()) < float(change.mean()) - 2 * float(change.std())
