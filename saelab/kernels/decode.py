"""Reconstruction from a sparse code: ``x_hat = f W_dec + b_dec``, reading only the decoder rows that are active.

Backward, with ``g = dL/dx_hat`` and entries j = (token t_j, feature i_j, value v_j):

    dW_dec[i] = sum over the entries of feature i of v_j g[t_j]     entries sorted by feature, then bag sums
    dv_j      = <g[t_j], W_dec[i_j]>
    db_dec    = sum_t g[t]
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels.dispatch import Impl, use_sparse
from saelab.kernels.product import product
from saelab.kernels.segments import bag_sum, entry_dots, group_by, grouped_sum, rows_of


def decode(
    code: SparseCode,
    w_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None = None,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "n_tokens d_out"]:
    """Return ``code @ w_dec + b_dec``, differentiable in the code's values, ``w_dec`` and ``b_dec``."""
    no_block = code.indices.new_zeros(0)
    return decode_and_block(code, w_dec, b_dec, no_block, w_dec.new_zeros(code.n_tokens, 0), impl=impl)[0]


def decode_and_block(
    code: SparseCode,
    w_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    block: Int[Tensor, " n_block"],
    block_values: Float[Tensor, "n_tokens n_block"],
    *,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "n_tokens d_out"], Float[Tensor, "n_tokens d_out"]]:
    """Like :func:`decode`, and beside it ``block_values @ w_dec[block]`` (no bias) from the same backward pass."""
    if use_sparse(impl):
        out, blocked = _SparseDecode.apply(  # type: ignore[no-untyped-call]
            code.values, w_dec, code.indices, code.offsets, block, block_values, impl
        )
    else:
        out, blocked = code.to_dense() @ w_dec, block_values @ w_dec[block]
    return out if b_dec is None else out + b_dec, blocked


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        values: Tensor,
        w_dec: Tensor,
        indices: Tensor,
        offsets: Tensor,
        block: Tensor,
        block_values: Tensor,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        ctx.impl = impl
        ctx.save_for_backward(values, w_dec, indices, offsets, block, block_values)
        ctx.set_materialize_grads(False)
        return bag_sum(w_dec, indices, offsets, values, impl), product(block_values, w_dec[block].T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_block: Tensor | None) -> tuple[Tensor | None, ...]:
        values, w_dec, indices, offsets, block, block_values = ctx.saved_tensors
        needs_values, needs_w = ctx.needs_input_grad[:2]
        rows = rows_of(offsets, indices.numel())
        groups = group_by(indices, w_dec.shape[0])
        dvalues = dw = dblock = None
        if needs_values and g is not None:
            dvalues = entry_dots(g, w_dec, indices, rows, groups, ctx.impl)
        if needs_w:
            dw = (
                torch.zeros_like(w_dec)
                if g is None
                else grouped_sum(g.contiguous(), rows, indices, w_dec.shape[0], values, groups, ctx.impl)
            )
        if g_block is not None:
            if dw is not None and block.numel():
                dw.index_add_(0, block, product(block_values.T, g_block.T))
            dblock = product(g_block, w_dec[block])
        return dvalues, dw, None, None, None, dblock, None
