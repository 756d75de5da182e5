"""Sparse autoencoders: configs, architectures, and their folders on disk."""

from saelab.sae.base import SAE, SAEConfig
from saelab.sae.folder import load_sae, save_sae
from saelab.sae.registry import ARCHITECTURES, Architecture, build_sae
from saelab.sae.step import Encoding, StepContext, TrainingPass
from saelab.sae.topk import TopKConfig, TopKSAE

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Architecture",
    "Encoding",
    "SAEConfig",
    "StepContext",
    "TopKConfig",
    "TopKSAE",
    "TrainingPass",
    "build_sae",
    "load_sae",
    "save_sae",
]
