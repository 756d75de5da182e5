"""Features per second of everything in auto-interpretation that is not the language model, beside delphi's own code.

    python benchmarks/autointerp.py STORE [--features N] [--only saelab|delphi] [--rounds R]

STORE is a feature store (``saelab demo`` makes one). saelab works on the store; delphi gets the same activations in its
own cache format, written here, and its own code (``.venv-peers/delphi``: ``benchmarks/peers/setup.sh delphi``)
makes examples of the same features with the same numbers of windows. The two take turns, ``--rounds`` times, one thread
each; the least CPU time of each is reported, as a table in Markdown, and as JSON with ``--json``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peers" / "delphi" / "bin" / "python"


def saelab_times(store_path: str, count: int) -> dict[str, float]:
    """CPU seconds of each part for ``count`` features."""
    import numpy as np
    import torch

    from saelab.analysis.autointerp.embedders import CharacterEmbedder
    from saelab.analysis.autointerp.examples import Corpus, ExamplesConfig
    from saelab.analysis.autointerp.explainers.language_model import LanguageModelExplainer
    from saelab.analysis.autointerp.explainers.token_set import TokenSetExplainer
    from saelab.analysis.autointerp.judge import CountingJudge
    from saelab.analysis.autointerp.scorers import (
        DetectionScorer,
        EmbeddingScorer,
        ExampleEmbeddingScorer,
        FuzzingScorer,
        SurfaceScorer,
    )
    from saelab.analysis.autointerp.scorers.base import ScoringConfig
    from saelab.features.store import open_features

    torch.set_num_threads(1)
    store = open_features(store_path)
    live = np.flatnonzero(np.asarray(store.column("count")) > 0)[:count]
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds[name] = time.process_time() - started
        return result

    # The sizes of delphi's defaults: 40 windows to explain by, 50 to score on, 50 random negatives.
    config = ExamplesConfig(random=50, decoder=0, coactive=0, embedding=0, contrast=0)
    corpus = timed("windows", lambda: Corpus(store, config, features=live))

    def examples() -> list[Any]:
        found = [corpus.examples(i) for i in live.tolist()]
        for one in found:
            if one is not None:
                for sample in (one.explain, one.score, one.negatives):
                    for k in range(len(sample)):
                        sample.tokens(k)
        return [one for one in found if one is not None]

    made = timed("examples, with token texts", examples)
    seconds["scorable"] = float(len(made))
    scoring = ScoringConfig()
    explained = timed("token-set explanations", lambda: TokenSetExplainer().explain(made))
    pairs = list(zip(made, explained, strict=True))
    timed(
        "detection and fuzzing by rule",
        lambda: (DetectionScorer(scoring).score(pairs), FuzzingScorer(scoring).score(pairs)),
    )
    embedder = CharacterEmbedder(corpus.texts)
    corpus.embedder = embedder
    timed("embeddings of all windows", lambda: corpus.embeddings)
    timed("embedding score", lambda: EmbeddingScorer(scoring, embedder).score(pairs))
    timed("example-embedding score", lambda: ExampleEmbeddingScorer(scoring, embedder).score(pairs))
    timed("surface score", lambda: SurfaceScorer(scoring, embedder).score(pairs))
    judge = CountingJudge("none", stand_in="[1]")
    timed(
        "prompts of explainer, detection, fuzzing",
        lambda: _prompts(judge, LanguageModelExplainer(judge), scoring, pairs),
    )
    hard = Corpus(store, ExamplesConfig(embedding=0), features=live)
    timed("examples with hard negatives", lambda: [hard.examples(i) for i in live.tolist()])
    return seconds


def _prompts(judge: Any, explainer: Any, scoring: Any, pairs: list[Any]) -> None:
    from saelab.analysis.autointerp.scorers import DetectionScorer, FuzzingScorer

    explainer.explain([examples for examples, _ in pairs])
    for scorer in (DetectionScorer(scoring, judge), FuzzingScorer(scoring, judge)):
        for pair in pairs:
            scorer.questions(pair)


def write_cache(store_path: str, folder: Path, count: int) -> None:
    """Write the activations of a store in the format of delphi's cache, one file for all features."""
    import numpy as np
    from safetensors.numpy import save_file

    from saelab.features import layout
    from saelab.features.store import open_features

    store = open_features(store_path)
    offsets = np.asarray(store.array(layout.ROW_OFFSETS))
    width = int(np.diff(offsets).max())
    width -= width % 32
    table = np.zeros((store.n_rows, width), np.int64)
    ids = np.asarray(store.array(layout.IDS))
    row_of = np.repeat(np.arange(store.n_rows), np.diff(offsets))
    column_of = np.arange(store.n_tokens) - offsets[row_of]
    inside = column_of < width
    table[row_of[inside], column_of[inside]] = ids[inside]
    live = np.flatnonzero(np.asarray(store.column("count")) > 0)[:count]
    bounds = np.asarray(store.array(layout.F_INDPTR))
    tokens = np.concatenate([store.array(layout.F_TOKENS)[bounds[i] : bounds[i + 1]] for i in live]).astype(np.int64)
    values = np.concatenate([store.array(layout.F_VALUES)[bounds[i] : bounds[i + 1]] for i in live])
    feature = np.repeat(np.arange(len(live)), (bounds[live + 1] - bounds[live]))
    keep = inside[tokens]
    locations = np.stack([row_of[tokens[keep]], column_of[tokens[keep]], feature[keep]], 1)
    # delphi reads rows in order of the text within a feature, which they are in
    module = folder / "latents" / "site"
    module.mkdir(parents=True)
    data = {"locations": locations.astype(np.uint32), "activations": values[keep], "tokens": table.astype(np.uint32)}
    save_file(data, module / f"0_{len(live) - 1}.safetensors")
    about = {"model_name": "none", "ctx_len": width, "dataset_repo": "", "dataset_split": "", "dataset_name": ""}
    (module / "config.json").write_text(json.dumps(about))
    (folder / "vocabulary.json").write_text(json.dumps(store.vocabulary.strings(range(len(store.vocabulary)))))


def delphi_times(cache: Path) -> dict[str, float]:
    """Run delphi's code under its own interpreter."""
    script = ROOT / "benchmarks" / "peers" / "delphi_examples.py"
    done = subprocess.run([PEER, "-W", "ignore", script, cache], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"delphi could not run:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--only", choices=("saelab", "delphi"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from saelab.core.progress import set_progress

    set_progress(False)
    best: dict[str, dict[str, float]] = {"saelab": {}, "delphi": {}}
    with tempfile.TemporaryDirectory() as folder:
        peer = options.only != "saelab" and PEER.exists()
        if peer:
            write_cache(options.store, Path(folder), options.features)
        for _ in range(options.rounds):
            runs = {} if options.only == "delphi" else {"saelab": saelab_times(options.store, options.features)}
            if peer:
                runs["delphi"] = delphi_times(Path(folder))
            for name, found in runs.items():
                for part, value in found.items():
                    best[name][part] = min(value, best[name].get(part, value))
    if options.json:
        print(json.dumps(best))
        return
    for name, found in best.items():
        scorable = found.pop("scorable", 0.0)
        if not found:
            continue
        print(f"\n{name}: {options.features} features asked for, {scorable:.0f} with enough windows\n")
        print("| part | CPU seconds | features/s |\n|---|---|---|")
        for part, value in found.items():
            print(f"| {part} | {value:.2f} | {scorable / value:,.0f} |")
    if not peer and options.only != "saelab":
        print("\ndelphi is not installed here: benchmarks/peers/setup.sh delphi")


if __name__ == "__main__":
    main()
