"""Sparse execution: the same activations, decisions that can be repeated, harvests that resume to the same bytes."""

import pytest
import torch

from saelab.activations.harvest import harvest as harvest_function
from saelab.core.errors import ConfigError
from saelab.models.subject import load_model
from saelab.sparsity import runtime
from saelab.sparsity.methods.structured import branches, silence
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.sparsify import sparsify
from saelab.workflows.harvest import HarvestJob, run_harvest
from saelab.workflows.sparsify import SparsifyJob, run_sparsify
from tests.models.tiny import tiny_gpt2, tiny_llama, tokenizer_for
from tests.sparsity.test_sparsify import Rows

SITES = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    made = (tiny_gpt2 if request.param == "gpt2" else tiny_llama)(tmp_path_factory.mktemp("model"))
    tokenizer_for(made)
    return made


def favour(monkeypatch, sparse):
    """Set the clock so that sparse layers are always faster, or never."""

    def seconds(module, x):
        return 1.0 if any(isinstance(m, runtime.SparseLinear) for m in module.modules()) == sparse else 2.0

    monkeypatch.setattr(runtime, "_seconds", seconds)


def pruned(folder, sparsity=0.6):
    model = load_model(str(folder))
    sparsify(model, Rows(), Recipe.model_validate({"method": {"name": "magnitude"}, "sparsity": sparsity}))
    return model


@pytest.mark.parametrize("wins", [True, False])
def test_activations_are_those_of_the_dense_run(folder, monkeypatch, wins):
    """Whatever is decided; here the clock is made to favour one side."""
    model, tokens = pruned(folder), Rows().tokens
    expected = model.read(tokens, SITES)
    favour(monkeypatch, wins)
    choices = runtime.accelerate(model, tokens)
    assert {choice.run for choice in choices} == ({"sparse", "sparse-transposed"} if wins else {"dense"})
    assert any(isinstance(m, runtime.SparseLinear) for m in model.plain.modules()) == wins
    found = model.read(tokens, SITES)
    for site in SITES:
        assert torch.allclose(found[site], expected[site], atol=1e-5)
    again = pruned(folder)
    runtime.apply(again, runtime.decisions(choices))
    repeated = again.read(tokens, SITES)
    assert all(torch.equal(repeated[site], found[site]) for site in SITES)


def test_neurons_that_write_nothing_are_cut(folder):
    model, tokens = load_model(str(folder)), Rows().tokens
    for branch in branches(model.plain, "neurons"):
        kept = torch.ones(branch.out.shape[1], dtype=torch.bool)
        kept[::3] = False
        silence(branch, kept)
    expected = model.read(tokens, SITES)
    choices = runtime.accelerate(model, tokens)
    assert [choice.run for choice in choices] == ["cut"] * 3
    assert branches(model.plain, "neurons")[0].out.shape[1] < len(kept)
    found = model.read(tokens, SITES)
    assert all(torch.allclose(found[site], expected[site], atol=1e-5) for site in SITES)


def test_heads_that_write_nothing_are_cut_unless_they_are_looked_at(folder):
    model, tokens = load_model(str(folder)), Rows().tokens
    if branches(model.plain, "heads")[0].units == 1:
        pytest.skip("its two heads share keys and values: there is one unit, which cannot go")
    for branch in branches(model.plain, "heads"):
        silence(branch, torch.tensor([False, True]))
    expected = model.read(tokens, SITES)
    choices = runtime.accelerate(model, tokens, SITES)
    assert [c.layer for c in choices if c.run == "cut"] == [f"transformer.h.{b}.attn.c_proj" for b in (0, 1)]
    found = model.read(tokens, SITES)
    assert all(torch.allclose(found[site], expected[site], atol=1e-5) for site in SITES)


def test_a_dense_model_runs_dense(folder):
    model = load_model(str(folder))
    assert runtime.accelerate(model, Rows().tokens) == []


def test_decisions_for_another_model_are_refused(folder):
    with pytest.raises(ConfigError, match=r"has no layer for 'sparse:nowhere'; was it recorded for another model\?"):
        runtime.apply(pruned(folder), ["sparse:nowhere"])


def test_a_harvest_says_what_it_used_and_resumes_to_the_same_bytes(folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    letters = torch.randint(0, 22, (3000,), generator=torch.Generator().manual_seed(5))
    text.write_text(" ".join("abcdefghijklmnopqrstuv"[i] for i in letters))
    run_sparsify(
        SparsifyJob(model=str(folder), recipe=Recipe(sparsity=0.6), calibration=str(text), text=str(text)),
        tmp_path / "sparse",
    )
    favour(monkeypatch, True)
    keys = {"harvest": {"max_tokens": 1500, "rows_per_batch": 4, "shard_bytes": 20_000}, "sparse": "auto"}
    job = HarvestJob(model=str(tmp_path / "sparse"), text=str(text), sites=SITES[1:2], **keys)
    said = []
    whole = run_harvest(job, tmp_path / "whole", say=said.append)
    assert any("sparse: " in line and "of the dense time" in line for line in said)
    assert len(whole.manifest["config"]["execution"]) >= 12

    class Stop(Exception):
        pass

    def interrupted(model, rows, *rest, **options):
        class Cut:
            describe = rows.describe

            def batches(self, n, start_row=0):
                for k, batch in enumerate(rows.batches(n, start_row)):
                    if k == 20:
                        raise Stop
                    yield batch

        return harvest_function(model, Cut(), *rest, **options)

    monkeypatch.setattr("saelab.workflows.harvest.harvest", interrupted)
    with pytest.raises(Stop):
        run_harvest(job, tmp_path / "part")
    monkeypatch.undo()  # the real clock would decide otherwise for such tiny layers
    run_harvest(job, tmp_path / "part", resume=True)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "part").iterdir())
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "part" / f).read_bytes() for f in files)
