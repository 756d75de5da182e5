"""Attention-output tools: identities on multi-head and grouped-query models, and planted heads."""

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.attention import (
    attention_layer,
    constant,
    head_activation,
    head_reports,
    head_weights,
    layer_states,
    prefix_induction,
    prefix_kind,
    source_attribution,
    top_sources,
)
from saelab.analysis.circuits.direct import direct_attribution
from saelab.analysis.circuits.tree import TreeBuilder
from saelab.core.errors import SiteError
from saelab.sae.topk import TopKConfig, TopKSAE
from tests.analysis.circuits.conftest import random_batch
from tests.analysis.circuits.test_attribution import transcoders


def attention_sae(parts, seed=0):
    width = parts.n_heads * parts.d_head
    sae = TopKSAE(TopKConfig(d_in=width, d_sae=20, k=4, input_scale=1.3), seed=seed)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return sae.requires_grad_(False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_source_attribution_sums_to_the_pre_activation(tiny, name):
    parts, layer, feature = tiny(name), 1, 7
    tokens = random_batch(parts.model).clean
    sae, state = attention_sae(parts), layer_states(parts, tokens)[layer]
    site = f"blocks.{layer}.attn.hook_z"
    torch.testing.assert_close(state.z, parts.model.read(tokens, site)[site], atol=1e-4, rtol=1e-4)
    scaled = state.z.flatten(0, 1) * sae.input_scale - sae.b_dec
    expected = (scaled @ sae.W_enc + sae.b_enc)[:, feature].view(tokens.shape)
    terms = source_attribution(state, sae, feature)
    torch.testing.assert_close(terms.sum((0, 3)) + constant(sae, feature), expected, atol=1e-4, rtol=1e-4)
    by_head = head_activation(state, sae, feature, parts.n_heads)
    torch.testing.assert_close(by_head.permute(2, 0, 1), terms.sum(3), atol=1e-4, rtol=1e-4)
    frame = top_sources(terms, 0, 3)
    assert frame["term"].sum() == pytest.approx(float(terms[:, 0, 3].sum()), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tree_sums_at_every_level(tiny, name):
    parts = tiny(name)
    tokens = torch.tensor([[1, 5, 2, 7, 3]])
    given = transcoders(parts)
    for mlps in ({}, given):
        builder = TreeBuilder(
            parts, tokens, {0: attention_sae(parts), 2: attention_sae(parts, 1)}, mlps, n_parts=20, n_sources=3
        )
        tree = builder.latent(2, 4, 7, depth=3)
        stack, checked = [tree], 0
        while stack:
            node = stack.pop()
            if node.children:
                assert sum(c.value for c in node.children) == pytest.approx(node.total, abs=2e-4)
                checked += 1
            stack += node.children
        assert checked >= 3
        assert any("latent" in line for line in tree.lines()[1:])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_direct_terms_sum_to_the_logit_difference(tiny, name):
    parts = tiny(name)
    batch = random_batch(parts.model)
    found = direct_attribution(parts, batch.clean, batch)
    logits = parts.model.logits(batch.clean)[torch.arange(len(batch)), batch.readout]
    expected = (logits.gather(1, batch.right) - logits.gather(1, batch.wrong))[:, 0]
    torch.testing.assert_close(found.total, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.writers.sum(0) + found.constant, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.sources.sum(2), found.writers[list(found.graph.heads)], atol=1e-3, rtol=1e-3)


def test_the_induction_latent_reads_the_token_after_the_earlier_copy(known):
    """hand-induction: a latent that reads "answer = token 5" of head 1.0 gets all it has from one place."""
    parts = known("hand-induction")
    tokens = torch.tensor([[0, 3, 5, 8, 2, 3]])
    sae = attention_sae(parts)
    with torch.no_grad():
        sae.w_enc_t.zero_()
        sae.w_enc_t[0, 5] = 1.0  # head 0 of layer 1, coordinate 5 of its value
    terms = source_attribution(layer_states(parts, tokens)[1], sae, 0)[:, 0, 5]
    share = terms[0, 2] / terms.abs().sum()
    assert float(share) >= 0.99


def test_head_weights_and_reports(tiny):
    parts = tiny("gpt2")
    sae = attention_sae(parts)
    with torch.no_grad():
        sae.W_dec[3, parts.d_head :] = 0
    shares = head_weights(sae, parts.n_heads)
    torch.testing.assert_close(shares.sum(1), torch.ones(20))
    assert float(shares[3, 0]) == 1
    same = head_reports(sae, parts.n_heads, {i: {1, 2} for i in range(20)}, n=3)
    assert [r.similarity for r in same] == [1.0] * parts.n_heads
    assert 3 in same[0].features
    apart = head_reports(sae, parts.n_heads, {i: {i} for i in range(20)}, n=3)
    assert [r.similarity for r in apart] == [0.0] * parts.n_heads


def test_prefix_induction_of_a_hand_set_head(known):
    parts = known("hand-induction")
    scores = prefix_induction(parts, longest=3, length=12, rows=8, first=torch.zeros(1, dtype=torch.int64))
    assert prefix_kind(scores[1, 0]) == "short"
    assert float(scores[1, 0].min()) > 0.99
    assert prefix_kind(torch.tensor([0.05, 0.6, 0.8])) == "long"
    assert prefix_kind(torch.tensor([0.05, 0.1, 0.1])) == "none"
    assert np.isfinite(scores.numpy()).all()


def test_other_sites_are_refused():
    assert attention_layer("blocks.3.attn.hook_z") == 3
    with pytest.raises(SiteError, match="hook_z"):
        attention_layer("blocks.3.hook_resid_post")
