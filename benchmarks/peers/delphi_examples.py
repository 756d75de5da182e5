"""delphi's own code on a cache of activations: CPU seconds of the examples of features, and of two embedding scores.

Runs under delphi's interpreter; see ``benchmarks/autointerp.py``. delphi imports vllm, bitsandbytes and (for its hard
negatives) a sentence-transformers model on import; no code of theirs runs here, so empty modules stand in for the two
that need a GPU. Nothing else of delphi is replaced.
"""

import asyncio
import json
import logging
import random
import sys
import time
import types
from pathlib import Path

import torch


def stand_in(name: str, **attributes: object) -> None:
    """Put an empty module in the place of one that is not installed."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


class Anything:
    """For names that are imported and not used."""


stand_in("vllm", LLM=Anything, SamplingParams=Anything)
stand_in("vllm.distributed")
stand_in("vllm.distributed.parallel_state", destroy_distributed_environment=Anything, destroy_model_parallel=Anything)
stand_in("vllm.inputs", TokensPrompt=Anything)
stand_in("bitsandbytes", BitsAndBytesConfig=Anything)


class Tokenizer:
    """Token texts by number: as much of a tokenizer as delphi's examples need, and faster than a real one."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        """Text of each id."""
        return [self.words[i] for i in ids.tolist()]


class Embedder:
    """Instead of a sentence-transformers model: vectors at no cost, so that delphi's own work is what is measured."""

    def encode(self, texts: list[str] | str) -> torch.Tensor:
        """One fixed vector for each text."""
        return torch.ones(8) if isinstance(texts, str) else torch.ones(len(texts), 8)

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Inner products."""
        return torch.atleast_2d(a).float() @ torch.atleast_2d(b).float().T


def main() -> None:
    """Measure and print one JSON object."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from delphi.scorers import EmbeddingScorer, ExampleEmbeddingScorer

    words = json.loads((folder / "vocabulary.json").read_text())
    constructor = ConstructorConfig(
        example_ctx_len=32, min_examples=10, n_non_activating=50, non_activating_source="random"
    )
    sampler = SamplerConfig(n_examples_train=40, n_examples_test=50, n_quantiles=10, train_type="quantiles")
    started = time.process_time()
    dataset = LatentDataset(
        folder / "latents", sampler, constructor, tokenizer=Tokenizer(words), modules=["site"], latents=None
    )
    opened = time.process_time()

    async def collect() -> list:
        return [record async for record in dataset]

    records = [record for record in asyncio.run(collect()) if record is not None]
    made = time.process_time()
    usable = [r for r in records if r.test and r.train and r.not_active]
    for record in usable:
        record.explanation = "something"
    random.seed(0)
    seconds = {"windows": opened - started, "examples, with token texts": made - opened, "scorable": float(len(usable))}
    for name, scorer in (
        ("embedding score", EmbeddingScorer(Embedder())),
        ("example-embedding score", ExampleEmbeddingScorer(Embedder())),
    ):
        started, done = time.process_time(), 0
        for record in usable:
            try:
                scorer.call_sync(record)
                done += 1
            except ValueError:  # too few negatives to draw from: delphi raises
                continue
        seconds[name] = (time.process_time() - started) * len(usable) / max(done, 1)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
