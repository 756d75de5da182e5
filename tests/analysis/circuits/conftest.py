"""Models and batches of the circuit tests, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.models.components import Components
from saelab.models.subject import load_model
from tests.models.tiny import tiny_gpt2, tiny_llama


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Components]:
    """A hand-set model by name, taken apart."""
    from saelab.analysis.circuits.known import write_known

    made: dict[str, Components] = {}

    def get(name: str) -> Components:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Components(load_model(str(write_known(name, folder))))
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Components]:
    """A random model: ``gpt2``, or ``llama`` with shared key-value heads."""
    made: dict[str, Components] = {}

    def get(name: str) -> Components:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            made[name] = Components(load_model(str((tiny_gpt2 if name == "gpt2" else tiny_llama)(folder))))
        return made[name]

    return get


def random_batch(model: Any, n: int = 5, length: int = 7, seed: int = 0) -> Any:
    """A task of random tokens, of prompts of different lengths."""
    from saelab.analysis.circuits.tasks import TaskBatch

    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(1, model.d_vocab, (n, length), generator=generator) for _ in range(2))
    readout = torch.randint(length - 3, length, (n,), generator=generator)
    right, wrong = torch.arange(n)[:, None] % 5, torch.arange(n)[:, None] % 5 + 6
    return TaskBatch("random", clean, corrupted, readout, right, wrong)
