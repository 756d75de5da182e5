"""AuxK: dead features reconstruct what the living ones leave over (Gao et al. 2024, arXiv 2406.04093, appendix A.2).

Of each token, the ``aux_k`` largest pre-activations among the dead features are kept (and ReLU applied). Gradient
reaches encoder and decoder rows of dead features. The columns of the dead features are gathered once; while they are
few their activations form a dense block and four small matrix products do the work, and when they are many the kept
entries join the sparse code's own kernels. Both give the same numbers.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels import Impl, decode, decode_and_block, pre_activations_and_block, pre_activations_at, select_topk
from saelab.kernels.segments import rows_of, rows_of_topk
from saelab.sae.step import Block, Encoding, StepContext

DENSE_BLOCK = 8
"""Dead features per kept one up to which the dense block is used: about where the costs, as estimated, cross."""


def encode_with_aux(  # noqa: PLR0917
    x: Float[Tensor, "n d_in"],
    center: Float[Tensor, " d_in"] | None,
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_plus_1"],
    known: Float[Tensor, " nnz"] | None,
    context: StepContext,
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Encoding:
    """Return activations at the chosen entries, and those of dead features if ``context`` has any.

    ``activation`` makes activations of the pre-activations at the chosen entries, in their order.
    """
    rows, d_sae = rows_of(offsets, indices.numel()), w_enc_t.shape[0]
    dead = context.dead if context.dead is not None and context.aux_k and context.aux_coefficient else None
    n_dead = 0 if dead is None else dead.numel()
    if dead is None or n_dead == 0:
        values = pre_activations_at(x, w_enc_t, b_enc, indices, rows, center=center, known=known, impl=context.impl)
        return Encoding(SparseCode(indices, activation(values), offsets, d_sae), pre=values)
    if n_dead <= DENSE_BLOCK * context.aux_k:
        values, block = pre_activations_and_block(
            x, w_enc_t, b_enc, indices, rows, dead, center=center, known=known, impl=context.impl
        )
        aux = Block(dead, _keep_largest(block, context.aux_k).relu())
        return Encoding(SparseCode(indices, activation(values), offsets, d_sae), aux, values)
    centered = x.detach() if center is None else (x - center).detach()
    n, kept = x.shape[0], min(context.aux_k, n_dead)
    found = select_topk(centered, w_enc_t[dead], b_enc[dead], kept, precision=context.precision, impl=context.impl)
    aux_indices = dead[found.indices.reshape(-1)]
    both = pre_activations_at(
        x,
        w_enc_t,
        b_enc,
        torch.cat([indices, aux_indices]),
        torch.cat([rows, rows_of_topk(n, kept, x.device)]),
        center=center,
        known=None if known is None else torch.cat([known, found.values.reshape(-1)]),
        impl=context.impl,
    )
    values, aux_values = both[: indices.numel()], both[indices.numel() :].relu()
    return Encoding(
        SparseCode(indices, activation(values), offsets, d_sae),
        SparseCode.from_topk(aux_indices.view(n, kept), aux_values.view(n, kept), d_sae),
        values,
    )


def decode_with_aux(
    encoding: Encoding, w_dec: Float[Tensor, "d_sae d"], b_dec: Float[Tensor, " d"], impl: Impl
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"] | None]:
    """Return the reconstruction, and the residual's (without bias) when there are activations of dead features."""
    code, aux = encoding.code, encoding.aux
    if aux is None:
        return decode(code, w_dec, b_dec, impl=impl), None
    if isinstance(aux, Block):
        return decode_and_block(code, w_dec, b_dec, aux.features, aux.values, impl=impl)
    # One decode of 2N tokens rather than two of N: the gradient of W_dec is allocated once.
    both = decode(SparseCode.concatenate([code, aux]), w_dec, impl=impl)
    return both[: code.n_tokens] + b_dec, both[code.n_tokens :]


def decode_aux(encoding: Encoding, w_dec: Float[Tensor, "d_sae d"], impl: Impl) -> Float[Tensor, "n d"] | None:
    """Return the residual's reconstruction (without bias) when there are activations of dead features."""
    aux = encoding.aux
    if isinstance(aux, Block):
        return aux.values @ w_dec[aux.features]
    return None if aux is None else decode(aux, w_dec, impl=impl)


def _keep_largest(block: Float[Tensor, "n n_block"], k: int) -> Float[Tensor, "n n_block"]:
    """Zero all but the k largest entries of each row."""
    if block.shape[1] <= k:
        return block
    kept = block.detach().topk(k, dim=1, sorted=False).indices
    return torch.where(torch.zeros_like(block, dtype=torch.bool).scatter_(1, kept, True), block, 0)
