"""Core neurons: all of them give the model itself, fewer give exactly what zeroing the others gives."""

import json

import pytest
import torch

from saelab.analysis.core_neurons import core_study
from saelab.analysis.lazy_neurons import neuron_sites
from saelab.core.errors import ConfigError, SiteError, TextError
from saelab.models.subject import load_model
from saelab.sparsity.core_neurons import CoreConfig, core_cost, core_neurons, require_whole, running_core
from saelab.workflows.harvest import HarvestJob, run_harvest
from tests.made import saelab
from tests.models.tiny import CONTEXT, tiny_gpt2, tiny_llama, tokenizer_for
from tests.sparsity.test_sparsify import Rows

PREFIX = 4
EARLY, SITE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    made = (tiny_gpt2 if request.param == "gpt2" else tiny_llama)(tmp_path_factory.mktemp("model"))
    tokenizer_for(made)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(0, 22, (3000,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join("abcdefghijklmnopqrstuv"[i] for i in letters))
    return path


def config(**keys):
    return CoreConfig.model_validate({"alpha": 0.25, "beta": 0.5, "prefix": PREFIX, "first_layer": 0, **keys})


def test_the_neurons_that_are_core_most_often_are_chosen():
    h = torch.zeros(5, 8)
    h[:, 2] = torch.tensor([9.0, 9, 9, 0, 0])  # three times among the strongest
    h[:, 5] = torch.tensor([-8.0, -8, 0, -8, -8])  # four times: magnitude counts
    h[:, 7] = torch.tensor([0.0, 0, 0, 0, 100])  # once, though by far the largest
    assert core_neurons(h, alpha=1 / 4, beta=1 / 8).tolist() == [5]
    assert core_neurons(h, alpha=1 / 4, beta=1 / 4).tolist() == [2, 5]
    assert len(core_neurons(torch.rand(3, 10), 0.2, 0.01)) == 1


def test_all_neurons_are_the_model_itself_and_afterwards_it_is_as_before(folder):
    model, tokens = load_model(str(folder)), Rows().tokens
    before = model.logits(tokens)
    with running_core(model, config(beta=1.0)):
        assert torch.allclose(model.logits(tokens), before, atol=1e-5)
    with running_core(model, config()):
        assert not torch.allclose(model.logits(tokens), before, atol=1e-2)
    assert torch.equal(model.logits(tokens), before)


def test_core_neurons_are_what_zeroing_the_others_gives(folder):
    model, tokens = load_model(str(folder)), Rows().tokens

    def zero_others(h):
        h = h.clone()
        for row in h:
            core = core_neurons(row[:PREFIX], 0.25, 0.5)
            gone = torch.ones(h.shape[2], dtype=torch.bool)
            gone[core] = False
            row[PREFIX:, gone] = 0
        return h

    sites = list(neuron_sites(model))
    expected = model.logits(tokens, replace=dict.fromkeys(sites, zero_others))
    with running_core(model, config()):
        found = model.logits(tokens)
        assert torch.allclose(found, expected, atol=1e-4)
        assert torch.equal(found, model.logits(tokens))  # nothing of one run is left in the next
    later = dict.fromkeys(sites[1:], zero_others)
    with running_core(model, config(first_layer=1)):
        assert torch.allclose(model.logits(tokens), model.logits(tokens))
        seen = model.read(tokens, ["blocks.0.hook_resid_post", SITE])
    assert torch.equal(
        seen["blocks.0.hook_resid_post"], model.read(tokens, "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"]
    )
    got = {}
    model.logits(tokens, replace={**later, SITE: lambda x: got.setdefault("x", x)})
    assert torch.allclose(seen[SITE], got["x"], atol=1e-4)


def test_short_rows_run_whole_and_cost_counts_what_comes_after(folder):
    model, rows = load_model(str(folder)), Rows()
    short = rows.tokens[:, :PREFIX]
    before = model.logits(short)
    with running_core(model, config()):
        assert torch.equal(model.logits(short), before)
    cost = core_cost(model, config(), rows.batches(8))
    assert cost.tokens == len(rows.tokens) * (CONTEXT - PREFIX - 1)
    assert cost.kl > 0
    assert core_cost(model, config(beta=1.0), rows.batches(8)).kl == pytest.approx(0, abs=1e-6)


def test_what_cannot_run_is_one_line(folder):
    model = load_model(str(folder))
    with (
        pytest.raises(ConfigError, match=f"prefix {CONTEXT} takes the whole context"),
        running_core(model, config(prefix=CONTEXT)),
    ):
        pass
    with pytest.raises(ConfigError, match="first_layer 3 leaves no MLP"), running_core(model, config(first_layer=3)):
        pass
    with pytest.raises(SiteError, match="is inside an MLP"):
        require_whole(model, config(), ["blocks.1.mlp.hook_post"])
    require_whole(model, config(), ["blocks.1.hook_mlp_out", SITE])
    with pytest.raises(TextError, match="at least two rows"):
        core_study(model, Rows(1), prefix=PREFIX)


def test_the_study_knows_planted_texts(folder):
    """Rows of one repeated token each: halves share all core neurons, nothing changes between tokens."""
    model, rows = load_model(str(folder)), Rows(12)
    if "wpe" in dict(model.plain.named_modules()).get("transformer", torch.nn.Module())._modules:
        model.plain.transformer.wpe.weight.data.zero_()  # so that a token is the same wherever it stands
    rows.tokens = torch.arange(1, 13)[:, None].expand(12, CONTEXT).contiguous()
    result = core_study(model, rows, alphas=(0.25,), betas=(0.5, 1.0), prefix=PREFIX, first_layer=0, rounds=1)
    for part in result.stability:
        assert part.same > 0.99
        assert part.chance == pytest.approx(0.5, abs=0.03)
        assert part.other < part.same - 0.1
    for part in result.change:
        assert part.changed[1] < 0.01
        assert part.changed_other[1] > 0.5
    half, whole = result.points
    assert whole.loss == pytest.approx(result.loss_whole, abs=1e-5)
    assert whole.loss_random == pytest.approx(result.loss_whole, abs=1e-5)
    assert half.kl > whole.kl
    assert len(result.to_frame()) == 2
    assert list(result.layer_frame()["layer"]) == [0, 1, 2]


def test_a_lossy_harvest_says_so_and_resumes(folder, text, tmp_path):
    keys = {
        "harvest": {"max_tokens": 600, "rows_per_batch": 4},
        "sparse": "core",
        "core": config(first_layer=1).model_dump(),
    }
    job = HarvestJob(model=str(folder), text=str(text), sites=[SITE], **keys)
    said = []
    run_harvest(job, tmp_path / "core", say=said.append)
    assert any("lossy" in line for line in said)
    lossy = json.loads((tmp_path / "core" / "manifest.json").read_text())["lossy"]
    assert lossy["how"] == "core neurons"
    assert lossy["beta"] == 0.5
    assert lossy["kl"] > 0
    assert run_harvest(job, tmp_path / "core", resume=True).n_rows == 600
    run_harvest(job.model_copy(update={"sparse": "off"}), tmp_path / "dense")
    assert "lossy" not in json.loads((tmp_path / "dense" / "manifest.json").read_text())
    assert saelab("harvest", folder, "--text", text, "--sites", "blocks.1.mlp.hook_post", "--sparse", "core",
                  "--core.prefix", PREFIX, "--out", tmp_path / "inside") == 1  # fmt: skip


def test_the_command(folder, text, tmp_path, capsys):
    given = ["--text", text, "--prefix", PREFIX, "--max_tokens", 200, "--alphas", 0.25, "--betas", 0.5, "--rounds", 1]
    assert saelab("core-neurons", folder, *given, "--out", tmp_path / "out") == 0
    assert "core neurons after 4 tokens" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "core_neurons.json").read_text())
    assert found["points"][0]["beta"] == 0.5
    assert saelab("show", tmp_path / "out") == 0
    assert saelab("core-neurons", folder, "--text", text, "--prefix", 0) == 1
