"""A model around its codebooks, trained on TokFSM: files, exact resume, edits that do what they say."""

import functools
import os
import signal

import pytest
import torch

from saelab.core.artifacts import file_checksum
from saelab.core.config import parse_config
from saelab.core.errors import FormatError, ResumeError, SiteError, TextError
from saelab.models.subject import load_model
from saelab.sae.codebook import CodebookConfig, CodeEdit
from saelab.training import Stopped
from saelab.training.code_effects import code_effects
from saelab.training.codebook_model import add_codebooks, load_codebook_model, save_codebook_model
from saelab.training.codebooks import CodebookTraining, fit_codebooks, next_token_loss
from saelab.training.tokfsm import TokFSMConfig, make_tokfsm
from tests.models.tiny import tiny_gpt2, tiny_llama

FSM = make_tokfsm(parse_config(TokFSMConfig, {"states": 4, "edges": 2, "base": 2, "length": 10}))
SITES = ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"]


class Source:
    """Walks of a small machine, in the vocabulary of the tiny model; may stop the run at a step."""

    stop_at: int | None = None

    def batch(self, step):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        tokens = FSM.sample(8, torch.Generator().manual_seed(step))
        return tokens, tokens != FSM.bos

    def describe(self):
        return {"fsm": "small"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


def a_model(folder, sites=SITES, **config):
    settings = parse_config(CodebookConfig, {"codes": 16, "k": 1, "dead_after_tokens": 400, **config})
    return add_codebooks(load_model(str(folder)), sites, settings, seed=0)


def training(**changes):
    values = {"steps": 30, "lr": 5e-3, "checkpoint_every": 10, "revive_every": 5, "log_every": 5, **changes}
    return parse_config(CodebookTraining, values)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_codebook_for_each_head_and_one_for_the_mlp(make, tmp_path):
    model = a_model(make(tmp_path))
    assert model.sites == SITES
    assert [model.codebook(site).groups for site in SITES] == [2, 1]
    tokens = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1]])
    chosen = model.chosen(tokens)
    assert [tuple(chosen[site].shape) for site in SITES] == [(2, 4, 2, 1), (2, 4, 1, 1)]
    # what comes out is what a plain model says whose site holds the codes
    subject = load_model(str(tmp_path))
    by_hand = {site: functools.partial(lambda book, a: book(a).detach(), model.codebook(site)) for site in SITES}
    torch.testing.assert_close(model.logits(tokens), subject.logits(tokens, by_hand))
    with pytest.raises(SiteError, match=r"no codebook at 'blocks\.1\.hook_mlp_out'; did you mean"):
        model.codebook("blocks.1.hook_mlp_out")


def test_gradients_reach_codes_and_the_model_below_and_above(folder):
    model = a_model(folder).requires_grad_(True)
    tokens, keep = Source().batch(0)
    next_token_loss(model.logits(tokens, grad=True), tokens, keep).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"codebooks.0.codes", "codebooks.1.codes"} <= moved
    assert any("h.0.attn.c_attn.weight" in name for name in moved)  # straight through the codes
    assert any("h.2.mlp.c_proj.weight" in name for name in moved)


