import json

import pytest
import torch

from saelab.core.artifacts import read_manifest
from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ActivationError, ConfigError, OutputExistsError, SaelabError, StoreError
from saelab.sae import load_sae
from saelab.sae.folder import load_meta
from saelab.training import FitConfig, fit
from tests.training.planted import PlantedSource

ROWS = 64


def config(name="sae", sae=None, **training):
    settings = {"tokens": 20 * ROWS, "batch_size": ROWS, "init_tokens": 100, "log_every": 5} | training
    return parse_config(
        FitConfig, {"name": name, "sae": {"d_in": 16, "d_sae": 48, "k": 3} | (sae or {}), "training": settings}
    )


def source(**settings):
    return PlantedSource(16, 24, ROWS, **settings)


def test_recovers_planted_features(tmp_path):
    planted = PlantedSource(d_in=32, n_features=64, batch_size=256)
    wanted = config(
        sae={"d_in": 32, "d_sae": 128, "k": 4}, tokens=256 * 400, batch_size=256, lr=2e-3, dead_after_tokens=20_000
    )
    (result,) = fit([wanted], planted, tmp_path)
    w_dec = load_sae(result.path).W_dec
    assert (planted.features @ w_dec.T).max(1).values.mean() > 0.9
    assert (w_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert result.metrics["fvu"] < 0.25
    assert result.metrics["l0"] <= 4


def test_folder_result_and_log(tmp_path):
    (result,) = fit([config(tokens=20 * ROWS - 5)], source(), tmp_path, provenance={"site": "blocks.1"})
    assert (result.steps, result.tokens) == (20, 20 * ROWS)
    sae, meta = load_sae(result.path), load_meta(result.path)
    assert meta["provenance"] == {"site": "blocks.1"}
    assert meta["metrics"] == result.metrics
    assert meta["input_scale"] == sae.input_scale
    assert meta["training"]["tokens"] == 20 * ROWS - 5
    assert result.config["sae"]["input_scale"] == sae.input_scale
    lines = [json.loads(line) for line in (result.path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    expected = {"step", "tokens", "loss", "mse", "fvu", "l0", "dead_fraction", "lr", "grad_norm", "tokens_per_second"}
    assert expected <= lines[0].keys()
    assert read_manifest(tmp_path, "run")["runs"][0]["name"] == "sae"


def test_logged_metrics_are_the_definitions(tmp_path):
    """One step from zero learning rate on: FVU, L0 and loss of the log, computed again by hand."""
    (result,) = fit([config(lr=1e-12, tokens=3 * ROWS, log_every=3, aux_coefficient=0, k_warmup=0)], source(), tmp_path)
    line = json.loads((result.path / "training.jsonl").read_text())
    sae = load_sae(result.path)
    x = torch.cat([source().batch(i).x for i in range(3)])
    error = (x - sae(x)).square().sum()
    assert line["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert line["l0"] == pytest.approx(float(sae.encode(x).l0().double().mean()))
    assert line["mse"] == pytest.approx(float(error / len(x)) * sae.input_scale**2, rel=1e-4)


def test_input_scale_makes_the_mean_squared_norm_d_in(tmp_path):
    (result,) = fit([config(init_tokens=2 * ROWS)], source(), tmp_path)
    x = torch.cat([source().batch(i).x for i in range(2)]) * load_sae(result.path).input_scale
    assert float(x.square().sum(1).mean()) == pytest.approx(16, rel=1e-5)


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        (result,) = fit([config(seed=seed)], source(), tmp_path / str(index))
        weights.append((result.path / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_bf16_encoder_trains_alike(tmp_path):
    fvu = []
    for precision in ("f32", "bf16"):
        (result,) = fit([config(precision=precision, tokens=50 * ROWS, lr=1e-2)], source(), tmp_path / precision)
        fvu.append(result.metrics["fvu"])
    assert fvu[1] == pytest.approx(fvu[0], rel=0.05)


def test_nan_names_step_and_rows_and_keeps_what_was_saved(tmp_path):
    poisoned = source()
    poisoned.poison = 12
    with pytest.raises(ActivationError, match="step 12: x has NaN or infinity in batch rows 3;"):
        fit([config(checkpoint_every=5)], poisoned, tmp_path)
    (result,) = fit([config(checkpoint_every=5)], source(), tmp_path, resume=True)
    assert result.steps == 20


def test_large_values_are_not_taken_for_infinity(tmp_path):
    class Large(PlantedSource):
        def batch(self, index):
            return Batch(super().batch(index).x * 1e37)

    (result,) = fit([config()], Large(16, 24, ROWS), tmp_path)
    assert result.metrics["loss"] < 1e3  # in scaled units they are like any others


def test_divergence_is_one_line(tmp_path):
    with pytest.raises(SaelabError, match=r"loss is not finite at step \d+; lower training\.lr") as error:
        fit([config(lr=1e38, grad_clip=None)], source(), tmp_path)
    assert "\n" not in str(error.value)


def test_unusable_requests(tmp_path):
    cases = [
        ([], ConfigError, "no SAE to train"),
        ([config(), config()], ConfigError, "different names"),
        ([config(), config("b", batch_size=32)], ConfigError, r"share training\.batch_size"),
        ([config(sae={"d_in": 8})], ActivationError, "sae.d_in = 8, but the activations are 16 wide"),
        ([config(batch_size=32)], ConfigError, r"batches of 64, but training\.batch_size is 32"),
        ([config(device="tpu9")], ConfigError, r"training\.device"),
    ]
    for index, (runs, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message):
            fit(runs, source(), tmp_path / str(index))


def test_data_that_end(tmp_path):
    class Short(PlantedSource):
        def __iter__(self):
            for _, batch in zip(range(7), super().__iter__(), strict=False):
                yield batch

    with pytest.raises(StoreError, match="ended after 7 batches"):
        fit([config()], Short(16, 24, ROWS), tmp_path)


def test_all_zero_activations(tmp_path):
    class Zero(PlantedSource):
        def batch(self, index):
            return Batch(torch.zeros(ROWS, 16))

    with pytest.raises(ActivationError, match="are zero"):
        fit([config()], Zero(16, 24, ROWS), tmp_path)


def test_existing_training_is_not_overwritten(tmp_path):
    fit([config()], source(), tmp_path)
    with pytest.raises(OutputExistsError, match="already holds a training"):
        fit([config()], source(), tmp_path)


def test_runs_of_different_length_share_the_data(tmp_path):
    short, long = fit([config("short", tokens=5 * ROWS), config("long")], source(), tmp_path / "both")
    assert (short.steps, long.steps) == (5, 20)
    (alone,) = fit([config("short", tokens=5 * ROWS)], source(), tmp_path / "alone")
    assert (alone.path / "weights.safetensors").read_bytes() == (short.path / "weights.safetensors").read_bytes()
