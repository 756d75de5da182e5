"""saelab dashboard: one file, and one line for what is wrong."""

import json

from tests.app.planted import plant
from tests.made import saelab


def test_one_file_from_a_folder_with_one_store(tmp_path, capsys):
    plant(tmp_path / "run" / "features")
    out = tmp_path / "two.html"
    assert saelab("dashboard", 1, 2, "--store", tmp_path / "run", "--html", out, "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"path": str(out), "features": [1, 2], "bytes": out.stat().st_size}
    text = out.read_text(encoding="utf-8")
    assert text.count("<section") == 2
    assert "<script" not in text

    assert saelab("dashboard", 1, "--store", tmp_path / "run", "--html", out) == 1
    assert "already exists; add --force to replace it" in capsys.readouterr().err
    assert saelab("dashboard", 9, "--store", tmp_path / "run", "--html", out, "--force") == 1
    assert "feature 9 does not exist" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == text

    plant(tmp_path / "run" / "more")
    assert saelab("dashboard", 1, "--store", tmp_path / "run", "--html", out, "--force") == 1
    assert "holds 2 feature stores; give one" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert saelab("dashboard", 1, "--store", tmp_path / "nothing", "--html", out, "--force") == 1
    assert "no feature store in" in capsys.readouterr().err
