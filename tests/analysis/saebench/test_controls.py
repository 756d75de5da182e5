"""Controls: same sizes and sparsity, nothing learned; and the flags they raise."""

import math

import torch

from saelab.analysis.saebench.controls import Shuffled, Untrained
from saelab.analysis.saebench.result import EvalResult, FullEvaluation
from tests.features.fakes import identity


def test_untrained_has_the_sizes_and_the_l0():
    like = identity(6)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    control = Untrained(like, x.mean(0), l0=3.2, seed=1)
    code = control.encode(x)
    assert (code.d_sae, int(code.l0().max())) == (12, 3)
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(12))
    assert not torch.equal(control.W_dec, Untrained(like, x.mean(0), 3.2, seed=2).W_dec)
    torch.testing.assert_close(control.decode(code), code.to_dense() @ control.W_dec + x.mean(0))


def test_shuffled_keeps_each_coordinate_and_no_token():
    like = identity(6)
    x = torch.arange(300.0).view(50, 6)
    code = Shuffled(like, seed=0).encode(x)
    seen = like.decode(code)
    for column in range(6):
        assert sorted(seen[:, column].tolist()) == x[:, column].tolist()
    assert not any((row == x).all(1).any() for row in seen)


def result(ours, control, **options):
    return EvalResult("e", {}, {"g": {"m": ours}}, controls={"untrained": {"g": {"m": control}}}, **options)


def test_flags():
    assert result(0.9, 0.5, better={"m": "higher"}).flags() == []
    (flag,) = result(0.5, 0.9, better={"m": "higher"}).flags()
    assert (flag.metric, flag.control, flag.value, flag.control_value) == ("m", "untrained", 0.5, 0.9)
    assert result(0.5, 0.9, better={"m": "lower"}).flags() == []
    assert len(result(0.505, 0.5, better={"m": "higher"}).flags()) == 1
    assert result(math.nan, 0.5, better={"m": "higher"}).flags() == []
    # A difference within its own spread over the parts is none.
    parts = {"m": {"sae": [0.9, 0.5, 0.9, 0.5], "untrained": [0.5, 0.8, 0.5, 0.8]}}
    assert len(result(0.7, 0.65, better={"m": "higher"}, parts=parts).flags()) == 1
    steady = {"m": {"sae": [0.7, 0.71, 0.7, 0.71], "untrained": [0.65, 0.66, 0.65, 0.66]}}
    assert result(0.705, 0.655, better={"m": "higher"}, parts=steady).flags() == []


def test_saebench_shape():
    full = FullEvaluation({"e": result(0.5, 0.9, better={"m": "higher"})}, {"id": "x", "release": "r"}, seed=0)
    data = full.to_dict()["evals"]["e"]
    for key in (
        "eval_type_id",
        "eval_config",
        "eval_id",
        "datetime_epoch_millis",
        "eval_result_metrics",
        "eval_result_details",
        "sae_bench_commit_hash",
        "sae_lens_id",
        "sae_lens_release_id",
        "sae_lens_version",
        "sae_cfg_dict",
        "eval_result_unstructured",
    ):
        assert key in data
    assert data["eval_result_metrics"] == {"g": {"m": 0.5}}
    assert data["controls"]["untrained"]["g"]["m"] == 0.9
    assert data["flags"][0]["metric"] == "m"
    frame = full.to_frame()
    assert frame.loc[0, "matched_by"] == "untrained"
    assert len(full.plot().data) == 2
