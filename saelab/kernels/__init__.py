"""Sparse operations of a sparse autoencoder: selection, encoding, decoding, and their hand-written gradients.

Each operation has a dense reference in plain torch and a sparse twin with the same signature. ``impl`` chooses:
``"reference"``, ``"sparse"``, ``"triton"`` (where there is a kernel) or ``"auto"`` (what :func:`info` says).
"""

from saelab.kernels.decode import decode, decode_and_block
from saelab.kernels.dispatch import Impl, info
from saelab.kernels.encode import encode_topk, pre_activations_and_block, pre_activations_at
from saelab.kernels.select import Precision, TopK, select_topk
from saelab.kernels.select_above import Entries, select_above
from saelab.kernels.select_budget import select_budget
from saelab.kernels.select_columns import Columns, select_columns
from saelab.kernels.select_scored import Scored, select_scored
from saelab.kernels.spgemm import RowBlock, TopPairs, co_activation, co_activation_matrix, top_co_active

__all__ = [
    "Columns",
    "Entries",
    "Impl",
    "Precision",
    "RowBlock",
    "Scored",
    "TopK",
    "TopPairs",
    "co_activation",
    "co_activation_matrix",
    "decode",
    "decode_and_block",
    "encode_topk",
    "info",
    "pre_activations_and_block",
    "pre_activations_at",
    "select_above",
    "select_budget",
    "select_columns",
    "select_scored",
    "select_topk",
    "top_co_active",
]
