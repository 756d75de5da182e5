"""``saelab codebook``: on a finite state machine, whose truth is known, and on the embedded model."""

import json

import pytest
import torch

from saelab.core.errors import ConfigError
from saelab.sae.codebook import CodeEdit
from saelab.training.code_effects import code_effects
from saelab.training.code_metrics import match_codes
from saelab.training.codebook_model import load_codebook_model
from saelab.training.tokfsm import TokFSM, TokFSMConfig, make_tokfsm
from saelab.workflows.codebook import CodebookJob, run_codebook
from tests.made import saelab

REDUCED = {"states": 25, "edges": 4, "base": 5, "digits": 2, "length": 32}


def states_at(machine: TokFSM, tokens: torch.Tensor) -> torch.Tensor:
    """For each position after BOS that ends a state: (row, position, state)."""
    states = machine.read(tokens)
    rows = torch.arange(len(tokens))[:, None].expand_as(states)
    positions = (1 + torch.arange(states.shape[1])) * machine.config.digits
    return torch.stack([rows, positions.expand_as(states), states], 2).flatten(0, 1)


def code_matches(model, machine: TokFSM, site: str, seed: int = 123):
    """Best code of each state at the position where its last digit has been read."""
    tokens = machine.sample(400, torch.Generator().manual_seed(seed))
    chosen = model.chosen(tokens)[site][:, :, 0, 0]
    where = states_at(machine, tokens)
    codes = chosen[where[:, 0], where[:, 1]]
    on = torch.nn.functional.one_hot(codes, model.codebook(site).config.codes).bool()
    return match_codes(on, torch.nn.functional.one_hot(where[:, 2], machine.config.states).bool())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tokfsm_small(tmp_path):
    """Reduced TokFSM (METHODS: attention + MLP codebooks .956 of transitions, chance .16), codes read and set."""
    out = ["--out", tmp_path / "m", "--json"]
    assert saelab("codebook", "configs/codebook-tokfsm.yaml", *out) == 0
    model, machine = load_codebook_model(tmp_path / "m"), make_tokfsm(TokFSMConfig(**REDUCED))
    metrics = json.loads((tmp_path / "m" / "manifest.json").read_text())["metrics"]
    assert metrics["chance"] == 0.16
    assert metrics["transition_accuracy"] > 0.85
    site = "blocks.0.hook_mlp_out"
    found = code_matches(model, machine, site)
    assert float(found.precision.nanmean()) > 0.5
    assert float(found.recall.nanmean()) > 0.5
    check_codes_can_be_set(model, machine, site, found.code)


def check_codes_can_be_set(model, machine, site, code_of_state):
    """Setting a state's code makes the model go on as from that state, more than another state's code does."""
    tokens = machine.sample(50, torch.Generator().manual_seed(9))[:, : 1 + 4 * machine.config.digits]
    last = machine.read(tokens)[:, -1]
    moved = 0.0
    for target in range(5):
        rows = tokens[last != target]
        edit = {site: [CodeEdit([int(code_of_state[target])], "replace", positions=[rows.shape[1] - 1])]}
        first_digits = machine.targets[target] // machine.config.base
        wanted = torch.zeros(machine.d_vocab).index_fill_(0, first_digits, 1.0).bool()
        plain, edited = (model.logits(rows, e)[:, -1].softmax(1)[:, wanted].sum(1).mean() for e in (None, edit))
        moved += float(edited - plain) / 5
    assert moved > 0.05


def a_job(**changes):
    tiny = {"states": 4, "edges": 2, "base": 2, "digits": 2, "length": 16}
    training = {"steps": 400, "rows": 32, "lr": 3e-3}
    sizes = {"n_layers": 1, "d_model": 64, "n_heads": 4}
    book = {"codes": 32, "k": 1, "dead_after_tokens": 5000}
    return CodebookJob(
        **{"tokfsm": tiny, "training": training, "new_model": sizes, "codebook": book, "eval_rows": 100, **changes}
    )


def test_a_tiny_machine_is_learned_through_codes(tmp_path):
    report = run_codebook(a_job(sites=["attention"]), tmp_path / "m")
    assert report.metrics["chance"] == 0.5
    assert report.metrics["transition_accuracy"] > 0.75
    model = load_codebook_model(tmp_path / "m")
    assert model.sites == ["blocks.0.attn.hook_z"]
    assert not (tmp_path / "m" / "checkpoint.safetensors").exists()
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["kind"] == "codebook-model"
    assert manifest["metrics"] == report.metrics
    assert manifest["provenance"]["model"] is None


def test_fine_tuning_the_embedded_model(made, tmp_path, capsys):
    text = ["--text", made / "code.txt", "--heldout", made / "code.txt", "--tokens.context", 64, "--eval_rows", 16]
    small = ["--codebook.codes", 256, "--training.steps", 40, "--training.rows", 4, "--layers", "[1]"]
    command = ["codebook", "configs/codebook.yaml", *text, *small]
    assert saelab(*command, "--out", tmp_path / "m", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    log = [json.loads(line)["loss"] for line in (tmp_path / "m" / "training.jsonl").read_text().splitlines()]
    assert metrics["loss"] < log[0]
    assert metrics["loss_before"] > 0
    assert load_codebook_model(tmp_path / "m").sites == ["blocks.1.attn.hook_z"]
    assert saelab(*command, "--out", tmp_path / "m") == 1
    assert "already exists" in capsys.readouterr().err
    assert saelab(*command, "--out", tmp_path / "m", "--resume") == 1
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_codes_of_the_embedded_model_can_be_set(tmp_path):
    """Setting the code that stands for a next token makes it likelier, and more so than random codes of its head."""
    small = ["--layers", "[3]", "--codebook.codes", 256, "--training.steps", 120, "--training.rows", 8]
    text = ["--tokens.context", 64, "--max_rows", 2000, "--eval_rows", 8]
    assert saelab("codebook", "configs/codebook.yaml", *small, *text, "--out", tmp_path / "m") == 0
    model, job = load_codebook_model(tmp_path / "m"), CodebookJob(tokens={"context": 64})
    found_on, set_in = (
        next(iter(job.model_copy(update={"text": name}).rows(model.subject).batches(n)))
        for name, n in (("stdlib:train", 256), ("stdlib:heldout", 24))
    )
    rows = set_in.tokens[set_in.keep[:, 1:48].all(1), :48]
    found = code_effects(model, (found_on.tokens, found_on.keep), rows, n_tokens=12, n_random=3)
    frame = found.to_frame()
    assert len(frame) >= 8
    assert frame["gain"].mean() > frame["control_gain"].mean() + 0.1
    assert (frame["gain"] > frame["control_gain"]).mean() > 0.6
    # what setting a code at a position does is done from there on and nowhere before
    e, at = found.effects[0], 20
    edit = {e.site: [CodeEdit([e.code], "replace", group=e.group, positions=[at])]}
    plain, edited = model.logits(rows), model.logits(rows, edit)
    assert torch.equal(plain[:, :at], edited[:, :at])
    assert not torch.allclose(plain[:, at:], edited[:, at:])


def test_layers_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"layers: 3, but .* has layers 0 to 0"):
        run_codebook(a_job(layers=[3]), tmp_path / "m")
