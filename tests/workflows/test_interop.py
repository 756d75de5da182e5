"""Export through the command line, import back: the same reconstructions of raw activations."""

import json

import pytest
import torch

from saelab.sae.folder import load_meta, load_sae
from tests.made import SITE, saelab


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "openmoss"])
def test_round_trip_keeps_reconstructions(made, tmp_path, name):
    source = made / "train" / "sae"
    assert saelab("export", source, "--format", name, "--out", tmp_path / "theirs") == 0
    assert saelab("import", tmp_path / "theirs", "--out", tmp_path / "back") == 0
    x = 3 * torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    before, after = load_sae(source), load_sae(tmp_path / "back")
    assert torch.allclose(before(x), after(x), atol=1e-4)
    assert load_meta(tmp_path / "back")["imported"]["format"] == name


def test_another_librarys_folder_is_evaluated_as_it_is(made, tmp_path, capsys):
    source = made / "train" / "sae"
    assert saelab("export", source, "--format", "saelens", "--out", tmp_path / "theirs") == 0
    text = ["--text", made / "code.txt", "--tokens.context", 64, "--max_tokens", 2000, "--json"]
    found = []
    for command in (["eval", source], ["eval", tmp_path / "theirs", "--model", "embedded", "--site", SITE]):
        capsys.readouterr()
        assert saelab(*command, *text) == 0
        found.append(json.loads(capsys.readouterr().out))
    for name in ("fvu", "l0", "ce_recovered", "ce_sae"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    assert saelab("eval", tmp_path / "theirs", *text) == 1
    assert "give --model" in capsys.readouterr().err


def test_bad_input(made, tmp_path, capsys):
    assert saelab("import", made / "train" / "sae", "--out", tmp_path / "o") == 1
    assert "is a saelab folder" in capsys.readouterr().err
    assert saelab("export", made / "train" / "sae", "--format", "saelenz", "--out", tmp_path / "o") == 1
    assert "did you mean saelens" in capsys.readouterr().err
    assert saelab("import", tmp_path / "none", "--out", tmp_path / "o") == 1
    assert "does not exist" in capsys.readouterr().err
