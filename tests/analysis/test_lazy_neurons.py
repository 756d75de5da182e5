import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saelab.analysis.lazy_neurons import SHARES, UnitCounts, lazy_neurons, neuron_sites
from saelab.analysis.lazy_report import report_html
from saelab.analysis.sparsified import compare_with_sae, keep_random, keep_top, top_k_curve
from saelab.core.errors import ConfigError, SiteError
from tests.features.fakes import FakeRows, Oracle, random_rows


class MlpModel:
    """x_t = E[token]; h = relu(x W_in + b_in); out = h W_out + b_out; logits = (x + out) W_U. One block."""

    name, fingerprint = "mlp", "m" * 8
    POST, OUT = "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"

    def __init__(self, width=64, d=6, d_vocab=11, b_in=0.0, b_out=0.3):
        g = torch.Generator().manual_seed(0)
        self.embed, self.W_in = torch.randn(d_vocab, d, generator=g), torch.randn(d, width, generator=g)
        self.W_out = torch.randn(width, d, generator=g) / width**0.5
        self.W_U = torch.randn(d, d_vocab, generator=g)
        self.b_in, self.b_out, self.d_vocab, self.tokenizer = b_in, b_out, d_vocab, None
        self.widths = {self.POST: width, self.OUT: d}

    def sites(self):
        return list(self.widths)

    def layer(self, site):
        return 0

    def width(self, site):
        return self.widths[site]

    def _parts(self, tokens, replace):
        x = self.embed[tokens]
        h = replace.get(self.POST, lambda v: v)((x @ self.W_in + self.b_in).relu())
        out = replace.get(self.OUT, lambda v: v)(h @ self.W_out + self.b_out)
        return {self.POST: h, self.OUT: out, "x": x}

    def read(self, tokens, sites):
        parts = self._parts(tokens, {})
        return {site: parts[site] for site in sites}

    def logits(self, tokens, replace=None):
        parts = self._parts(tokens, replace or {})
        return (parts["x"] + parts[self.OUT]) @ self.W_U


def counted(h, threshold=0.0):
    counts = UnitCounts(h.shape[1], threshold)
    for part in h.split(137):
        counts.update(part)
    return counts.result("h", 0)


@pytest.mark.parametrize(("mean", "share"), [(0.0, 0.5), (-1.645, 0.05)])
def test_lazy_fraction_gaussian(mean, share):
    h = (torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)) + mean).relu()
    found = counted(h)
    margin = 4 * (share * (1 - share) / h.numel()) ** 0.5
    assert found.positive == pytest.approx(share, abs=margin)
    assert found.nonzero == found.positive == found.above
    assert np.mean(found.rates) == pytest.approx(share, abs=margin)
    assert found.rates == sorted(found.rates, reverse=True)


def test_threshold_effective_number_and_energy_by_hand():
    h = torch.tensor([[3.0, 0, 0, 0], [1, -1, 1, 1], [0, 0, 0, 0]])
    found = counted(h, threshold=2.0)
    assert found.positive == pytest.approx(4 / 12)
    assert found.nonzero == pytest.approx(5 / 12)
    assert found.above == pytest.approx(1 / 12)
    assert found.effective == pytest.approx((1 + 4 + 0) / 3)
    assert found.rms == pytest.approx((13 / 12) ** 0.5)
    assert found.never == 0.75
    half = found.energy[SHARES.index(0.5)]
    assert half == pytest.approx((1 + 0.5 + 1) / 3)


def test_keep_top_is_the_identity_from_the_width_on_and_nothing_at_zero():
    h = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_top(h, 7), h)
    assert torch.equal(keep_top(h, 99), h)
    assert not keep_top(h, 0).any()
    two = keep_top(h, 2)
    assert (two != 0).sum(1).tolist() == [2] * 5
    assert bool((two.abs().sum(1) == h.abs().topk(2, 1).values.sum(1)).all())
    assert (keep_random(h, 3, torch.Generator().manual_seed(1)) != 0).sum(1).tolist() == [3] * 5


