"""Weight sparsity of an SAE in training: which of its tensors a recipe may make sparse."""

import torch

from saelab.core.errors import ConfigError
from saelab.core.step_hook import NoHook, StepHook
from saelab.sae import SAE, build_sae
from saelab.sparsity.training import SparseTraining, targets_of_matrices
from saelab.training.config import FitConfig

MATRICES = {"W_enc": ("w_enc_t", False), "W_dec": ("W_dec", True), "W_skip": ("W_skip", True)}
"""Matrices of the SAEs by their name on disk: the parameter, and whether it is (in, out)."""


def check_sparsity(config: FitConfig) -> None:
    """Raise :class:`ConfigError` for a recipe that does not fit the SAE, before anything is written."""
    if config.sparsity is not None:
        with torch.device("meta"):
            sae = build_sae(config.sae, seed=None)
        sparse_training(config, sae, torch.optim.SGD(sae.parameters()))


def sparse_training(config: FitConfig, sae: SAE, optimizer: torch.optim.Optimizer) -> StepHook:
    """Return the hook that keeps an SAE's matrices sparse as its config says; one that does nothing if it does not.

    Masks are (out, in) as everywhere: those of W_enc are (d_sae, d_in), of W_dec (d_out, d_sae). Decoder rows are kept
    at norm 1 after masking; with a gradient other than ``none`` those are the trained rows, and the effective ones are
    shorter. Raises :class:`ConfigError`.
    """
    if config.sparsity is None:
        return NoHook()
    if config.sparsity.widen:
        raise ConfigError("widen changes a language model's width; for an SAE set sae.d_sae, and leave widen out")
    if config.sparsity.cycles is not None:
        raise ConfigError("cycles train several times, and an SAE is trained once here; prune it on the way (cubic)")
    parameters = dict(sae.named_parameters())
    matrices = {n: (parameters[p], transposed) for n, (p, transposed) in MATRICES.items() if p in parameters}
    targets = targets_of_matrices(matrices, config.sparsity.include, config.sparsity.exclude)
    return SparseTraining(targets, config.sparsity, optimizer, config.training.steps)
