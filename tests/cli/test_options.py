"""Commands made from config classes: every key is an option, and mistakes are one line."""

import os
import subprocess
import sys
from typing import Literal

import click
import pytest
from pydantic import Field

from saelab.cli import option_cache, options
from saelab.cli.options import config_command, force_option
from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.models.pretrain_config import PretrainConfig


class Inner(Config):
    k: int = Field(default=8, ge=1)
    """Features per token."""
    lr: float | None = None


class Other(Config):
    kind: Literal["a", "b"] = "a"
    name: str = "x"


class Job(Config):
    sae: Inner = Inner()
    other: Other = Other()
    sites: list[str] = []
    only: list[int] | None = None
    fast: bool = False


def call(tmp_path, *args, yaml=None, positional=None):
    seen = []
    command = config_command("job", Job, lambda job, force: seen.append((job, force)), extra=[force_option()])
    arguments = list(args)
    if yaml is not None:
        path = tmp_path / "c.yaml"
        path.write_text(yaml)
        arguments.insert(0, str(path))
    command.main(args=arguments, standalone_mode=False)
    return seen[0]


def test_defaults_then_yaml_then_options(tmp_path):
    job, force = call(tmp_path)
    assert job == Job()
    assert not force
    job, force = call(
        tmp_path, "--sae.lr", "1e-3", "--sites", "a", "--sites", "b", "--fast", "true", "--force", yaml="sae: {k: 16}"
    )
    assert (job.sae.k, job.sae.lr, job.sites, job.fast, force) == (16, 1e-3, ["a", "b"], True, True)
    job, _ = call(tmp_path, "--sae.k=4", "--other.name", "12", "--sae.lr", "null", yaml="sae: {k: 16, lr: 2}")
    assert (job.sae.k, job.sae.lr, job.other.name) == (4, None, "12")


@pytest.mark.parametrize(
    ("given", "wanted"), [(["3"], [3]), (["3", "5"], [3, 5]), (["[3, 5]"], [3, 5]), (["null"], None), ([], [7])]
)
def test_lists_that_may_be_null(tmp_path, given, wanted):
    job, _ = call(tmp_path, *(word for one in given for word in ("--only", one)), yaml="only: [7]")
    assert job.only == wanted


def test_unknown_option_names_the_nearest(tmp_path):
    with pytest.raises(click.UsageError, match=r"unknown option '--sae.kk'; did you mean --sae.k"):
        call(tmp_path, "--sae.kk", "3")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("sae: {kk: 3}", r"c.yaml: unknown key 'sae.kk'; did you mean sae.k"),
        ("sae: {k: many}", r"'sae.k': input should be a valid integer.*got 'many'"),
        ("sae: {k: 0}", r"'sae.k': input should be greater than or equal to 1, got 0"),
        ("other: {kind: c}", r"'other.kind': input should be 'a' or 'b', got 'c'"),
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, yaml, message):
    with pytest.raises(ConfigError, match=message) as error:
        call(tmp_path, yaml=yaml)
    assert "\n" not in str(error.value)


def test_wrong_type_on_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match=r"command line: 'sae.k': input should be a valid integer"):
        call(tmp_path, "--sae.k", "many")


def test_help_lists_every_key_with_default_and_description(capsys):
    command = config_command("job", Job, lambda job: None)
    command.main(args=["--help"], standalone_mode=False)
    text = capsys.readouterr().out
    for part in ("--sae.k INT", "Features per token.", "[default: 8]", "--other.kind a|b", "--fast BOOL"):
        assert part in text


def test_kept_options_are_those_of_the_class_until_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place, made = "saelab.models.pretrain_config:PretrainConfig", []

    def make(config_class):
        made.append(config_class)
        return options._fields(config_class)

    first = option_cache.kept_fields(place, make)
    assert option_cache.kept_fields(place, make) == first
    assert made == [PretrainConfig]
    assert first == options._fields(PretrainConfig)
    (file,) = (tmp_path / "saelab").iterdir()
    monkeypatch.setattr(option_cache, "_state", lambda: "another")
    assert option_cache.kept_fields(place, make) == first
    assert len(made) == 2
    file.write_text('{"state": "another", "fields": [{"broken": 1}]}')
    assert option_cache.kept_fields(place, make) == first
    assert len(made) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file: nothing can be kept there
    assert option_cache.kept_fields(place, make) == first


def test_help_of_a_command_imports_torch_once(tmp_path):
    code = (
        "import sys; from saelab.cli.main import _run; assert _run(['train', '--help']) == 0; "
        "assert _run(['train', '--lr', '3']) == 2; print('torch' in sys.modules)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    said = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)]
    said += [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)]
    outputs = [done.stdout.rsplit("\n", 2) for done in said]
    assert [output[1] for output in outputs] == ["True", "False"]
    assert outputs[0][0] == outputs[1][0]
    assert said[0].stderr == said[1].stderr
    assert "unknown option '--lr'" in said[0].stderr
