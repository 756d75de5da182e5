"""SAEs whose own matrices are kept sparse: masks, counts, resuming, kernels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.core.artifacts import read_json
from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sae import load_sae
from saelab.sparsity.folder import load_masks
from saelab.training import fit
from saelab.training.config import FitConfig
from saelab.training.sparse import check_sparsity
from tests.made import SITE, saelab
from tests.training.planted import PlantedSource

GROW = {"name": "drop-and-grow", "every": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "rigl": {"score": "random", "sparsity": 0.8, "allocation": "erk", "schedule": GROW},
    "gradual": {"sparsity": 0.5, "pattern": "row", "schedule": {"name": "cubic", "every": 3}, "include": ["W_enc"]},
    "sr-ste": {"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "sr-ste"}},
    "s-ste": {"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "soft"}, "include": ["W_dec"]},
}  # fmt: skip


def config(recipe: dict[str, Any] | None, **sae: Any) -> FitConfig:
    data = {
        "sae": {"architecture": "topk", "d_in": 16, "d_sae": 32, "k": 3, **sae},
        "training": {"tokens": 40 * 64, "batch_size": 64, "lr": 3e-3, "init_tokens": 128, "checkpoint_every": 10},
        "sparsity": recipe,
    }
    return parse_config(FitConfig, data)


class Breaking(PlantedSource):
    """A source that ends with an interruption."""

    stop_at: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.position == self.stop_at:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("name", RECIPES)
def test_a_sparse_sae_saves_what_it_counts_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    run = config(recipe)
    result = fit([run], PlantedSource(16, 24, 64), tmp_path / "whole")[0]
    sae, masks = load_sae(result.path), load_masks(result.path)
    weights = {"W_enc": sae.w_enc_t, "W_dec": sae.W_dec.T}
    assert set(masks) == set(recipe.get("include", weights))
    for matrix, mask in masks.items():
        assert not bool(weights[matrix][~mask].any())
        if recipe.get("pattern") == "2:4":
            assert bool((mask.reshape(-1, 4).sum(1) == 2).all())
    if name == "gradual":
        assert bool((masks["W_enc"].sum(1) == 8).all())
    report = read_json(result.path / "sparsity.json")
    zeros = sum(int((weights[m] == 0).sum()) for m in masks)
    assert report["sparsity"] == pytest.approx(zeros / sum(m.numel() for m in masks.values()))
    assert read_json(result.path / "meta.json")["sparsity"] == report["sparsity"]

    broken = Breaking(16, 24, 64)
    broken.stop_at = 27
    with pytest.raises(KeyboardInterrupt):
        fit([run], broken, tmp_path / "broken")
    again = fit([run], PlantedSource(16, 24, 64), tmp_path / "broken", resume=True)[0]
    for file in ("weights.safetensors", "masks.safetensors", "meta.json"):
        assert (again.path / file).read_bytes() == (result.path / file).read_bytes()


def test_a_sparse_sae_still_learns_and_its_kernels_agree_with_the_dense_product(tmp_path: Path) -> None:
    result = fit([config(RECIPES["rigl"])], PlantedSource(16, 24, 64), tmp_path)[0]
    lines = (result.path / "training.jsonl").read_text().splitlines()
    assert lines
    assert result.metrics["fvu"] < 0.9
    sae = load_sae(result.path)
    x = PlantedSource(16, 24, 64).batch(99).x
    scaled = x * sae.input_scale
    pre = (scaled - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.topk(3, dim=1)
    code = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    torch.testing.assert_close(sae(x), (code @ sae.W_dec + sae.b_dec) / sae.input_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({**RECIPES["sr-ste"], "pattern": "2:5"}, "does not divide layer W_enc, which has 16 inputs"),
        ({"sparsity": 0.5, "include": ["W_in"]}, "no layer is called 'W_in'"),
        ({"pattern": "2:4", "schedule": {"name": "refresh"}, "gradient": {"name": "bdwp"}}, "SAE's own kernels"),
        ({"sparsity": 0.5, "cycles": {}}, "cycles train several times"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_sparsity(config(recipe))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_train_takes_a_recipe_and_overrides_of_it_on_the_command_line(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["--sae.d_sae", 64, "--sae.k", 4, "--training.tokens", 4096, "--training.batch_size", 256]
    line = ["train", "configs/demo-topk.yaml", "--store", made / "store", "--site", SITE, *small]
    recipe = "configs/sparsity/training/gradual-90.yaml"
    assert saelab(*line, "--sparsity", recipe, "--sparsity.sparsity", 0.8, "--out", out) == 0
    sae, report = load_sae(out / "sae"), read_json(out / "sae" / "sparsity.json")
    for weight in (sae.W_enc, sae.W_dec):
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert saelab(*line, "--sparsity", recipe, "--sparsity.sparsity", 1.5, "--out", tmp_path / "bad") == 1
    assert not (tmp_path / "bad").exists()
