"""What each score without a judge gives where the truth is one token, to tell a method's limit from a mistake.

    python benchmarks/planted_tokens.py STORE [--features 48] [--json FILE]

STORE is a feature store of a model with tied embeddings (``saelab demo`` makes one). On its text a dictionary is set by
hand at ``hook_embed``: feature i fires exactly where a token drawn at random is (30 to 600 times in the text). Its
token set is that token, so detection and fuzzing must be 1; what the others give is as much as embedder and model can.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.analysis.autointerp import scorers
from saelab.analysis.autointerp.controls import ControlDictionary, StoreRows
from saelab.analysis.autointerp.embedders import CharacterEmbedder
from saelab.analysis.autointerp.examples import Corpus, ExamplesConfig
from saelab.analysis.autointerp.explainers.token_set import TokenSetExplainer
from saelab.analysis.autointerp.intervals import mean
from saelab.analysis.autointerp.scorers.base import ScoringConfig
from saelab.core.progress import set_progress
from saelab.features import layout
from saelab.features.build import build_features
from saelab.features.store import FeatureStore, open_features
from saelab.models.subject import load_model

SITE = "hook_embed"
RAREST, COMMONEST = 30, 600


def detectors(model: Any, store: FeatureStore, count: int) -> tuple[ControlDictionary, np.ndarray]:
    """Directions and cut-offs that tell one token's embedding from all others; and the tokens."""
    ids = np.asarray(store.array(layout.IDS))[np.asarray(store.array(layout.KEEP)).astype(bool)]
    times = np.bincount(ids, minlength=model.d_vocab)
    known = np.flatnonzero((times >= RAREST) & (times <= COMMONEST))
    tokens = np.sort(np.random.default_rng(0).choice(known, count, replace=False))
    embedding = model.plain.get_input_embeddings().weight.detach().float()
    directions = (embedding / embedding.norm(dim=1, keepdim=True))[tokens].T.contiguous()
    values = embedding @ directions
    place = torch.from_numpy(tokens), torch.arange(count)
    own = values[place].clone()
    values[place] = -torch.inf
    assert bool((own > values.amax(0)).all()), "a token's embedding is not the nearest to itself"
    cut = (own + values.amax(0)) / 2
    return ControlDictionary("planted tokens", directions, torch.zeros(len(embedding[0])), cut=cut), tokens


def main() -> None:
    """Plant, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--features", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    set_progress(False)
    store = open_features(args.store)
    model, scoring = load_model(str(store.manifest["model"])), ScoringConfig()
    dictionary, _ = detectors(model, store, args.features)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        planted = build_features(model, dictionary, StoreRows(store), SITE, Path(folder) / "planted", nearest=False)
        corpus = Corpus(planted, ExamplesConfig(), W_dec=dictionary.W_dec)
        corpus.embedder = embedder = CharacterEmbedder(corpus.texts)
        items = [one for i in range(args.features) if (one := corpus.examples(i)) is not None]
        explained = list(zip(items, TokenSetExplainer().explain(items), strict=True))
        for scorer, asked in (
            (scorers.DetectionScorer(scoring), explained),
            (scorers.FuzzingScorer(scoring), explained),
            (scorers.EmbeddingScorer(scoring, embedder), explained),
            (scorers.SurprisalScorer(scoring, model), explained),
            (scorers.IntruderScorer(scoring), [(one, None) for one in items]),
            (scorers.ExampleEmbeddingScorer(scoring, embedder), [(one, None) for one in items]),
            (scorers.SurfaceScorer(scoring, embedder), [(one, None) for one in items]),
        ):
            found = mean(np.array([score.value for score in scorer.score(asked)]))
            rows.append({"score": scorer.name, "mean": found.value, "low": found.low, "high": found.high})
    print("| score | planted single tokens |\n|---|--:|")
    for row in rows:
        print(f"| {row['score']} | {row['mean']:.3f} ± {(row['high'] - row['low']) / 2:.3f} |")
    if args.json:
        args.json.write_text(json.dumps({"features": len(items), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
