"""A training in a process of its own, to be killed: ``python crash_script.py OUT RESUME [STEP_SECONDS]``."""

import sys
import time
from collections.abc import Iterator

import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import SaelabError
from saelab.training import FitConfig, fit
from tests.training.planted import PlantedSource

STEPS, ROWS = 60, 64


def configs() -> list[FitConfig]:
    training = {"tokens": STEPS * ROWS, "batch_size": ROWS, "checkpoint_every": 7, "log_every": 5, "init_tokens": 200}
    training |= {"dead_after_tokens": 300, "lr": 1e-2, "k_warmup": 0.2}
    return [
        parse_config(FitConfig, {"name": name, "sae": {"d_in": 16, "d_sae": 96, "k": k}, "training": training})
        for name, k in (("a", 4), ("b", 2))
    ]


class Slow(PlantedSource):
    """Says when a step begins, and takes its time."""

    seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            print(self.position, flush=True)
            time.sleep(self.seconds)
            yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    source = Slow(16, 24, ROWS)
    source.seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    try:
        fit(configs(), source, sys.argv[1], resume=sys.argv[2] == "resume")
    except SaelabError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
