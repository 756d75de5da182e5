"""Meta-structure: how well the decoder's own rows are sums of a few common directions.

A BatchTopK SAE of a quarter of the width, k = 4, is trained for 1,500 steps on the rows of ``W_dec``; the variance of
the rows that it explains is high when features are compositions of others (Bussmann et al. 2024, "meta-SAEs"). The
control is the same on random unit rows.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.reconstruction import Reconstruction
from saelab.analysis.saebench.hierarchy import train_small
from saelab.analysis.saebench.result import EvalResult, Metrics
from saelab.sae.mutual_choice import MutualChoiceConfig

EVAL = "meta_structure"
WIDTH_RATIO, K, STEPS = 0.25, 4, 1500


def meta_structure(w_dec: Float[Tensor, "d_sae d"], *, steps: int = STEPS, seed: int = 0) -> EvalResult:
    """Train the meta-SAE on the decoder, and on random unit rows of the same shape."""
    rows = w_dec.detach().float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    config = {"width_ratio": WIDTH_RATIO, "k": K, "train_steps": steps, "random_seed": seed}
    width = max(math.ceil(len(rows) * WIDTH_RATIO), K)
    random_rows = noise / noise.norm(dim=1, keepdim=True)
    return EvalResult(
        EVAL,
        {**config, "meta_width": width},
        _explained(rows, width, steps, seed),
        controls={"untrained": _explained(random_rows, width, steps, seed)},
        better={"decoder_fraction_variance_explained": "higher"},
    )


def _explained(rows: Tensor, width: int, steps: int, seed: int) -> Metrics:
    config = MutualChoiceConfig(d_in=rows.shape[1], d_sae=width, k=K)
    sae = train_small(config, rows, steps=steps, lr=1e-3, seed=seed)
    total = Reconstruction(rows.mean(0))
    total.update(rows, sae(rows))
    found: Any = total.result()
    values = {
        "decoder_fraction_variance_explained": 1 - found.fvu,
        "final_reconstruction_mse": found.mse / rows.shape[1],
    }
    return {"meta_structure": values}
