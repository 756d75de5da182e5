"""The bottleneck: what is chosen, what comes out, where gradients go, edits, dead codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.config import parse_config
from saelab.core.errors import ActivationError, ConfigError
from saelab.sae.codebook import Codebook, CodebookConfig, CodeEdit

B, T, D, K = 3, 5, 8, 12


def codebook(groups=1, seed=0, **config) -> Codebook:
    return Codebook(parse_config(CodebookConfig, {"codes": K, **config}), D, groups, seed).double().eval()


def draw(seed=0, b=B, t=T):
    return torch.randn(b, t, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def normalized(a, groups=1):
    parts = a.unflatten(-1, (groups, -1))
    centred = parts - parts.mean(-1, keepdim=True)
    return centred / (parts.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_output_is_the_mean_of_the_nearest_codes(groups, k):
    book, a = codebook(groups, k=k), draw()
    n = normalized(a, groups)
    unit = book.codes / book.codes.norm(dim=2, keepdim=True)
    indices = torch.einsum("btgd,gcd->btgc", n, unit).topk(k).indices
    expected = torch.stack([book.codes[g][indices[:, :, g]].mean(2) for g in range(groups)], 2).flatten(2)
    torch.testing.assert_close(book(a), expected)
    assert torch.equal(book.chosen.sort(3).values, indices.sort(3).values)


def test_euclidean_takes_the_nearest():
    book, a = codebook(similarity="euclidean"), draw()
    with torch.no_grad():
        book.codes[0, :6] *= 3
    nearest = torch.cdist(normalized(a)[:, :, 0].reshape(-1, D), book.codes[0]).argmin(1)
    book(a)
    assert torch.equal(book.chosen.flatten(), nearest)


def test_all_orthonormal_codes_give_the_mean_of_their_sum():
    """k = K: everything is chosen, the output is constant, 1/K times the sum."""
    book = codebook(codes=D, k=D)
    with torch.no_grad():
        book.codes.copy_(torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q[None])
    out = book(draw())
    torch.testing.assert_close(out, (book.codes[0].sum(0) / D).expand(B, T, D))
    assert float(out.detach()[0, 0].norm()) == pytest.approx(D**-0.5)


def test_the_scale_of_the_activation_is_lost():
    book, a = codebook(), draw()
    torch.testing.assert_close(book(100 * a), book(a))
    torch.testing.assert_close(book(a + 7), book(a))


@pytest.mark.parametrize("groups", [1, 2])
def test_codebook_ste_gradient(groups):
    """The input gets the task's gradient as if the codes were not there; codes get it, and the reconstruction's."""
    book, a = codebook(groups, k=2), draw().requires_grad_()
    weight = draw(seed=1)
    (gradient,) = torch.autograd.grad((book(a) * weight).sum(), a, retain_graph=True)
    n = torch.nn.functional.layer_norm(a.unflatten(-1, (groups, -1)), (D // groups,)).flatten(2)
    (identity,) = torch.autograd.grad((n * weight).sum(), a)
    torch.testing.assert_close(gradient, identity)

    out = book(a)
    (task,) = torch.autograd.grad((out * weight).sum(), book.codes, retain_graph=True)
    (own,) = torch.autograd.grad(book.loss, book.codes)
    error = 2 * (out - n).detach().unflatten(-1, (groups, -1)) / (B * T)
    for given_gradient, found in ((weight.unflatten(-1, (groups, -1)), task), (error, own)):
        expected = torch.zeros_like(book.codes)
        for group in range(groups):
            for j in range(2):
                chosen = book.chosen[:, :, group, j].flatten()
                expected[group].index_add_(0, chosen, given_gradient[:, :, group].reshape(-1, D // groups) / 2)
        torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(book(a.detach().requires_grad_()).sum() * 0 + book.loss, book.codes)[0].abs().sum() > 0


def test_variants_of_the_backward_pass():
    a = draw().requires_grad_()
    book = codebook(gradient="vqvae")
    task = (book(a) * draw(seed=1)).sum()
    assert torch.autograd.grad(task, book.codes, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(book.loss, a)[0].abs().sum() > 0  # the commitment
    book = codebook(gradient="none")
    book(a)
    assert float(book.loss) == 0


def test_reconstruction_loss_does_not_pull_the_input():
    book, a = codebook(), draw().requires_grad_()
    book(a)
    assert torch.autograd.grad(book.loss, a, allow_unused=True)[0] is None


def test_disabling_the_chosen_code_changes_exactly_that_slot():
    book, a = codebook(2, k=1), draw()
    before, chosen = book(a).detach(), book.chosen
    code = int(chosen[0, 1, 1, 0])
    after = book(a, [CodeEdit([code], "disable", group=1)]).detach()
    touched = chosen[:, :, 1, 0] == code
    same = before.unflatten(-1, (2, -1)) == after.unflatten(-1, (2, -1))
    assert same[:, :, 0].all()
    assert same[~touched].all()
    assert not same[touched][:, 1].all(1).any()
    assert (book.chosen[:, :, 1] != code).all()


def test_replace_and_add_at_positions():
    book, a = codebook(2, k=2), draw()
    plain = book(a).detach().unflatten(-1, (2, -1))
    replaced = book(a, [CodeEdit([3], "replace", group=1, positions=[-1])]).detach().unflatten(-1, (2, -1))
    torch.testing.assert_close(replaced[:, -1, 1], book.codes[1, 3].expand(B, -1))
    assert torch.equal(replaced[:, :-1], plain[:, :-1])
    assert torch.equal(replaced[:, -1, 0], plain[:, -1, 0])
    two = book(a, [CodeEdit([3, 4], "replace", group=0)]).detach().unflatten(-1, (2, -1))
    torch.testing.assert_close(two[:, :, 0], ((book.codes[0, 3] + book.codes[0, 4]) / 2).expand(B, T, -1))
    added = book(a, [CodeEdit([5], "add", group=0, positions=[0, 2, 99])]).detach().unflatten(-1, (2, -1))
    torch.testing.assert_close((added - plain)[:, [0, 2], 0], (book.codes[0, 5] / 2).expand(B, 2, -1))
    assert torch.equal(added[:, [1, 3, 4]], plain[:, [1, 3, 4]])


@pytest.mark.parametrize("edit", [CodeEdit([K]), CodeEdit([-1]), CodeEdit([]), CodeEdit([0], group=1)])
def test_edits_of_codes_that_do_not_exist(edit):
    with pytest.raises(ConfigError, match="an edit names"):
        codebook()(draw(), [edit])


def test_disabling_too_many():
    with pytest.raises(ConfigError, match="must be left to choose"):
        codebook(k=2)(draw(), [CodeEdit(range(K - 1), "disable")])


def test_dead_codes_move_to_activations():
    book = codebook(2, dead_after_tokens=2 * B * T, noise=0.0).train()
    for seed in range(2):
        book(draw(seed))
    dead = book.unused >= 2 * B * T
    assert 0 < int(dead.sum()) < 2 * K
    before = book.codes.detach().clone()
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[1, 2] = True
    assert book.revive(draw(9), keep, torch.Generator().manual_seed(0)) == int(dead.sum())
    assert torch.equal(book.codes[~dead], before[~dead])
    for group in range(2):
        there = normalized(draw(9), 2)[1, 2, group]
        torch.testing.assert_close(book.codes[group, dead[group]], there.expand(int(dead[group].sum()), -1))
    assert (book.unused[dead] == 0).all()
    book.eval()
    counts = book.unused.clone()
    book(draw(3))
    assert torch.equal(book.unused, counts)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 4), t=st.integers(1, 6), k=st.integers(1, K), seed=st.integers(0, 99))
def test_rows_and_positions_are_independent(b, t, k, seed):
    book, a = codebook(2, k=k), draw(seed, b, t)
    whole = book(a).detach()
    torch.testing.assert_close(torch.stack([book(row[None]).detach()[0] for row in a]), whole)
    torch.testing.assert_close(book(a.flip(1)).detach().flip(1), whole)


def test_wrong_shapes_are_one_line():
    with pytest.raises(ConfigError, match="does not fall into 3 heads"):
        Codebook(CodebookConfig(), D, 3)
    with pytest.raises(ActivationError, match="are 4 wide, this codebook was made for 8"):
        codebook()(torch.zeros(1, 2, 4))
    with pytest.raises(ConfigError, match="more than codes"):
        parse_config(CodebookConfig, {"codes": 2, "k": 3})
