"""How good the embedded model is: bits per byte against file compressors and n-grams, induction, completions.

    python benchmarks/embedded_model.py [--model FOLDER] [--json FILE]

All figures are for the files of ``stdlib:heldout`` of the Python that runs this. The model reads windows of 256 tokens
that move on by 128; xz sees all files as one stream; "given train" is what the held-out files add to the compressed
training files, within one window.
"""

import argparse
import json
import lzma
import time
from pathlib import Path
from typing import Any

import torch
from ngram import ngram_bits_per_byte
from rich.console import Console
from rich.table import Table

from saelab.core.assets import embedded_model_dir
from saelab.models.language import compression, induction
from saelab.models.probes import probe
from saelab.models.text import open_text

# No prompt ends in a space: a tokenizer of this kind joins the space to the word that follows.
PROMPTS = (
    "import os\nimport sys\n",
    "class Reader:\n    def __init__(self, stream, size):\n        self.stream = stream\n        self.size =",
    "def total(items, weight):\n    result = 0\n    for item in",
    "if __name__ ==",
    "    def close(self):\n",
    "try:\n    value = mapping[key]\nexcept",
    "x = foo(bar[0",
)


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a model folder (default: the embedded model)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    arguments = parser.parse_args()
    result = measure(arguments.model or embedded_model_dir())
    show(result, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path) -> dict[str, Any]:
    """Measure everything; takes a few minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = model.config.n_positions
    texts = list(open_text("stdlib:heldout"))
    heldout = [text.encode() for text in texts]
    train = b"".join(text.encode() for text in open_text("stdlib:train"))
    started = time.perf_counter()
    measured = compression(model, tokenizer, texts, context=context)
    seconds = time.perf_counter() - started
    size = measured.utf8_bytes
    joined = b"".join(heldout)
    ordinary = torch.arange(1, len(tokenizer))
    ids = torch.tensor([i for code in tokenizer.backend_tokenizer.encode_batch(texts) for i in code.ids])
    return {
        "heldout_files": len(texts),
        "heldout_bytes": size,
        "train_bytes": len(train),
        "bits_per_byte": {
            "embedded model": measured.bits_per_byte,
            "n-gram, order 5, train only": ngram_bits_per_byte(train, heldout, 5, 0.0),
            "n-gram, order 7, train and the file so far (weight 8)": ngram_bits_per_byte(train, heldout, 7, 8.0),
            "xz -9e": 8 * xz(joined) / size,
            "xz -9e, given train": 8 * (xz(train + joined) - xz(train)) / size,
        },
        "loss": measured.loss,
        "tokens": measured.tokens,
        "tokens_per_second": measured.tokens / seconds,
        "induction": {
            "uniform": induction(model, ordinary, tokenizer.bos_token_id).to_dict(),
            "as frequent as in held-out text": induction(model, ids, tokenizer.bos_token_id).to_dict(),
        },
        "probes": probe(model, tokenizer, texts, context=context).to_dict(),
        "completions": {prompt: complete(model, tokenizer, prompt) for prompt in PROMPTS},
    }


def xz(data: bytes) -> int:
    """Size of ``data`` under xz -9e with a dictionary that holds all of it."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 24) -> str:
    """Continue ``prompt`` greedily."""
    ids = [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(prompt).ids]
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:]))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table("on held-out files", "bits per byte", title="Compression")
    for name, value in sorted(result["bits_per_byte"].items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    table = Table("probe", "places", "accuracy", "best constant answer", title="What it knows")
    for name, found in result["probes"].items():
        table.add_row(name, str(found["places"]), f"{found['accuracy']:.3f}", f"{found['chance']:.3f}")
    console.print(table)
    table = Table(
        "64 random tokens", "loss", "on the repetition", "score", "first choice right", title="Induction (nats)"
    )
    for name, found in result["induction"].items():
        values = [f"{found[key]:.2f}" for key in ("first", "second", "score")]
        table.add_row(name, *values, f"{found['accuracy']:.1%}")
    console.print(table)
    for prompt, text in result["completions"].items():
        console.print(f"{prompt!r} -> {text!r}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
