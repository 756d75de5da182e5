"""Commands made from config classes: every key is an option, and mistakes are one line."""

from typing import Literal

import click
import pytest
from pydantic import Field

from saelab.cli.options import config_command, force_option
from saelab.core.config import Config
from saelab.core.errors import ConfigError


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
