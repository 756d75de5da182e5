"""Configs: round trip, overrides, registry errors. One-line errors are tested with the command line."""

import pytest

from saelab.core import config
from saelab.core.errors import ConfigError, MissingFileError
from saelab.core.registry import Registry


class Inner(config.Config):
    a: int = 1


class Outer(config.Config):
    inner: Inner = Inner()
    b: float = 2.0


def test_yaml_round_trip(tmp_path):
    original = Outer(inner=Inner(a=5), b=0.25)
    (tmp_path / "c.yaml").write_text(config.dump_yaml(original))
    assert config.load_config(Outer, tmp_path / "c.yaml") == original
    assert config.load_config(Outer, tmp_path / "c.yaml", {"inner.a": 7}).inner.a == 7


def test_overrides_do_not_change_their_input():
    data = {"inner": {"a": 1}}
    assert config.apply_overrides(data, {"inner.a": 2, "b": 3, "new.deep.key": 4}) == {
        "inner": {"a": 2},
        "b": 3,
        "new": {"deep": {"key": 4}},
    }
    assert data == {"inner": {"a": 1}}


def test_missing_file_and_frozen(tmp_path):
    with pytest.raises(MissingFileError, match="config file not found"):
        config.load_yaml(tmp_path / "no.yaml")
    with pytest.raises(ValueError, match="frozen"):
        Outer().b = 3.0
    assert config.load_config(Outer, _empty(tmp_path)) == Outer()


def _empty(folder):
    path = folder / "empty.yaml"
    path.touch()
    return path


def test_registry_names_the_nearest():
    registry = Registry("architecture")
    registry.register("topk", 1)
    assert registry["topk"] == 1
    assert list(registry.items()) == [("topk", 1)]
    with pytest.raises(ConfigError, match=r"unknown architecture 'topkk'; did you mean topk\? \(known: topk\)"):
        registry["topkk"]
