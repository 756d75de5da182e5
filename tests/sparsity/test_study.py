"""The feature study: against itself nothing is lost beyond the control; a ruined model loses features."""

import json

import pytest

from saelab.core.errors import ConfigError
from saelab.workflows.sparsify import SparsifyJob, run_sparsify
from saelab.workflows.sparsity_study import StudyJob, run_study

SMALL = {"harvest_tokens": 6000, "eval_tokens": 2000, "train_tokens": 8192, "d_sae": 64, "seeds": [0, 1]}


def test_the_study_tells_a_ruined_model_from_a_sound_one(tmp_path):
    for share, name in ((0.02, "sound"), (0.95, "ruined")):
        recipe = {"method": {"name": "magnitude"}, "pattern": "layer", "sparsity": share}
        job = SparsifyJob.model_validate({"recipe": recipe, "eval_tokens": 1000, "context": 64})
        run_sparsify(job, tmp_path / name)
    sparse = [str(tmp_path / "sound"), str(tmp_path / "ruined")]
    study = run_study(StudyJob(sparse=sparse, **SMALL), tmp_path / "study")
    frame = study.to_frame().set_index("model")
    assert list(frame.index) == ["dense", "sound", "ruined"]
    assert frame.loc["ruined", "ce_clean"] > frame.loc["sound", "ce_clean"] + 1
    # The same seed on nearly the same model finds nearly the same features; other seeds and a ruined model do not.
    assert frame.loc["sound", "matched_same"] > frame.loc["dense", "matched"]
    assert frame.loc["ruined", "matched_same"] < frame.loc["sound", "matched_same"] - 0.1
    assert frame.loc["ruined", "lost_same"] > frame.loc["sound", "lost_same"]
    # Of other seeds, nearly the same model does as the control does.
    assert abs(frame.loc["sound", "matched"] - frame.loc["dense", "matched"]) < 0.05
    assert frame.loc["ruined", "matched"] < frame.loc["dense", "matched"]
    assert study.summary().set_index("measure")["dense"]["features of the dense SAE lost, same start"] == "-"
    assert json.loads((tmp_path / "study" / "study.json").read_text())["seeds"] == [0, 1]
    assert "Plotly" in (tmp_path / "study" / "study.html").read_text()


def test_one_seed_has_no_control(tmp_path):
    with pytest.raises(ConfigError, match="at least 2 seeds"):
        run_study(StudyJob(sparse=["x"], seeds=[0]), tmp_path / "study")
    with pytest.raises(ConfigError, match="two models are called 'x'"):
        run_study(StudyJob(sparse=["a/x", "b/x"]), tmp_path / "other")
