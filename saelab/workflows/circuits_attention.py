"""Attention heads: which role each has in an attention SAE, and how long a prefix its induction needs."""

from typing import TYPE_CHECKING

from pydantic import Field

from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.workflows.circuits import open_model

if TYPE_CHECKING:
    import pandas as pd


class RolesJob(Config):
    """What ``saelab circuits roles`` needs."""

    sae: str = Field()
    """SAE folder at a site blocks.N.attn.hook_z."""
    features: str = Field()
    """Feature store of the SAE, for the tokens that its features speak for."""
    n: int = Field(default=10, ge=2)
    """Features compared of each head: those it writes the largest share of."""
    contexts: int = Field(default=8, ge=1)
    """Strongest contexts of a feature whose peaks make its set of tokens."""


class PrefixesJob(Config):
    """What ``saelab circuits prefixes`` needs."""

    model: str = "embedded"
    """Model: embedded, a folder, a hub id, or one of hand-induction, reverse, proportion, induction-trained."""
    device: str = "cpu"
    """Torch device."""
    longest: int = Field(default=6, ge=2)
    """Longest repeated prefix."""
    length: int = Field(default=48, ge=8)
    """Tokens of a row."""
    rows: int = Field(default=32, ge=1)
    """Rows of random tokens for each length of prefix."""
    seed: int = 0
    """Of the tokens."""


def run_roles(job: RolesJob) -> "pd.DataFrame":
    """One row for each head: its features of largest share, and the mean overlap of their top tokens."""
    import pandas as pd

    from saelab.analysis.circuits.attention import attention_layer, head_reports
    from saelab.features.query import top_contexts
    from saelab.features.store import open_features
    from saelab.models.components import Components
    from saelab.workflows.circuits_features import open_saes

    model, [(sae, provenance)] = open_saes([job.sae], None, "cpu")
    layer, store = attention_layer(provenance["site"]), open_features(job.features)
    if store.manifest.get("site") != provenance["site"] or store.n_features != sae.d_sae:
        raise ConfigError(
            f"{job.features} has {store.n_features} features of {store.manifest.get('site')}, the SAE {sae.d_sae} of "
            f"{provenance['site']}; give the store that saelab build made of this SAE"
        )
    tokens = {}
    for feature in range(store.n_features):
        peaks = {context.tokens[context.peak] for context in top_contexts(store, feature, job.contexts)}
        if peaks:
            tokens[feature] = peaks
    rows = [
        {
            "head": f"{layer}.{report.head}",
            "similarity": report.similarity,
            "features": report.features.tolist(),
            "shares": [float(share) for share in report.shares],
            "tokens": sorted(set().union(*(tokens[int(i)] for i in report.features))),
        }
        for report in head_reports(sae, Components(model).n_heads, tokens, job.n)
    ]
    return pd.DataFrame(rows)


def run_prefixes(job: PrefixesJob) -> "pd.DataFrame":
    """One row for each head: score by length of the repeated prefix, and short, long or none."""
    import pandas as pd
    import torch

    from saelab.analysis.circuits.attention import prefix_induction, prefix_kind
    from saelab.analysis.circuits.generators import words
    from saelab.models.components import Components

    model = open_model(job.model, job.device)
    if not 4 * job.longest <= job.length < model.n_ctx:
        raise ConfigError(
            f"length is {job.length}; expected at least four times the longest prefix ({4 * job.longest}) and less "
            f"than the model's context ({model.n_ctx})"
        )
    scores = prefix_induction(
        Components(model),
        longest=job.longest,
        length=job.length,
        rows=job.rows,
        vocabulary=torch.as_tensor(list(words(model))),
        first=torch.zeros(1, dtype=torch.int64),
        seed=job.seed,
    )
    return pd.DataFrame(
        [
            {
                "head": f"{layer}.{head}",
                "kind": prefix_kind(scores[layer, head]),
                **{f"prefix_{n + 1}": float(score) for n, score in enumerate(scores[layer, head])},
            }
            for layer in range(scores.shape[0])
            for head in range(scores.shape[1])
        ]
    )
