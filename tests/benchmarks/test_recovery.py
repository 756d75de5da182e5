import pytest
import recovery

from saelab.analysis.synthetic import superpos
from saelab.core.progress import set_progress


def test_coefficients_are_chosen_by_l0_and_rates_by_fvu():
    tried = [
        {"lr": 3e-3, "sparsity": 1.0, "l0": 9.0, "fvu": 0.1},
        {"lr": 3e-3, "sparsity": 2.0, "l0": 5.2, "fvu": 0.3},
        {"lr": 1e-2, "sparsity": 1.0, "l0": 8.0, "fvu": 0.1},
        {"lr": 1e-2, "sparsity": 2.0, "l0": 4.0, "fvu": 0.2},
    ]
    assert recovery.choose("relu", tried, 5.0) == {"lr": 1e-2, "sparsity": 2.0}
    assert recovery.choose("topk", [{"lr": 3e-3, "fvu": 0.2}, {"lr": 1e-2, "fvu": 0.1}], 5.0) == {"lr": 1e-2}


@pytest.mark.parametrize("variant", recovery.VARIANTS)
def test_every_variant_trains_on_planted_data_and_is_measured(variant, monkeypatch):
    set_progress(False)
    monkeypatch.setattr(recovery, "STEPS", 2)
    monkeypatch.setattr(recovery, "BATCH", 64)
    planted = superpos(tokens=256, d=16, n=24, p=0.1)
    rows = recovery.train(variant, planted, planted, 0, recovery.choices_of(variant)[:2])
    assert len(rows) == 2
    assert rows[0]["lr"] == recovery.choices_of(variant)[0]["lr"]
    assert rows[0]["n_planted"] == 24
    assert 0 <= rows[0]["recovered"] <= rows[0]["mmcs"] + 1e-6


def test_table_has_a_line_for_each_variant_and_leaves_the_sweep_out():
    row = {"fixture": "zipf", "planted_l0": 6.0, "n_planted": 256, "fvu": 0.1, "l0": 6.0, "mmcs_back": 0.7}
    numbers = {"recovered": 0.5, "matched": 0.6, "mmcs": 0.8}
    rows = [{**row, **numbers, "variant": "topk", "seed": seed} for seed in (0, 1, recovery.SWEEP_SEED)]
    rows[-1]["recovered"] = 1.0
    text = recovery.tables(rows)
    assert "| topk | 50.0 ± 0.0 | 0.600 ± 0.000 |" in text
    assert "2 seeds" in text
