import json

import pytest
import quality_report
from jsonl import append_row, markdown, mean_spread, put_section, read_rows
from quality_plan import POINTS, SAELAB


def row(package, name, point, seed, **values):
    base = {"stage": "main", "subject": "embedded", "package": package, "name": name, "point": point, "seed": seed}
    numbers = {"lr": 1e-3, "tokens": 10, "batch": 2, "l0": float(point), "dead": 0.1, "underused": 0.2}
    return {**base, **numbers, "fvu": 1 / point, "ce_recovered": 1 - 1 / point, **values}


@pytest.fixture
def rows():
    about = {"d_in": 4, "d_sae": 8, "train_tokens_distinct": 100, "test_tokens": 50, "validation_tokens": 9}
    losses = {"ce_rows": 3, "ce_clean": 1.0, "ce_zero": 3.0, "ce_mean": 2.0}
    found = [{"stage": "subject", "subject": "embedded", "site": "blocks.0.hook_resid_post", **about, **losses}]
    for seed in (0, 1, 2):
        for point in POINTS:
            found.append(row("saelab", "topk", point, seed, fvu=1 / point + 0.001 * seed))
            found.append(row("saelab", "mutual_choice", point, seed, fvu=0.5 / point + 0.001 * seed))
            found.append(row("saelens", "topk", point, seed, fvu=1.001 / point + 0.001 * seed))
    return found


def test_verdicts_follow_the_numbers(rows):
    text = quality_report.tables(rows)
    counts, claim = (line for line in text.splitlines() if line.startswith("| Mutual-Choice vs TopK, FVU"))
    assert counts.endswith("| 4 | 0 | 0 |")
    assert claim.count("better") == 4
    floor = next(line for line in text.splitlines() if line.startswith("| saelab topk vs saelens topk, fvu"))
    assert floor.count("level") == 4
    assert "| saelab topk and mutual_choice vs peers, fvu | 0 | 4 | 0 |" in text
    assert "| saelab topk | 0.126 ± 0.001 |" in text


def test_judgement():
    assert quality_report.judge((0.1, 0.01), lower_is_better=True) == "worse"
    assert quality_report.judge((0.1, 0.01), lower_is_better=False) == "better"
    assert quality_report.judge((0.1, 0.06), lower_is_better=True) == "level"
    assert quality_report.judge((0.1, float("nan")), lower_is_better=True) == "(too few seeds)"


def test_plot_is_small_and_draws_each_variant(rows, tmp_path):
    quality_report.plot(rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<polyline") == 9  # three variants in two panels and the legend
    assert len(text) < 30_000


def test_rows_are_appended_and_read(tmp_path):
    append_row(tmp_path / "a" / "r.jsonl", {"x": 1})
    append_row(tmp_path / "a" / "r.jsonl", {"x": 2.5})
    assert read_rows(tmp_path / "a" / "r.jsonl") == [{"x": 1}, {"x": 2.5}]
    assert read_rows(tmp_path / "none.jsonl") == []
    assert json.loads((tmp_path / "a" / "r.jsonl").read_text().splitlines()[0]) == {"x": 1}


def test_mean_and_spread():
    assert mean_spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert mean_spread([0.5], 1, percent=True) == "50.0"
    assert mean_spread([float("nan")]) == "-"
    assert markdown(["a", "b"], [["c", "d"]]) == "| a | b |\n|---|---:|\n| c | d |"


def test_section_of_a_page_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin t -->\nold\n<!-- end t -->\nb\n")
    put_section(page, "t", "new")
    put_section(page, "t", "newer")
    assert page.read_text() == "a\n<!-- begin t -->\n\nnewer\n\n<!-- end t -->\nb\n"
    with pytest.raises(SystemExit, match="no section"):
        put_section(page, "u", "x")


def test_runs_at_another_learning_rate_than_the_swept_one_are_left_out(rows):
    swept = {"stage": "lr", "subject": "embedded", "package": "saelab", "name": "topk", "seed": 100, "l0": 8.0}
    swept |= {"point": 8, "dead": 0.0, "knob": "k"}
    rows += [{**swept, "lr": 1e-3, "fvu": 0.2}, {**swept, "lr": 2e-3, "fvu": 0.1}]
    rows.append(row("saelab", "topk", 8, 0, lr=2e-3))
    found = quality_report.runs_of(rows, "embedded", next(v for v in SAELAB if v.name == "topk"))
    assert [r["lr"] for r in found if r["point"] == 8] == [2e-3]
    assert len([r for r in found if r["point"] == 16]) == 3
    assert "0.002: 0.1000, 8.0, 0.0% (2)" in quality_report.tables(rows)
