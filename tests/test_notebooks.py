"""The notebooks are scripts that teach: a title, prose, no outputs. ``make notebooks`` runs them."""

import ast
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("0*.py"))


def test_there_are_eight():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"0{k}" for k in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_title_prose_and_code_that_parses(path):
    notebook = jupytext.read(path)
    assert notebook.cells[0].source.startswith(f"# {int(path.name[:2])}. ")
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= 5
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert not cell.outputs


def test_the_table_lists_every_notebook():
    page = (NOTEBOOKS[0].parents[1] / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"`{path.stem}`" in page
