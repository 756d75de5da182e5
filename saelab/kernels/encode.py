"""Pre-activations at selected entries, with a backward pass that costs as many entries as were selected.

With ``xc = x - center`` and ``z_j = <xc[t_j], W_enc[:, i_j]> + b_enc[i_j]`` for entry j = (token t_j, feature i_j):

    dW_enc[:, i] = sum over the entries of feature i of dz_j xc[t_j]        entries sorted by feature, then bag sums
    db_enc[i]    = sum over the entries of feature i of dz_j
    dx[t]        = sum over the entries of token t of dz_j W_enc[:, i_j]    only when x needs a gradient
    dcenter      = -sum_t dx[t] = -W_enc @ db_enc                           one matrix-vector product

The last line replaces the (N, d_sae) x (d_sae, d_in) product that dense implementations pay for it.

A *block* is a set of features whose pre-activations are wanted for all tokens (the dead ones, for AuxK). It shares the
backward pass, so that the gradient of W_enc is allocated once.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import Impl, use_sparse
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots, grouped_sum, pick, rows_of_topk
from saelab.kernels.select import Precision, select_topk


def encode_topk(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    center: Float[Tensor, " d_in"] | None = None,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return indices and values of the ``k`` largest pre-activations ``(x - center) @ W_enc + b_enc`` of each token.

    Values carry gradient to ``x``, ``w_enc_t``, ``b_enc`` and ``center``; apply ``relu`` for TopK's activations.
    See :func:`~saelab.kernels.select.select_topk` for ``precision``.
    """
    centered = x.detach() if center is None else (x - center).detach()
    found = select_topk(centered, w_enc_t.detach(), b_enc.detach(), k, precision=precision, impl=impl)
    n = x.shape[0]
    values = pre_activations_at(
        x,
        w_enc_t,
        b_enc,
        found.indices.reshape(-1),
        rows_of_topk(n, k, x.device),
        center=center,
        known=found.values.reshape(-1),
        impl=impl,
    )
    return found.indices, values.view(n, k)


def pre_activations_at(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    *,
    center: Float[Tensor, " d_in"] | None = None,
    known: Float[Tensor, " nnz"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, " nnz"]:
    """Return the pre-activations ``(x - center) @ W_enc + b_enc`` of tokens ``rows`` at features ``indices``.

    Differentiable in ``x``, ``w_enc_t``, ``b_enc`` and ``center``. ``known`` gives their values when the selection has
    already computed them. The reference computes all N x d_sae pre-activations and picks.
    """
    no_block = indices.new_zeros(0)
    return pre_activations_and_block(x, w_enc_t, b_enc, indices, rows, no_block, center=center, known=known, impl=impl)[
        0
    ]


def pre_activations_and_block(  # noqa: PLR0917
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    block: Int[Tensor, " n_block"],
    *,
    center: Float[Tensor, " d_in"] | None = None,
    known: Float[Tensor, " nnz"] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, "n n_block"]]:
    """Like :func:`pre_activations_at`, and beside them the pre-activations of the features ``block`` for all tokens."""
    if use_sparse(impl):
        entries, blocked = _SelectedPreActivations.apply(  # type: ignore[no-untyped-call]
            x, center, w_enc_t, b_enc, indices, rows, known, block, impl
        )
        return entries, blocked
    pre = (x if center is None else x - center) @ w_enc_t.T + b_enc
    return pre[rows, indices], pre[:, block]


class _SelectedPreActivations(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        center: Tensor | None,
        w_enc_t: Tensor,
        b_enc: Tensor,
        indices: Tensor,
        rows: Tensor,
        known: Tensor | None,
        block: Tensor,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        ctx.impl = impl
        centered = x if center is None else x - center
        ctx.save_for_backward(centered, w_enc_t, indices, rows, block)
        if known is not None:
            entries = known.clone()
        else:
            entries = entry_dots(centered, w_enc_t, indices, rows, impl=impl) + pick(b_enc, indices)
        return entries, product(centered, w_enc_t[block], b_enc[block])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor, dz_block: Tensor) -> tuple[Tensor | None, ...]:
        centered, w_enc_t, indices, rows, block = ctx.saved_tensors
        needs_x, needs_center, needs_w, needs_b = ctx.needs_input_grad[:4]
        d_sae = w_enc_t.shape[0]
        dx = dcenter = dw = db = None
        if needs_b or needs_center:
            db = dz.new_zeros(d_sae).index_add_(0, indices, dz)
            db.index_add_(0, block, dz_block.sum(0))
        if needs_center:
            dcenter = -(db @ w_enc_t)
        if needs_w:
            dw = grouped_sum(centered, rows, indices, d_sae, dz, impl=ctx.impl)
            if block.numel():
                dw.index_add_(0, block, product(dz_block.T, centered.T))
        if needs_x:
            dx = grouped_sum(w_enc_t, indices, rows, centered.shape[0], dz, impl=ctx.impl)
            if block.numel():
                dx += product(dz_block, w_enc_t[block].T)
        return dx, dcenter, dw, db, None, None, None, None, None