def test_training_learns_and_resumes_bit_for_bit(folder, tmp_path):
    model = a_model(folder)
    tokens, keep = Source().batch(999)
    before = float(next_token_loss(model.logits(tokens), tokens, keep))
    result = fit_codebooks(model, Source(), training(), tmp_path)
    assert float(next_token_loss(model.logits(tokens), tokens, keep)) < before - 0.5
    assert result.steps == 30
    save_codebook_model(model, tmp_path / "whole", {})
    (tmp_path / "training.jsonl").unlink()

    source = Source()
    source.stop_at = 13
    with pytest.raises(Stopped, match="after step 14 of 30"):
        fit_codebooks(a_model(folder), source, training(), tmp_path / "part")
    again = a_model(folder)
    assert fit_codebooks(again, Source(), training(), tmp_path / "part", resume=True) == result
    save_codebook_model(again, tmp_path / "again", {})
    for name in ("codebooks.safetensors", "model/model.safetensors"):
        assert file_checksum(tmp_path / "whole" / name) == file_checksum(tmp_path / "again" / name), name
    assert len((tmp_path / "part" / "training.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ResumeError, match="other settings"):
        fit_codebooks(a_model(folder), Source(), training(lr=1e-3), tmp_path / "part", resume=True)


def test_the_model_alone_can_be_left_as_it_is(folder, tmp_path):
    model = a_model(folder)
    weights = {name: p.clone() for name, p in model.plain.named_parameters()}
    codes = model.codebook(SITES[0]).codes.clone()
    fit_codebooks(model, Source(), training(steps=3, freeze_model=True), tmp_path)
    assert all(torch.equal(weights[name], p) for name, p in model.plain.named_parameters())
    assert not torch.equal(codes, model.codebook(SITES[0]).codes)


def test_save_and_load(folder, tmp_path):
    model = a_model(folder)
    save_codebook_model(model, tmp_path / "m", {"note": 1})
    loaded = load_codebook_model(tmp_path / "m")
    tokens = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    assert loaded.sites == SITES
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(FormatError):
        load_codebook_model(folder)


def test_edits_in_the_running_model(folder):
    model = a_model(folder)
    tokens = torch.tensor([[0, 1, 2, 3]])
    plain = model.logits(tokens)
    chosen = int(model.chosen(tokens)[SITES[1]][0, 2, 0, 0])
    same = model.logits(tokens, {SITES[1]: [CodeEdit([chosen], "replace", positions=[2])]})
    torch.testing.assert_close(same, plain)
    other = model.logits(tokens, {SITES[1]: [CodeEdit([(chosen + 1) % 16], "replace", positions=[2])]})
    assert torch.equal(other[:, :2], plain[:, :2])  # causal
    assert not torch.allclose(other[:, 2:], plain[:, 2:])
    off = model.logits(tokens, {SITES[1]: [CodeEdit([chosen], "disable")]})
    assert not torch.allclose(off[:, 2], plain[:, 2])


def test_generation_is_seeded(folder):
    model = a_model(folder)
    prompt = torch.tensor([[0, 1], [0, 2]])
    a, b, c = (model.generate(prompt, 5, seed=seed) for seed in (0, 0, 1))
    assert a.shape == (2, 7)
    assert torch.equal(a[:, :2], prompt)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    greedy = model.generate(prompt, 3, temperature=0)
    assert torch.equal(greedy[:, 2], model.logits(prompt)[:, -1].argmax(1))


def test_effects_of_codes_are_those_of_edits_by_hand(folder):
    model = a_model(folder)
    generator = torch.Generator().manual_seed(3)
    tokens, keep = FSM.sample(64, generator), torch.ones(64, FSM.sample(1, generator).shape[1], dtype=torch.bool)
    keep[:, 0] = False
    rows = FSM.sample(5, generator)[:, :6]
    found = code_effects(model, (tokens, keep), rows, n_tokens=2, n_random=20, least_recall=0.01, seed=1)
    assert [e.token for e in found.effects] == torch.bincount(tokens[:, 1:].flatten()).topk(2).indices.tolist()
    assert found.rows == 5
    chosen = model.chosen(tokens)
    for e in found.effects:
        on = chosen[e.site][:, 1:-1, e.group, 0] == e.code
        follows = tokens[:, 2:] == e.token
        judged = torch.arange(on.numel()).view_as(on) % 2 == 1
        assert e.precision == pytest.approx(float((on & follows & judged).sum() / (on & judged).sum()))
        assert e.recall == pytest.approx(float((on & follows & judged).sum() / (follows & judged).sum()))

        def of(code, e=e):
            edit = {e.site: [CodeEdit([code], "replace", group=e.group, positions=[5])]}
            return float(model.logits(rows, edit)[:, -1].log_softmax(1)[:, e.token].mean())

        assert e.before == pytest.approx(float(model.logits(rows)[:, -1].log_softmax(1)[:, e.token].mean()), abs=1e-5)
        assert e.after == pytest.approx(of(e.code), abs=1e-5)
        others = [of(code) for code in range(16) if code != e.code]  # 20 random ones were asked for, there are 15
        assert e.control == pytest.approx(sum(others) / 15, abs=1e-5)
        assert e.gain == e.after - e.before
    assert {"token", "code", "gain", "control_gain"} <= set(found.to_frame().columns)
    with pytest.raises(TextError, match="give more text"):
        code_effects(model, (tokens[:1], keep[:1]), rows)
