"""A small store, SAE and feature store of the embedded model, made once through the command line."""

import pytest

from saelab.cli.main import _run

SITE = "blocks.1.hook_resid_post"


def saelab(*args) -> int:
    """Run one command line in this process and return its exit code."""
    return _run(["--quiet", *map(str, args)])


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with code.txt, store/, train/sae/ and features/."""
    folder = tmp_path_factory.mktemp("made")
    lines = [f"def f{i}(self, value):\n    self.x{i} = [value, {i}]\n    return self.x{i}\n\n" for i in range(300)]
    (folder / "code.txt").write_text("".join(lines))
    text = ["--text", folder / "code.txt", "--tokens.context", 64]
    assert saelab("harvest", "embedded", *text, "--sites", SITE, "--out", folder / "store") == 0
    small = ["--sae.d_sae", 256, "--sae.k", 8, "--training.tokens", 20000, "--training.batch_size", 512]
    config = ["train", "configs/demo-topk.yaml", "--store", folder / "store", "--site", SITE]
    assert saelab(*config, *small, "--out", folder / "train") == 0
    sae = folder / "train" / "sae"
    assert saelab("build", sae, *text[:2], "--max_tokens", 4000, "--out", folder / "features") == 0
    return folder
