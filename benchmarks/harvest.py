"""How much of the bare forward pass is left when activations are harvested to disk, and what the early stop saves.

    python benchmarks/harvest.py [--model embedded] [--tokens 300000] [--json FILE]

"bare" runs Hugging Face's own model, as it loads it, cut after the layer of the site (no language-model head) over the
same token rows, tokenised beforehand. "harvest" is the whole job: tokenising, reading, filtering, checksums, files,
fsync. The two alternate and the best of each counts, since other processes only ever slow one down. "CPU ratio"
compares processor seconds of all threads instead of wall-clock seconds; it holds on a busy machine too.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.core.progress import set_progress
from saelab.models.loading import quiet
from saelab.models.subject import SubjectModel, load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig

ROWS_PER_BATCH = 16
FLOOR = 0.9


@contextmanager
def cut_after(model: SubjectModel, plain: torch.nn.Module, layer: int) -> Iterator[torch.nn.Module]:
    """Yield the base of ``plain``, which is what ``model`` is, with the blocks above ``layer`` taken out."""
    address = model.site(f"blocks.{layer}.hook_resid_post").address
    assert address is not None, "the residual stream is the output of a block"
    parent_path, _, _ = address.module.rpartition(".")
    owner_path, _, name = parent_path.rpartition(".")
    owner, blocks = plain.get_submodule(owner_path), plain.get_submodule(parent_path)
    setattr(owner, name, torch.nn.ModuleList(list(blocks.children())[: layer + 1]))
    try:
        yield plain.base_model  # type: ignore[misc]
    finally:
        setattr(owner, name, blocks)


def best(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least wall-clock seconds, and least processor seconds of all threads, of several calls."""
    times = []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - began, time.process_time() - began_cpu))
    wall, processor = zip(*times, strict=True)
    return min(wall), min(processor)


def compare(model: SubjectModel, rows: TokenRows, layer: int, folder: Path, repeats: int) -> dict[str, float]:
    """Time the bare pass and the harvest over the same rows, by turns."""
    batches = [batch.tokens for batch in rows.batches(ROWS_PER_BATCH)]
    positions = sum(batch.numel() for batch in batches)
    site = f"blocks.{layer}.hook_resid_post"
    assert model.folder is not None
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype).eval()

    def bare() -> None:
        with cut_after(model, plain, layer) as base, torch.inference_mode():
            for tokens in batches:
                base(tokens, use_cache=False)

    def whole() -> None:
        config = HarvestConfig(max_tokens=positions, rows_per_batch=ROWS_PER_BATCH)
        harvest(model, rows, [site], folder / "store", config)

    def harvested() -> tuple[float, float]:
        took = best(whole, 1)
        shutil.rmtree(folder / "store")
        return took

    bare()
    turns = [(*best(bare, 1), *harvested()) for _ in range(repeats)]
    bare_s, bare_cpu, harvest_s, harvest_cpu = (min(column) for column in zip(*turns, strict=True))
    return {
        "positions": positions,
        "bare_tokens_per_s": positions / bare_s,
        "harvest_tokens_per_s": positions / harvest_s,
        "ratio": bare_s / harvest_s,
        "cpu_ratio": bare_cpu / harvest_cpu,
    }


def early_stop(model: SubjectModel, rows: TokenRows, repeats: int) -> dict[str, float]:
    """Milliseconds of reading one batch at the residual stream of each layer, and of the whole model."""
    tokens = next(iter(rows.batches(ROWS_PER_BATCH))).tokens
    found = {}
    for layer in range(model.n_layers):
        site = f"blocks.{layer}.hook_resid_post"
        found[site] = 1e3 * best(lambda site=site: model.read(tokens, site), repeats)[0]  # type: ignore[misc]
    found["logits"] = 1e3 * best(lambda: model.logits(tokens), repeats)[0]
    return found


def main() -> None:
    """Run and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    model = load_model(arguments.model)
    rows = TokenRows(
        model.tokenizer,
        open_text(arguments.text),
        TokensConfig(context=min(256, model.n_ctx), max_tokens=arguments.tokens),
        model.n_ctx,
    )
    results: dict[str, Any] = {"model": arguments.model, "threads": torch.get_num_threads(), "sites": {}}
    table = Table(title=f"harvest of {arguments.model}, {torch.get_num_threads()} threads (floor {FLOOR})")
    for column in ("site", "bare tok/s", "harvest tok/s", "ratio", "CPU ratio", "read ms/batch"):
        table.add_column(column, justify="left" if column == "site" else "right")
    stop = early_stop(model, rows, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        for layer in sorted({model.n_layers // 2, model.n_layers - 1}):
            site = f"blocks.{layer}.hook_resid_post"
            row = compare(model, rows, layer, Path(folder), arguments.repeats)
            results["sites"][site] = {**row, "read_ms": stop[site]}
            table.add_row(
                site,
                f"{row['bare_tokens_per_s']:,.0f}",
                f"{row['harvest_tokens_per_s']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['cpu_ratio']:.2f}",
                f"{stop[site]:.1f}",
            )
    table.add_row("(logits)", "", "", "", "", f"{stop['logits']:.1f}")
    results["logits_ms"] = stop["logits"]
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
