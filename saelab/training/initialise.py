"""What is measured on the first tokens before training: the input scale and b_dec."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ActivationError, ConfigError
from saelab.sae import SAE, build_sae, load_sae
from saelab.training.config import FitConfig


def initial_sae(config: FitConfig, sample: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> SAE:
    """Return the SAE a run starts from; ``sample`` and ``target`` are raw activations of its first tokens."""
    if config.start is not None:
        return started_sae(config, config.start)
    sae_config = config.sae
    if sae_config.input_scale is None:
        sae_config = sae_config.model_copy(update={"input_scale": input_scale(sample)})
    sae = build_sae(sae_config, config.training.seed)
    scaled = target * sae.input_scale
    with torch.no_grad():
        if config.training.b_dec_init == "geometric_median":
            sae.b_dec.copy_(geometric_median(scaled))
        elif config.training.b_dec_init == "mean":
            sae.b_dec.copy_(scaled.mean(0))
    return sae


def started_sae(config: FitConfig, folder: str) -> SAE:
    """Return the SAE in ``folder``, ready to be trained on, with the settings of ``config.sae``.

    Widths, number of features and scale are those of the weights; what else ``config.sae`` says (k, a penalty) is new.
    """
    sae = load_sae(folder)
    fixed = {name: getattr(sae.config, name) for name in ("d_in", "d_sae", "d_out", "architecture")}
    for name, value in fixed.items():
        if getattr(config.sae, name) != value:
            raise ConfigError(
                f"{folder} has {name} = {value}, but the run wants {getattr(config.sae, name)}; leave sae.{name} out"
            )
    started = build_sae(config.sae.model_copy(update={"input_scale": sae.input_scale}), seed=None)
    started.load_tensors(sae.tensors())
    return started


def input_scale(sample: Float[Tensor, "n d"]) -> float:
    """Return s with mean ||s x||^2 = d."""
    mean_square = float(sample.double().square().sum(1).mean())
    if mean_square == 0:
        raise ActivationError(f"all of the first {sample.shape[0]} activations are zero; is it the right site?")
    return math.sqrt(sample.shape[1] / mean_square)


def geometric_median(points: Float[Tensor, "n d"], steps: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """Return the point with the least sum of distances to ``points`` (Weiszfeld's iteration, in float64).

    Unlike the mean, it does not follow the few tokens of enormous norm that language models have.
    """
    points = points.double()
    guess = points.mean(0)
    for _ in range(steps):
        distance = torch.linalg.vector_norm(points - guess, dim=1).clamp_min(1e-12)
        weight = 1 / distance
        update = (weight @ points) / weight.sum()
        moved = torch.linalg.vector_norm(update - guess)
        guess = update
        if float(moved) <= tolerance * float(distance.mean()):
            break
    return guess.float()
