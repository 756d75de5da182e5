"""The architectures, by name. A new one is a file beside this and one line here."""

from typing import NamedTuple

from saelab.core.registry import Registry
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.contrastive import ContrastiveConfig, ContrastiveSAE
from saelab.sae.feature_choice import FeatureChoiceConfig, FeatureChoiceSAE
from saelab.sae.gated import GatedConfig, GatedSAE
from saelab.sae.gradient import GradientConfig, GradientSAE
from saelab.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saelab.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from saelab.sae.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.sae.relu import ReLUConfig, ReLUSAE
from saelab.sae.topk import TopKConfig, TopKSAE
from saelab.sae.transcoder import TranscoderConfig, TranscoderSAE


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
ARCHITECTURES.register("relu", Architecture(ReLUConfig, ReLUSAE))
ARCHITECTURES.register("jumprelu", Architecture(JumpReLUConfig, JumpReLUSAE))
ARCHITECTURES.register("gated", Architecture(GatedConfig, GatedSAE))
ARCHITECTURES.register("matryoshka", Architecture(MatryoshkaConfig, MatryoshkaSAE))
ARCHITECTURES.register("gradient", Architecture(GradientConfig, GradientSAE))
ARCHITECTURES.register("transcoder", Architecture(TranscoderConfig, TranscoderSAE))
ARCHITECTURES.register("contrastive", Architecture(ContrastiveConfig, ContrastiveSAE))
ARCHITECTURES.alias("batchtopk", "mutual_choice")


def build_sae(config: SAEConfig, seed: int | None = 0) -> SAE:
    """Return a new SAE for ``config``, initialised from ``seed`` (None: zeros, to be loaded)."""
    return ARCHITECTURES[config.architecture].sae(config, seed)
