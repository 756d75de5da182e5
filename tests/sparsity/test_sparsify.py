"""Whole models: what is pruned, what is written, and that it reads back as a normal model."""

import json
from types import SimpleNamespace

import pytest
import torch

from saelab.core.errors import ConfigError, ModelError
from saelab.models.subject import load_model
from saelab.sparsity import runtime
from saelab.sparsity.folder import check_masks, load_masks, load_quantised, write_model
from saelab.sparsity.layers import linear_layers
from saelab.sparsity.methods import Wanda
from saelab.sparsity.methods.structured import branches, silence, smaller
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.sparsify import sparsify
from saelab.workflows.sparsify import SparsifyJob, run_sparsify
from saelab.workflows.sparsity_curve import CurveJob, knee, run_curve
from tests.made import saelab
from tests.models.tiny import CONTEXT, VOCAB, _save, tiny_gpt2, tiny_llama, tokenizer_for


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    made = (tiny_gpt2 if request.param == "gpt2" else tiny_llama)(tmp_path_factory.mktemp("model"))
    tokenizer_for(made)
    return made


class Rows:
    """Random rows of tokens."""

    def __init__(self, n=24, seed=0):
        self.tokens = torch.randint(1, VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))

    def batches(self, rows_per_batch):
        for part in self.tokens.split(rows_per_batch):
            yield SimpleNamespace(tokens=part, keep=torch.ones_like(part, dtype=torch.bool))


def recipe(**keys):
    return Recipe.model_validate({"calibration_tokens": 200, **keys})


def test_the_unembedding_and_norms_are_left_alone(folder):
    model = load_model(str(folder))
    names = [layer.name for layer in linear_layers(model.plain)]
    assert not any("head" in name or "embed" in name or "wte" in name for name in names)
    before = {name: value.clone() for name, value in model.plain.state_dict().items()}
    sparsify(model, Rows(), recipe(method={"name": "magnitude"}, sparsity=0.5))
    changed = {name for name, value in model.plain.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in names}


@pytest.mark.parametrize(
    "keys",
    [
        {"method": {"name": "magnitude"}, "pattern": "layer", "sparsity": 0.5},
        {"method": {"name": "magnitude"}, "pattern": "layer", "sparsity": 0.5, "allocation": "global"},
        {"method": {"name": "random"}, "pattern": "row", "sparsity": 0.25, "allocation": "erk"},
        {"method": {"name": "wanda"}, "pattern": "2:4"},
        {"method": {"name": "dsnot"}, "pattern": "1:2"},
        {"method": {"name": "sparsegpt", "block": 8}, "pattern": "layer", "sparsity": 0.5},
        {"method": {"name": "wanda"}, "pattern": "row", "sparsity": 0.5, "allocation": "sensitivity"},
    ],
)
def test_the_sparsity_asked_for_is_the_sparsity_counted(folder, keys):
    model = load_model(str(folder))
    done = sparsify(model, Rows(), recipe(**keys))
    wanted = keys.get("sparsity", 0.5)
    assert done.sparsity == pytest.approx(wanted, abs=0.02)
    for layer in linear_layers(model.plain):
        assert torch.equal(layer.weight != 0, done.masks[layer.name])


def test_later_layers_see_the_inputs_of_pruned_ones(folder):
    """Wanda's norms in block 1 are those with block 0 already pruned."""
    model = load_model(str(folder))
    reference = load_model(str(folder))
    everything = sparsify(model, Rows(), recipe(sparsity=0.75))
    early = [layer.name for layer in linear_layers(reference.plain) if layer.block == 0]
    late = [layer.name for layer in linear_layers(reference.plain) if layer.block == 1]
    sparsify(reference, Rows(), recipe(sparsity=0.75, include=early))
    second = sparsify(reference, Rows(), recipe(sparsity=0.75, include=late))
    for name in late:
        assert torch.equal(second.masks[name], everything.masks[name])
    alone = sparsify(load_model(str(folder)), Rows(), recipe(sparsity=0.75, include=late))
    assert any(not torch.equal(alone.masks[name], everything.masks[name]) for name in late)


