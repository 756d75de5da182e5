"""``saelab pretrain --sparsity``: sparse models, several trainings, errors."""

import json
import math
from pathlib import Path

import pytest
import torch

from saelab.cli.main import run as cli
from saelab.core.artifacts import read_json, read_manifest, read_safetensors
from saelab.core.config import parse_config
from saelab.core.errors import ConfigError, MissingFileError, ResumeError
from saelab.models.pretrain import pretrain
from saelab.models.pretrain_config import PretrainConfig
from saelab.models.subject import load_model
from saelab.sparsity.folder import check_masks, load_masks
from saelab.workflows.pretrain import PretrainJob, run_pretrain, widened
from saelab.workflows.sparse_cycles import average
from tests.models.test_pretrain import TINY, write_text


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, object]:
    texts = {"train": write_text(tmp_path / "train.txt"), "heldout": write_text(tmp_path / "heldout.txt", 1, 40)}
    return {**TINY, **texts, "save_dtype": "float32"}


def test_a_sparse_pretraining_writes_masks_counts_and_its_cost(tiny: dict[str, object], tmp_path: Path) -> None:
    dense = pretrain(PretrainConfig(**tiny), tmp_path / "dense")
    recipe = {"sparsity": 0.8, "schedule": {"name": "cubic", "every": 2}}
    job = parse_config(PretrainJob, {**tiny, "sparsity": recipe, "dense": str(tmp_path / "dense")})
    result = run_pretrain(job, tmp_path / "sparse")
    report = read_json(tmp_path / "sparse" / "sparsity.json")
    masks = load_masks(tmp_path / "sparse")
    size, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    assert report["sparsity"] == pytest.approx(1 - kept / size)
    assert kept == pytest.approx(0.2 * size, abs=4)
    assert 0.2 < report["average_density"] < 1
    assert report["cost"]["loss_dense"] == pytest.approx(dense.heldout.loss, abs=0.3)
    assert report["cost"]["kl"] > 0
    assert read_manifest(tmp_path / "sparse", "model")["sparsity"] == report["sparsity"]
    model = load_model(str(tmp_path / "sparse"))
    assert set(masks) == {layer["name"] for layer in report["layers"]}
    assert check_masks(model, masks) == []
    assert result.heldout.loss < math.log(300)
    assert run_pretrain(job, tmp_path / "sparse", resume=True).heldout == result.heldout


