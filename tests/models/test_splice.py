"""An SAE in a running model: what it changes, what it leaves, and every way of running sees it."""

import pytest
import torch

from saelab.core.errors import SiteError
from saelab.models.subject import load_model
from saelab.sae import TopKConfig, TopKSAE
from saelab.sae.folder import load_sae, save_sae
from tests.models.tiny import CONTEXT, VOCAB, WIDTH, tiny_gpt2, tiny_llama, tokenizer_for

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tmp_path_factory):
    made = (tiny_gpt2 if request.param == "gpt2" else tiny_llama)(tmp_path_factory.mktemp("model"))
    tokenizer_for(made)
    return load_model(str(made))


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB, (2, CONTEXT - 2), generator=torch.Generator().manual_seed(1))


def an_sae(width=WIDTH, site=SITE):
    sae = TopKSAE(TopKConfig(d_in=width, d_sae=40, k=4), seed=3)
    sae.site = site
    return sae


class Bias:
    """Reconstructs everything as one vector."""

    def __init__(self):
        self.bias = torch.zeros(WIDTH, requires_grad=True)

    def encode(self, x):
        return len(x)

    def decode(self, code):
        return self.bias.expand(code, -1)


@pytest.mark.parametrize("site", [SITE, "blocks.1.attn.hook_z", "blocks.1.attn.hook_q"])
def test_logits_are_those_of_a_replaced_site(model, tokens, site):
    sae = an_sae(model.width(site))
    expected = model.logits(tokens, {site: lambda x: sae(x.flatten(0, 1)).view_as(x)})
    clean = model.logits(tokens)
    with model.splice(sae, site) as seen:
        assert torch.allclose(model.logits(tokens), expected, atol=1e-5)
        assert torch.allclose(model.bridge(tokens), expected, atol=1e-4)
        assert torch.allclose(seen.x_hat[site], sae(seen.x[site].flatten(0, 1)).view_as(seen.x[site]), atol=1e-6)
        assert seen.code[site].n_tokens == tokens.numel()
    assert torch.equal(model.logits(tokens), clean)
    assert torch.allclose(model.bridge(tokens), clean, atol=1e-4)
    assert not torch.allclose(expected, clean, atol=1e-6)


def test_with_its_error_nothing_changes_but_the_gradient(model, tokens):
    sae = Bias()
    clean = model.logits(tokens)
    with model.splice(sae, SITE, keep_error=True):
        spliced = model.logits(tokens, grad=True)
    assert torch.allclose(spliced, clean, atol=1e-4)
    direction = torch.randn(spliced.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((spliced * direction).sum(), sae.bias)[0]
    step = torch.nn.functional.one_hot(torch.tensor(2), WIDTH) * 1e-2
    up, down = ((model.logits(tokens, {SITE: lambda x, s=s: x + s * step}) * direction).sum() for s in (1, -1))
    assert float(found[2]) == pytest.approx(float(up - down) / 2e-2, rel=2e-2)


def test_generation_sees_it(model, tokens):
    sae = an_sae()
    with torch.no_grad():
        sae.b_dec += 3.0
    with model.splice(sae):
        plain = model.plain.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        bridged = model.bridge.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False, verbose=False)
        step_by_step = tokens[:1, :4]
        for _ in range(3):
            following = model.logits(step_by_step)[:, -1].argmax(-1, keepdim=True)
            step_by_step = torch.cat([step_by_step, following], 1)
    assert plain.tolist() == step_by_step.tolist() == bridged.tolist()


def test_later_sites_are_read_behind_it(model, tokens):
    later = "blocks.2.hook_resid_post"
    before = model.read(tokens, [later])[later]
    with model.splice(an_sae()):
        assert not torch.allclose(model.read(tokens, [later])[later], before, atol=1e-3)


def test_two_at_once(model, tokens):
    other = "blocks.0.hook_mlp_out"
    with model.splice({SITE: an_sae(), other: an_sae(site=other)}) as seen:
        model.logits(tokens)
    assert set(seen.code) == {SITE, other}


def test_an_sae_that_was_saved_knows_its_site(model, tokens, tmp_path):
    save_sae(an_sae(), tmp_path / "sae", {"provenance": {"site": SITE}})
    with model.splice(load_sae(tmp_path / "sae")) as seen:
        model.logits(tokens)
    assert set(seen.code) == {SITE}


def test_what_cannot_be_spliced_is_said(model):
    with pytest.raises(SiteError, match="does not say where it belongs"), model.splice(an_sae(site=None)):
        pass
    with pytest.raises(SiteError, match="give one or the other"), model.splice({SITE: an_sae()}, SITE):
        pass
    transcoder = an_sae()
    transcoder.target_site = "blocks.1.hook_mlp_out"
    with pytest.raises(SiteError, match=r"a transcoder reads blocks\.1\.hook_resid_post and writes"):
        model.splice(transcoder).__enter__()