def test_no_neuron_leaves_the_output_bias():
    model, rows = MlpModel(), random_rows()
    (point,) = top_k_curve(model, rows, [model.POST], [0], max_tokens=None)
    logits = (model.embed[rows.tokens] + 0.3) @ model.W_U
    bos = model.logits(rows.tokens)[:, :1]  # BOS is not a kept position and stays as it is
    log_p = torch.cat([bos, logits[:, 1:]], 1)[:, :-1].log_softmax(-1)
    expected = -log_p.gather(-1, rows.tokens[:, 1:, None]).mean()
    assert point.ce == pytest.approx(float(expected), abs=1e-5)


def test_report_of_a_model_with_a_known_share():
    """Half of the neurons can never fire: their bias is far below any input."""
    model = MlpModel(b_in=torch.cat([torch.zeros(32), torch.full((32,), -1e3)]))
    found = lazy_neurons(model, random_rows(n_rows=30), top_k=[0, 8, 64])
    (layer,) = found.layers
    assert layer.never >= 0.5
    assert layer.positive == pytest.approx(0.25, abs=0.05)
    assert found.positive == layer.positive
    by_k = {p.k: p for p in found.curve}
    assert by_k[64].ce == by_k[64].ce_random
    assert by_k[8].ce != by_k[8].ce_random  # (the tokens are random: neither is a better model)
    assert by_k[0].ce == by_k[0].ce_random
    assert list(found.to_frame()["name"]) == [model.POST]
    assert found.plot("curve").data
    with pytest.raises(ConfigError, match="no figure 'curves'"):
        found.plot("curves")
    page = report_html(found)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_an_exact_sae_beats_neurons_at_equal_l0():
    """The SAE knows the outputs the model can make: one feature per token rebuilds them, one neuron does not."""
    model, rows = MlpModel(), random_rows(n_rows=20)
    outs = model.read(torch.arange(11)[None], [model.OUT])[model.OUT][0]
    unit = outs / outs.norm(dim=1, keepdim=True)

    class Nearest(Oracle):
        def encode(self, x):
            from saelab.core.code import SparseCode

            best = torch.cdist(x, outs).argmin(1, keepdim=True)
            return SparseCode.from_topk(best, outs.norm(dim=1)[best], 11)

    comparison, code = compare_with_sae(model, Nearest(unit.T, unit), rows, model.OUT)
    assert comparison.l0 == 1
    assert comparison.fvu_sae == pytest.approx(0, abs=1e-6)
    assert comparison.ce_sae == pytest.approx(comparison.ce_clean, abs=1e-5)
    assert comparison.points[0].k == 1
    assert comparison.points[0].fvu > 0.1
    assert comparison.points[-1].k == 16
    assert comparison.same_object
    assert code.positive == pytest.approx(1 / 11)
    assert code.effective == pytest.approx(1)


def test_padding_is_not_counted():
    model = MlpModel()
    rows = random_rows(n_rows=10)
    padded = FakeRows(torch.cat([rows.tokens, torch.ones(10, 5, dtype=torch.int64)], 1))
    padded.keep[:, -5:] = False
    a, b = (lazy_neurons(model, r, top_k=()) for r in (rows, padded))
    assert a.n_tokens == b.n_tokens == 80
    assert a.layers == b.layers


def test_bad_input():
    with pytest.raises(SiteError, match=r"fake has no MLP activations \(no site blocks.N.mlp.hook_post\)"):
        neuron_sites(SimpleNamespace(name="fake", sites=lambda: ["blocks.0.hook_resid_post"]))
    with pytest.raises(ConfigError, match="epsilon is -1"):
        lazy_neurons(MlpModel(), random_rows(), epsilon=-1.0)
    with pytest.raises(ConfigError, match="top_k holds -2"):
        lazy_neurons(MlpModel(), random_rows(), top_k=[-2, 4])