def test_a_stopped_sparse_pretraining_resumes_bit_for_bit(
    tiny: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saelab.models.pretrain import _Run

    recipe = {"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "soft"}}
    job = parse_config(PretrainJob, {**tiny, "sparsity": recipe})
    run_pretrain(job, tmp_path / "whole")
    step = _Run._step

    def stop(self: _Run, number: int) -> float:
        if number == 23:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(_Run, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_pretrain(job, tmp_path / "stopped")
    monkeypatch.undo()
    other = parse_config(PretrainJob, {**tiny, "sparsity": {**recipe, "gradient": {"name": "ste"}}})
    with pytest.raises(ResumeError, match="sparsity"):
        run_pretrain(other, tmp_path / "stopped", resume=True)
    run_pretrain(job, tmp_path / "stopped", resume=True)
    for name in ("model.safetensors", "masks.safetensors"):
        whole, stopped = (read_safetensors(tmp_path / f / name) for f in ("whole", "stopped"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_lottery_tickets_rewind_and_have_a_control(tiny: dict[str, object], tmp_path: Path) -> None:
    recipe = {"sparsity": 0.75, "allocation": "global", "cycles": {"rounds": 2, "rewind": 0.1}}
    job = parse_config(PretrainJob, {**tiny, "sparsity": recipe})
    run_pretrain(job, tmp_path / "imp")
    report = read_json(tmp_path / "imp" / "sparsity.json")
    assert [line["sparsity"] for line in report["rounds"]] == pytest.approx([0, 0.5, 0.75], abs=0.01)
    assert report["trainings"] == 3
    assert isinstance(report["control_loss"], float)
    assert report["cost"]["kl"] > 0
    rounds = tmp_path / "imp" / "rounds"
    first, last = load_masks(rounds / "1-masks"), load_masks(rounds / "2-masks")
    assert all(not bool((last[name] & ~first[name]).any()) for name in last)
    assert all(torch.equal(mask, last[name]) for name, mask in load_masks(tmp_path / "imp").items())
    assert check_masks(load_model(str(tmp_path / "imp")), last) == []
    # Universal ticket: the mask, on another text.
    text = write_text(tmp_path / "other.txt", 9)
    ticket = parse_config(PretrainJob, {**tiny, "train": text, "sparsity": {"masks": str(tmp_path / "imp")}})
    run_pretrain(ticket, tmp_path / "ticket")
    assert all(torch.equal(mask, last[name]) for name, mask in load_masks(tmp_path / "ticket").items())


def test_a_rewound_training_starts_from_the_kept_step(tiny: dict[str, object], tmp_path: Path) -> None:
    """Under a mask that takes nothing away, a round rewound to step 0 repeats the dense training."""
    recipe = {"sparsity": 0.0, "cycles": {"rounds": 1, "rewind": 0.0, "control": False}}
    run_pretrain(parse_config(PretrainJob, {**tiny, "sparsity": recipe}), tmp_path / "imp")
    again, dense = (read_safetensors(tmp_path / "imp" / "rounds" / n / "model.safetensors") for n in ("1", "0"))
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_a_soup_keeps_the_mask(tiny: dict[str, object], tmp_path: Path) -> None:
    recipe = {
        "sparsity": 0.75, "allocation": "global",
        "cycles": {"rounds": 2, "rewind": None, "copies": 2, "decay_factor": 2},
    }  # fmt: skip
    run_pretrain(parse_config(PretrainJob, {**tiny, "sparsity": recipe}), tmp_path / "soup")
    masks = load_masks(tmp_path / "soup")
    assert check_masks(load_model(str(tmp_path / "soup")), masks) == []
    rounds = tmp_path / "soup" / "rounds"
    copies = [read_safetensors(rounds / f"2-copy{i}" / "model.safetensors") for i in (0, 1)]
    soup = read_safetensors(tmp_path / "soup" / "model.safetensors")
    assert not torch.equal(copies[0]["transformer.h.0.mlp.c_fc.weight"], copies[1]["transformer.h.0.mlp.c_fc.weight"])
    assert all(torch.equal(average(copies)[name], soup[name]) for name in soup)
    report = read_json(tmp_path / "soup" / "sparsity.json")
    assert report["trainings"] == 5
    assert [len(line["heldout_loss"]) for line in report["rounds"]] == [1, 2, 2]
    decays = [read_json(rounds / f"1-copy{i}" / "training.json")["config"]["weight_decay"] for i in (0, 1)]
    assert decays == pytest.approx([0.05, 0.2])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"pattern": "2:3", "schedule": {"name": "refresh"}, "gradient": {"name": "ste"}}, "does not divide layer"),
        ({"sparsity": 0.5, "include": ["mlp.*"]}, "no layer is called 'mlp.*'"),
        ({"masks": "nowhere"}, "nowhere"),
        ({"sparsity": 0.5, "cycles": {"copies": 2}}, "use rewind null"),
        ({"sparsity": 0.5, "schedule": {"name": "cubic"}, "cycles": {}}, "gradient and penalty out"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_line_and_writes_nothing(
    recipe: dict[str, object], says: str, tiny: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(tiny))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exited:
        cli(["pretrain", str(tmp_path / "config.yaml"), "--sparsity", str(tmp_path / "recipe.yaml"), "--out", str(out)])
    assert exited.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_dense_without_sparsity_and_another_tokenizer_are_refused(tiny: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is sparse"):
        run_pretrain(parse_config(PretrainJob, {**tiny, "dense": "embedded"}), tmp_path / "a")
    job = parse_config(
        PretrainJob, {**tiny, "steps": 5, "warmup_steps": 1, "sparsity": {"sparsity": 0.5}, "dense": "embedded"}
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        run_pretrain(job, tmp_path / "b")


@pytest.mark.parametrize("gradient", [{"name": "fish", "share": 0.02, "batches": 2}, {"name": "sora", "rank": 2}])
def test_fine_tuning_goes_on_from_a_model_and_changes_little_of_it(
    gradient: dict[str, object], tiny: dict[str, object], tmp_path: Path
) -> None:
    start = tmp_path / "start"
    pretrain(PretrainConfig(**tiny), start)
    job = parse_config(
        PretrainJob, {**tiny, "seed": 5, "start": str(start), "dense": str(start), "sparsity": {"gradient": gradient}}
    )
    run_pretrain(job, tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    before, after = (read_safetensors(folder / "model.safetensors") for folder in (start, tmp_path / "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".h." in name and name.endswith("weight") and "ln" not in name for name in changed)
    if gradient["name"] == "fish":
        assert all(int((before[n] != after[n]).sum()) <= round(0.02 * before[n].numel()) for n in changed)
    report = read_json(tmp_path / "tuned" / "sparsity.json")
    assert report["cost"]["kl"] < 1
    assert set(report["facts"]) == {"trained" if gradient["name"] == "fish" else "rank"}


def test_a_start_of_another_size_or_none_is_one_line(tiny: dict[str, object], tmp_path: Path) -> None:
    pretrain(PretrainConfig(**tiny), tmp_path / "start")
    wide = {**tiny, "d_model": 2 * PretrainConfig(**tiny).d_model, "start": str(tmp_path / "start")}
    with pytest.raises(ConfigError, match="the config makes"):
        pretrain(parse_config(PretrainConfig, wide), tmp_path / "other")
    with pytest.raises(MissingFileError, match=r"config\.json"):
        pretrain(parse_config(PretrainConfig, {**tiny, "start": str(tmp_path)}), tmp_path / "none")


def test_sparse_ift_widens_to_equal_products(tiny: dict[str, object], tmp_path: Path) -> None:
    job = parse_config(PretrainJob, {**tiny, "sparsity": {"score": "random", "sparsity": 0.75, "widen": True}})
    assert job.sparsity is not None
    assert widened(job, job.sparsity).d_model == 2 * job.d_model
    run_pretrain(job, tmp_path / "wide")
    pretrain(PretrainConfig(**tiny), tmp_path / "dense")
    dense = read_safetensors(tmp_path / "dense" / "model.safetensors")
    products = sum(v.numel() for n, v in dense.items() if ".h." in n and v.dim() == 2)
    assert sum(int(m.sum()) for m in load_masks(tmp_path / "wide").values()) == pytest.approx(products, rel=0.01)