def test_cut_neurons_give_what_silenced_ones_give(folder, tmp_path):
    """Shrinking is exact: the cut model equals the one whose dropped neurons were zeroed."""
    rows = Rows()
    whole, cut = load_model(str(folder)), load_model(str(folder))
    done = sparsify(cut, rows, recipe(method={"name": "structured", "neurons": 0.5}))
    kept = {}
    for branch, small in zip(branches(whole.plain, "neurons"), branches(cut.plain, "neurons"), strict=True):
        wide, narrow = branch.out.weight, small.out.weight
        assert narrow.shape[1] == round(wide.shape[1] / 2)
        kept[branch.out.name] = torch.tensor([any(torch.equal(w, n) for n in narrow.T) for w in wide.T])
        silence(branch, kept[branch.out.name])
    assert torch.allclose(whole.logits(rows.tokens), cut.logits(rows.tokens), atol=1e-4)
    assert next(iter(done.config.values())) == sum(next(iter(kept.values()))).item()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llamas_heads_are_cut_and_gpt2s_are_zeroed(tmp_path, kv_heads):
    """Both equal the model whose heads were zeroed by hand; the smaller Llama reads back from its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    rows, keys = Rows(), {"method": {"name": "structured", "neurons": 0, "heads": 0.5}}
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4,
                        num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT, **common)  # fmt: skip
    gpt2 = GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=CONTEXT, **common)
    for kind, config in ((LlamaForCausalLM, llama), (GPT2LMHeadModel, gpt2)):
        folder = _save(kind, config, tmp_path / kind.__name__)
        tokenizer_for(folder)
        whole, pruned = load_model(str(folder)), load_model(str(folder))
        done = sparsify(pruned, rows, recipe(**keys))
        units = branches(whole.plain, "heads")[0].units
        assert all(layer.facts["heads_kept"] == units / 2 for layer in done.layers if layer.facts)
        for branch, small in zip(branches(whole.plain, "heads"), branches(pruned.plain, "heads"), strict=True):
            columns = small.out.weight.T
            kept = [any(torch.equal(w, c) and c.any() for c in columns) for w in branch.out.weight.T]
            silence(branch, torch.tensor(kept).view(units, -1).all(1))
        expected = whole.logits(rows.tokens)
        assert torch.allclose(pruned.logits(rows.tokens), expected, atol=1e-4)
        if kind is LlamaForCausalLM:
            assert done.config == {"head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": kv_heads // 2}
            write_model(pruned, tmp_path / "out", {}, {}, {"model": "x", "sparsity": done.sparsity, "recipe": {}})
            again = load_model(str(tmp_path / "out"))
            assert torch.equal(again.logits(rows.tokens), pruned.logits(rows.tokens))
            assert again.width("blocks.0.attn.hook_z") == 8
        else:
            assert done.config == {}
            runtime.accelerate(pruned, rows.tokens)
            assert branches(pruned.plain, "heads")[0].out.shape[1] * 2 == branches(whole.plain, "heads")[0].out.shape[1]
            assert torch.allclose(pruned.logits(rows.tokens), expected, atol=1e-4)


def test_all_heads_cannot_go(folder):
    with pytest.raises(ConfigError, match="heads is all of them"):
        sparsify(load_model(str(folder)), Rows(), recipe(method={"name": "structured", "neurons": 0, "heads": 0.9}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(0, 22, (4000,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join("abcdefghijklmnopqrstuv"[i] for i in letters))
    return path


@pytest.mark.parametrize(
    "keys",
    [
        {"method": {"name": "wanda"}, "pattern": "2:4"},
        {"method": {"name": "structured", "neurons": 0.25}},
        {"method": {"name": "spqr", "group": 8}},
    ],
)
def test_the_folder_is_a_normal_model_with_masks(folder, text, tmp_path, keys):
    job = SparsifyJob(model=str(folder), recipe=recipe(**keys), calibration=str(text), text=str(text), eval_tokens=600)
    report = run_sparsify(job, tmp_path / "sparse")
    again = load_model(str(tmp_path / "sparse"))
    in_memory = load_model(str(folder))
    done = sparsify(in_memory, job.read(in_memory, job.calibration, 200), job.recipe, seed=job.seed)
    for name, value in in_memory.plain.state_dict().items():
        assert torch.equal(again.plain.state_dict()[name], value), name
    if done.masks:
        masks = load_masks(tmp_path / "sparse")
        assert all(torch.equal(masks[name], mask) for name, mask in done.masks.items())
        assert check_masks(again, masks) == []
    if done.tensors:
        quantised = load_quantised(tmp_path / "sparse")
        assert set(quantised) == set(done.masks)
        for layer in linear_layers(again.plain):
            assert torch.equal(quantised[layer.name].dequantised(), layer.weight), layer.name
    assert report.cost["kl"] > 0
    assert again.tokenizer is not None
    assert saelab("show", tmp_path / "sparse") == 0
    assert saelab("harvest", tmp_path / "sparse", "--sites", "blocks.1.hook_resid_post", "--text", text, "--out",
                  tmp_path / "store", "--harvest.max_tokens", 100) == 0  # fmt: skip


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match="Sequential has no linear layers, so there is nothing to prune"):
        linear_layers(torch.nn.Sequential(torch.nn.LayerNorm(3)))


def test_an_unknown_layer_is_named_with_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no layer is called '.*7.*'"):
        sparsify(load_model(str(folder)), Rows(), recipe(sparsity=0.5, include=["*.h.7.*"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipe.sparsity", "1.5"], "recipe.sparsity"),
        (["--recipe.pattern", "3:5", "--recipe.sparsity", "0.5"], "pattern 3:5 means sparsity 0.4, not 0.5"),
        (["--recipe.pattern", "2:5"], "2:5 does not divide layer"),
        (["--recipe.method.name", "wandaa"], "wandaa"),
        (["--recipe.sparsity", "0.5", "--recipe.include", "nowhere.*"], "no layer is called 'nowhere.*'"),
        (["--calibration", "empty.txt"], "empty"),
        (["--recipe", "configs/sparsity/nothing.yaml"], "not found: configs/sparsity/nothing.yaml"),
        (["--recipe.method.stepz", "3"], "unknown option '--recipe.method.stepz'"),
        (["--recipe.method.name", "spqr", "--recipe.sparsity", "0.5"], "decides by its own settings"),
    ],
)
def test_mistakes_are_one_line(folder, text, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    code = saelab("sparsify", folder, "--text", text, "--calibration", text, *options, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("saelab: ")]
    assert code in (1, 2)
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in captured.err


def test_the_curve_finds_a_planted_knee():
    import numpy as np

    x = np.linspace(0, 0.95, 20)
    assert knee(x, np.where(x < 0.6, 1 + 0.1 * x, 1 + 0.1 * x + 8 * (x - 0.6))) == pytest.approx(0.6)


def test_the_curve_is_written(folder, text, tmp_path):
    job = CurveJob(
        model=str(folder), calibration=str(text), text=str(text), eval_tokens=300, sparsities=(0.0, 0.3, 0.6, 0.9)
    )
    curve = run_curve(job, tmp_path / "curve")
    first = curve.points[0]
    assert first["loss"] == pytest.approx(first["loss_dense"])
    assert {"layer", "N:8"} == set(curve.essential)
    assert json.loads((tmp_path / "curve" / "curve.json").read_text())["points"][3]["sparsity"] == pytest.approx(
        0.9, abs=0.01
    )
    assert "plotly" in (tmp_path / "curve" / "curve.html").read_text().lower()


def test_heads_are_cut_only_to_a_number_that_divides_the_width(tmp_path):
    made = tiny_llama(tmp_path)
    tokenizer_for(made)
    branch = branches(load_model(str(made)).plain, "heads")[0]
    width = branch.out.shape[1] // 8
    config = SimpleNamespace(head_dim=width, num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    assert smaller(config, branch, 2) == {"head_dim": width, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert smaller(config, branch, 3) is None  # 6 heads do not divide 64


def test_only_calibration_tokens_are_counted(folder):
    counted = []

    class Counting(Wanda):
        def prune(self, weight, inputs, pattern, generator):
            counted.append(inputs.n)
            return super().prune(weight, inputs, pattern, generator)

    model = load_model(str(folder))  # has not looked at its sites yet
    found = sparsify(model, Rows(), recipe(sparsity=0.5).model_copy(update={"method": Counting()}))
    assert set(counted) == {found.calibration_tokens}
