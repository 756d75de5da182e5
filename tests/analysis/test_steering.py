"""Steering: the identities of the edits, and their exact effect in a model that is linear after the site."""

from types import SimpleNamespace

import pytest
import torch

from saelab.analysis.steering import Decoding, Edit, Steering, generate, identities, next_token_effect
from saelab.core.errors import ConfigError
from tests.features.fakes import SITE, FakeModel, Oracle, identity

TOKENS = torch.tensor([0, 3, 7, 2, 9])
KEEP = TOKENS != 0


class Talker(FakeModel):
    """A fake model that can also write."""

    n_ctx = 64

    def __init__(self):
        super().__init__(tokenizer=SimpleNamespace(all_special_ids=[0], bos_token_id=0, eos_token_id=-1))


def random_sae(seed=3, d_in=6, d_sae=10):
    generator = torch.Generator().manual_seed(seed)
    return Oracle(torch.randn(d_in, d_sae, generator=generator), torch.randn(d_sae, d_in, generator=generator))


def logits(model, steering):
    return model.logits(TOKENS[None], replace={SITE: steering.replacement(KEEP, len(TOKENS))})[0]


@pytest.mark.parametrize("edit", [Edit(4, "add", 0.0), Edit(4, "project", 1.0), Edit(4, "cap", 1e9)])
def test_edits_that_are_identities_are_exact(edit):
    model = Talker()
    assert torch.equal(logits(model, Steering(random_sae(), SITE, (edit,))), model.logits(TOKENS[None])[0])


def test_clamp_to_the_present_value_is_the_identity():
    model, sae = Talker(), random_sae()
    h = model.embed[TOKENS]
    for row in h:
        present = float(sae.encode(row[None]).to_dense()[0, 4])
        steering = Steering(sae, SITE, (Edit(4, "clamp", present),))
        assert torch.equal(steering.edited(row[None]), row[None])


def test_clamp_sets_the_feature_and_keeps_the_error():
    sae = identity()
    h = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, 0.25]])
    new = Steering(sae, SITE, (Edit(3, "clamp", 7.0),)).edited(h)
    assert float(sae.encode(new).to_dense()[0, 3]) == 7.0
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(new[:, rest], h[:, rest])
    ablated = Steering(sae, SITE, (Edit(3, "ablate", 99.0),)).edited(h)
    assert float(ablated[0, 3]) == 0.0


def test_cap_is_idempotent_and_caps():
    sae = random_sae()
    h = Talker().embed
    steering = Steering(sae, SITE, (Edit(2, "cap", 0.1),))
    once = steering.edited(h)
    unit = sae.W_dec[2] / sae.W_dec[2].norm()
    assert float((once @ unit).max()) <= 0.1 + 1e-6
    low = (h @ unit) < 0.1
    assert torch.equal(once[low], h[low])
    torch.testing.assert_close(steering.edited(once), once, rtol=0, atol=1e-6)


def test_project_to_0_removes_the_component():
    sae = random_sae()
    new = Steering(sae, SITE, (Edit(2, "project", 0.0),)).edited(Talker().embed)
    torch.testing.assert_close(new @ sae.W_dec[2], torch.zeros(len(new)), rtol=0, atol=1e-5)


def test_adding_moves_logits_by_alpha_v_w_u():
    model, sae = Talker(), random_sae()
    steering = Steering(sae, SITE, (Edit(5, "add", 2.5),), positions="last")
    moved = logits(model, steering) - model.logits(TOKENS[None])[0]
    torch.testing.assert_close(moved[-1], 2.5 * sae.W_dec[5] @ model.W_U, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[:-1], torch.zeros_like(moved[:-1]))


def test_several_edits_refer_to_the_same_activation():
    sae = random_sae()
    h = Talker().embed[3:5]
    both = Steering(sae, SITE, (Edit(1, "clamp", 2.0), Edit(4, "clamp", 3.0))).edited(h)
    code = sae.encode(h).to_dense()
    wanted = h + (2.0 - code[:, [1]]) * sae.W_dec[1] + (3.0 - code[:, [4]]) * sae.W_dec[4]
    torch.testing.assert_close(both, wanted)


