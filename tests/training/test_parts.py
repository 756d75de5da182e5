"""Schedules, initialisation, metrics, configs, loggers."""

import builtins
import itertools
import json
import math

import pytest
import torch

from saelab.core.config import dump_yaml, leaf_fields, load_config, parse_config
from saelab.core.errors import ConfigError, SaelabError
from saelab.training import FitConfig, TensorBoardLogger, TrainingConfig, open_loggers
from saelab.training.initialise import geometric_median, input_scale
from saelab.training.loggers import JsonlLog
from saelab.training.metrics import BatchSpread, Window
from saelab.training.schedule import k_factor, learning_rate, sparsity_factor

SAE = {"d_in": 4, "d_sae": 8, "k": 2}


def test_learning_rate_law():
    assert TrainingConfig().peak_lr(2**14) == pytest.approx(2e-4)
    assert TrainingConfig().peak_lr(2**12) == pytest.approx(4e-4)
    assert TrainingConfig(lr=1e-3).peak_lr(7) == 1e-3


def test_learning_rate_shape():
    t = TrainingConfig(tokens=100, batch_size=1, lr=1.0, lr_warmup=0.1, lr_decay=0.2)
    rates = [learning_rate(t, 8, step) for step in range(t.steps)]
    assert rates[:2] == pytest.approx([0.05, 0.15])
    assert set(rates[10:80]) == {1.0}
    assert rates[-1] == pytest.approx(0.5 / 20)
    assert all(b <= a for a, b in itertools.pairwise(rates[10:]))


def test_warmups():
    t = TrainingConfig(tokens=100, batch_size=1, k_warmup=0.5, k_warmup_factor=3, sparsity_warmup=0.1)
    assert [k_factor(t, step) for step in (0, 25, 50, 99)] == [3.0, 2.0, 1.0, 1.0]
    assert [sparsity_factor(t, step) for step in (0, 9, 50)] == pytest.approx([0.1, 1.0, 1.0])
    assert k_factor(TrainingConfig(k_warmup=0), 0) == 1.0


def test_configs_are_checked():
    with pytest.raises(ConfigError, match=r"lr_warmup \+ lr_decay = 1\.1"):
        parse_config(FitConfig, {"sae": SAE, "training": {"lr_warmup": 0.6, "lr_decay": 0.5}})
    with pytest.raises(ConfigError, match="unknown architecture 'topkk'; did you mean topk"):
        parse_config(FitConfig, {"sae": SAE | {"architecture": "topkk"}})
    with pytest.raises(ConfigError, match="k = 9 is more than d_sae = 8"):
        parse_config(FitConfig, {"sae": SAE | {"k": 9}})
    with pytest.raises(ConfigError, match=r"unknown key 'training\.learning_rate'"):
        parse_config(FitConfig, {"sae": SAE, "training": {"learning_rate": 1}})
    with pytest.raises(ConfigError, match="name"):
        parse_config(FitConfig, {"name": "../x", "sae": SAE})


def test_config_round_trip_and_listing(tmp_path):
    config = parse_config(FitConfig, {"sae": SAE, "training": {"lr": 1e-3}})
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert load_config(FitConfig, tmp_path / "c.yaml") == config
    keys = [key for key, *_ in leaf_fields(FitConfig)]
    assert {"name", "sae.k", "sae.d_sae", "training.lr"} <= set(keys)


def test_geometric_median_ignores_massive_tokens():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(200, 3, generator=g) * 0.1 + torch.tensor([1.0, 2.0, 3.0])
    points[:5] = 1e4
    assert (geometric_median(points) - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 0.05
    assert points.mean(0).min() > 100


def test_geometric_median_has_zero_gradient():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    gap = geometric_median(points).double() - points.double()
    assert (gap / gap.norm(dim=1, keepdim=True)).sum(0).abs().max() < 1e-2


def test_geometric_median_starting_on_a_point():
    assert torch.allclose(geometric_median(torch.ones(5, 2)), torch.ones(2))


def test_input_scale():
    assert input_scale(torch.full((3, 4), 2.0)) == pytest.approx(0.5)


def test_window_is_the_pooled_metric():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 3, generator=g) + 10 * i for i, n in enumerate((4, 7, 1))]
    window = Window(3, torch.device("cpu"))
    assert window.read() == {}
    for part in parts:
        window.add(BatchSpread(part), squared_error=torch.tensor(2.0), active=torch.tensor(8.0), loss=torch.tensor(3.0))
    x = torch.cat(parts).double()
    read = window.read()
    assert read["fvu"] == pytest.approx(float(6 / (x - x.mean(0)).square().sum()), rel=1e-6)
    assert (read["l0"], read["loss"]) == (2.0, 3.0)
    other = Window(3, torch.device("cpu"))
    other.load(window.state())
    assert other.read() == read


def test_constant_data_have_no_fvu():
    window = Window(2, torch.device("cpu"))
    zero = torch.tensor(0.0)
    window.add(BatchSpread(torch.zeros(3, 2)), squared_error=zero, active=zero)
    assert math.isnan(window.read()["fvu"])


def test_jsonl_is_cut_back(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = JsonlLog(path)
    log.write({"a": 1, "b": float("nan")})
    kept = log.sync()
    log.write({"a": 2})
    log.close()
    again = JsonlLog(path, kept)
    again.write({"a": 3})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1, "b": None}, {"a": 3}]


def test_unknown_logger_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown logger 'tensorbord'; did you mean tensorboard"):
        open_loggers(["tensorbord"], tmp_path)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_package_says_what_to_install(name, package, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.startswith(package):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SaelabError, match=rf"pip install 'saelab\[{name}\]'"):
        open_loggers([name], tmp_path)


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    logger.log("a", 1, {"loss": 2.0})
    logger.close()
    assert list((tmp_path / "a").glob("events*"))
