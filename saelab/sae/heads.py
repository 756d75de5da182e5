"""SAEs on the outputs of attention heads (``hook_z``): the heads lie side by side in the activation.

Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders" (arXiv 2406.17759): a feature's
decoder row falls into one slice per head, and the norms of the slices say whose feature it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ConfigError

__all__ = ["head_activations", "head_shares", "heads_of", "recorded_heads"]


def head_shares(w_dec: Float[Tensor, "d_sae d_in"], n_heads: int) -> Float[Tensor, "d_sae n_heads"]:
    """Return each head's share of the norm of each decoder row: ``||row slice h|| / sum_j ||row slice j||``.

    Rows sum to 1; a row of zeros has equal shares.
    """
    norms = torch.linalg.vector_norm(_by_head(w_dec, n_heads), dim=2)
    total = norms.sum(1, keepdim=True)
    return torch.where(total > 0, norms / total.clamp(min=torch.finfo(norms.dtype).tiny), 1 / n_heads)


def head_activations(
    z: Float[Tensor, "n d_in"], w_enc: Float[Tensor, "d_in d_sae"], feature: int, n_heads: int
) -> Float[Tensor, "n n_heads"]:
    """Return what each head's output adds to a feature's pre-activation; the sum over heads is ``z . W_enc[:, i]``.

    ``z`` are activations in the units that the encoder takes (times the input scale, without centring).
    """
    read = _by_head(w_enc[:, feature].unsqueeze(0), n_heads)
    return (_by_head(z, n_heads) * read).sum(2)


def heads_of(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return number and width of the heads that an SAE's ``meta.json`` records; None at a site without heads."""
    recorded = meta.get("provenance", {})
    if "n_heads" not in recorded or "d_head" not in recorded:
        return None
    return int(recorded["n_heads"]), int(recorded["d_head"])


def recorded_heads(folder: str | Path) -> int:
    """Return the number of heads that the SAE in ``folder`` reads; :class:`ConfigError` where it records none."""
    from saelab.sae.folder import load_meta

    found = heads_of(load_meta(folder))
    if found is None:
        raise ConfigError(f"{folder} records no heads; it is not an SAE that saelab trained on an attn.hook_z site")
    return found[0]


def _by_head(rows: Float[Tensor, "n d"], n_heads: int) -> Float[Tensor, "n n_heads d_head"]:
    if n_heads < 1 or rows.shape[1] % n_heads:
        raise ConfigError(f"a width of {rows.shape[1]} does not fall into {n_heads} heads")
    return rows.reshape(len(rows), n_heads, rows.shape[1] // n_heads)
