"""Every config in configs/ can be run by a new user: the commands in its header, as they stand but shorter."""

import os
import shlex
import sys

import click
import pytest

from saelab.cli.main import _run
from saelab.core.assets import asset
from saelab.core.config import load_config
from saelab.models.pretrain_config import PretrainConfig
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.workflows.codebook import CodebookJob
from tests.docs.snippets import parse

ROOT = asset("configs")
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))
RUN = [name for name in CONFIGS if "/" not in name and not name.startswith("pretrain")]

SHORT = {
    "harvest": "--harvest.max_tokens 6000",
    "train": "--training.tokens 4096 --training.batch_size 512 --training.init_tokens 2048",
    "codebook": "--training.steps 3 --training.rows 2 --max_rows 20 --eval_rows 4",
    "configs/contrastive.yaml": "--pairs.max_pairs 300 --training.tokens 1024 --training.batch_size 256",
    "configs/end-to-end.yaml": "--training.tokens 1024 --training.batch_size 256 --training.init_tokens 512",
    "configs/codebook-tokfsm.yaml": "--training.steps 3 --training.rows 2 --eval_rows 4",
}
"""Options put after a header's own (the last one counts); what names a config counts before what names a command."""


def header(name: str) -> list[list[str]]:
    """Return the arguments of the ``saelab`` commands in a config's leading comment."""
    lines = [line.removeprefix("#").strip() for line in (ROOT / name).read_text().splitlines() if line.startswith("#")]
    starts = [(line, line.rfind("saelab ")) for line in lines if "saelab " in line and "`saelab " not in line]
    return [shlex.split(line[at:])[1:] for line, at in starts]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_known_keys_and_a_header_of_real_commands(name):
    if name.startswith("sparsity/"):  # a part of a job: --recipe or --sparsity
        load_config(TrainingRecipe if "/training/" in name else Recipe, ROOT / name)
        return
    commands = header(name)
    assert any(f"configs/{name}" in words for words in commands), f"{name} does not say how to run it"
    if name.startswith(("codebook", "pretrain")):  # a TrainJob looks at its store, so running it (below) is its test
        load_config(CodebookJob if name.startswith("codebook") else PretrainConfig, ROOT / name)
    for words in commands:
        try:
            parse(words)
        except click.UsageError as error:
            pytest.fail(f"{name}: saelab {shlex.join(words)}: {error.format_message()}")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Folder of what headers harvest, each command once, and of an SAE for what starts from one."""
    return tmp_path_factory.mktemp("stores")


def run(words: list[str]) -> None:
    extra = SHORT.get(words[1], SHORT.get(words[0], ""))
    assert _run(["--quiet", *words, *extra.split()]) == 0, f"saelab {shlex.join(words)}"
    sys.stdout.flush()


def ready(words: list[str], stores) -> None:
    """Make what a header's first command makes, or link to what another config's header has made."""
    kept, out = stores / shlex.join(words).replace("/", "_"), words[words.index("--out") + 1]
    os.makedirs("runs", exist_ok=True)
    if not kept.exists():
        run(words)
        os.rename(out, kept)
    os.symlink(kept, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_config_runs_as_its_header_says(name, stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "end-to-end.yaml":
        for words in header("demo-topk.yaml"):
            ready(words, stores)
    for words in header(name):
        if words[0] == "harvest":
            ready(words, stores)
        elif words[1].startswith("configs/"):
            run(words)
