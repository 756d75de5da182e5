"""The architectures, by name. A new one is a file beside this and one line here."""

from typing import NamedTuple

from saelab.core.registry import Registry
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.feature_choice import FeatureChoiceConfig, FeatureChoiceSAE
from saelab.sae.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.sae.topk import TopKConfig, TopKSAE


class Architecture(NamedTuple):
    """An entry of :data:`ARCHITECTURES`."""

    config: type[SAEConfig]
    """Config class; its ``architecture`` field is a Literal of the name."""
    sae: type[SAE]
    """The module."""


ARCHITECTURES: Registry[Architecture] = Registry("architecture")
ARCHITECTURES.register("topk", Architecture(TopKConfig, TopKSAE))
ARCHITECTURES.register("mutual_choice", Architecture(MutualChoiceConfig, MutualChoiceSAE))
ARCHITECTURES.register("feature_choice", Architecture(FeatureChoiceConfig, FeatureChoiceSAE))
ARCHITECTURES.alias("batchtopk", "mutual_choice")


def build_sae(config: SAEConfig, seed: int | None = 0) -> SAE:
    """Return a new SAE for ``config``, initialised from ``seed`` (None: zeros, to be loaded)."""
    return ARCHITECTURES[config.architecture].sae(config, seed)