def test_special_tokens_and_other_positions_are_left_alone():
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    for positions, edited in {
        "all": [1, 2, 3, 4],
        "prompt": [1, 2],
        "generated": [3, 4],
        "last": [2],
    }.items():
        steering = Steering(random_sae(), SITE, (Edit(0, "add", 1.0),), positions=positions)
        changed = (steering.replacement(KEEP, 3)(x) != x).any(-1)[0]
        assert changed.nonzero().squeeze(1).tolist() == edited, positions


def test_same_seed_same_text_and_alpha_0_too():
    model, sae = Talker(), random_sae()
    decoding = Decoding(max_new_tokens=12, temperature=1.0, seed=5)
    plain = generate(model, TOKENS, decoding)
    assert plain.n_prompt == 5
    assert len(plain.tokens) == 17
    assert torch.equal(plain.tokens, generate(model, TOKENS, decoding).tokens)
    nothing = Steering(sae, SITE, (Edit(4, "add", 0.0),))
    assert torch.equal(plain.tokens, generate(model, TOKENS, decoding, nothing).tokens)
    other = Decoding(max_new_tokens=12, temperature=1.0, seed=6)
    assert not torch.equal(plain.tokens, generate(model, TOKENS, other).tokens)
    strong = Steering(sae, SITE, (Edit(4, "add", 500.0),))
    assert not torch.equal(plain.tokens, generate(model, TOKENS, decoding, strong).tokens)


def test_greedy_takes_the_likeliest_and_penalty_stops_repeats():
    model = Talker()
    greedy = generate(model, TOKENS, Decoding(max_new_tokens=1, temperature=0.0))
    assert int(greedy.tokens[-1]) == int(model.logits(TOKENS[None])[0, -1].argmax())
    hard = generate(model, TOKENS, Decoding(max_new_tokens=8, temperature=0.0, frequency_penalty=1e6))
    assert len(set(hard.tokens[5:].tolist())) == 8


def test_writing_ends_with_the_context_and_the_end_of_text():
    model = Talker()
    model.n_ctx = 8
    assert len(generate(model, TOKENS, Decoding(max_new_tokens=40)).tokens) == 8
    first = int(generate(model, TOKENS, Decoding(max_new_tokens=1, temperature=0.0)).tokens[-1])
    model.tokenizer.eos_token_id = first
    assert len(generate(model, TOKENS, Decoding(max_new_tokens=40, temperature=0.0)).tokens) == 5


def test_next_token_effect_sums_to_nothing():
    frame = next_token_effect(Talker(), TOKENS, KEEP, Steering(random_sae(), SITE, (Edit(1, "add", 2.0),)))
    assert frame["default"].sum() == pytest.approx(1)
    assert frame["steered"].sum() == pytest.approx(1)
    assert frame["change"].sum() == pytest.approx(0, abs=1e-9)
    assert frame["change"].abs().is_monotonic_decreasing
    assert sorted(frame["token"]) == list(range(11))


def test_identities_hold_on_a_prompt():
    found = identities(Talker(), random_sae(), SITE, TOKENS, 4)
    assert [found[name] for name in ("add 0", "clamp to current", "project 1")] == [0, 0, 0]
    assert found["cap twice"] < 1e-5


def test_wrong_edits_are_one_line():
    sae = random_sae()
    for edit, said in (
        (Edit(10), "features 0 to 9"),
        (Edit(1, "turn"), "mode is 'turn'"),
        (Edit(1, "add", float("nan")), "finite"),
    ):
        with pytest.raises(ConfigError, match=said):
            Steering(sae, SITE, (edit,))
    with pytest.raises(ConfigError, match="positions is 'here'"):
        Steering(sae, SITE, (), positions="here")
