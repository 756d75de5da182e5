"""Features near a feature: by the direction they write, and by the tokens they fire on. Nearest first."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.features import layout
from saelab.features.store import FeatureStore

BLOCK = 1 << 24
"""Numbers of a product matrix held at once."""


@torch.no_grad()
def decoder_neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], features: Int64[np.ndarray, " n"], k: int
) -> Int64[np.ndarray, "n k_or_less"]:
    """Return the k features whose decoder rows have the largest cosine with each feature's."""
    unit = W_dec.detach().float()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-30)
    k = min(k, len(unit) - 1)
    found = np.zeros((len(features), k), np.int64)
    step = max(1, BLOCK // len(unit))
    for i in range(0, len(features), step):
        part = torch.from_numpy(features[i : i + step]).to(unit.device)
        cosine = unit[part] @ unit.T
        cosine[torch.arange(len(part)), part] = -torch.inf
        found[i : i + step] = cosine.topk(k, dim=1).indices.cpu().numpy()
    return found


def coactive_neighbours(
    store: FeatureStore, features: Int64[np.ndarray, " n"], k: int, max_tokens: int = 200_000
) -> Int64[np.ndarray, "n k_or_less"]:
    """Return the k features with the largest Jaccard index of the tokens they fire on with each feature's.

    Of more than ``max_tokens`` tokens, that many at even distances are looked at.
    """
    from scipy.sparse import csr_matrix

    k = min(k, store.n_features - 1)
    indptr = store.array(layout.INDPTR)
    tokens = np.linspace(0, store.n_tokens - 1, min(store.n_tokens, max_tokens)).astype(np.int64)
    starts = indptr[tokens]
    counts = indptr[tokens + 1] - starts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entries = np.repeat(starts - offsets[:-1], counts) + np.arange(int(offsets[-1]))
    columns = store.array(layout.INDICES)[entries].astype(np.int32)
    active = csr_matrix((np.ones(len(columns), np.float32), columns, offsets), (len(tokens), store.n_features))
    by_feature = active.T.tocsr()
    total = np.asarray(active.sum(0), np.float32).ravel()
    found = np.zeros((len(features), k), np.int64)
    step = max(1, BLOCK // store.n_features)
    for i in range(0, len(features), step):
        part = features[i : i + step]
        both = (by_feature[part] @ active).toarray()
        either = total[part][:, None] + total[None] - both
        jaccard = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
        jaccard[np.arange(len(part)), part] = -1
        best = np.argpartition(-jaccard, k - 1, axis=1)[:, :k] if k < store.n_features else np.argsort(-jaccard, axis=1)
        order = np.argsort(-np.take_along_axis(jaccard, best, 1), axis=1, kind="stable")
        found[i : i + step] = np.take_along_axis(best, order, 1)
    return found
