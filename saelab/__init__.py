"""saelab: a sparse-autoencoder interpretability workbench.

    import saelab
    sae = saelab.load_sae("saelab-demo/train/sae")
    code = sae.encode(x)            # x: (tokens, d_in) raw activations -> SparseCode
    x_hat = sae.decode(code)

Names are imported when first used, so ``import saelab`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saelab.activations.harvest import HarvestConfig as HarvestConfig
    from saelab.activations.harvest import harvest as harvest
    from saelab.activations.live import LiveStream as LiveStream
    from saelab.activations.store import open_store as open_store
    from saelab.analysis.compare.compare import compare as compare
    from saelab.analysis.compare.folder import load_comparison as load_comparison
    from saelab.analysis.contrast import contrast as contrast
    from saelab.analysis.dark_matter.prompt import error_of_prompt as error_of_prompt
    from saelab.analysis.dark_matter.result import load_dark_matter as load_dark_matter
    from saelab.analysis.evaluate import evaluate as evaluate
    from saelab.analysis.lazy_neurons import lazy_neurons as lazy_neurons
    from saelab.analysis.pursuit import pursue as pursue
    from saelab.analysis.saebench.run import full_evaluate as full_evaluate
    from saelab.core.code import SparseCode as SparseCode
    from saelab.features.build import build_features as build_features
    from saelab.features.dashboard import show as show
    from saelab.features.store import open_features as open_features
    from saelab.models.subject import load_model as load_model
    from saelab.models.text import open_text as open_text
    from saelab.models.tokens import TokenRows as TokenRows
    from saelab.models.tokens import TokensConfig as TokensConfig
    from saelab.sae.folder import load_sae as load_sae
    from saelab.sae.folder import save_sae as save_sae
    from saelab.training.codebook_model import load_codebook_model as load_codebook_model
    from saelab.training.config import FitConfig as FitConfig
    from saelab.training.config import TrainingConfig as TrainingConfig
    from saelab.training.loop import fit as fit
    from saelab.workflows.explain import run_explain as run_explain
    from saelab.workflows.explain_setup import ExplainJob as ExplainJob
    from saelab.workflows.show import describe as describe

_WHERE = {
    "contrast": "saelab.analysis.contrast",
    "load_codebook_model": "saelab.training.codebook_model",
    "load_model": "saelab.models.subject",
    "open_text": "saelab.models.text",
    "TokensConfig": "saelab.models.tokens",
    "TokenRows": "saelab.models.tokens",
    "HarvestConfig": "saelab.activations.harvest",
    "harvest": "saelab.activations.harvest",
    "open_store": "saelab.activations.store",
    "LiveStream": "saelab.activations.live",
    "TrainingConfig": "saelab.training.config",
    "FitConfig": "saelab.training.config",
    "fit": "saelab.training.loop",
    "load_sae": "saelab.sae.folder",
    "save_sae": "saelab.sae.folder",
    "SparseCode": "saelab.core.code",
    "evaluate": "saelab.analysis.evaluate",
    "load_dark_matter": "saelab.analysis.dark_matter.result",
    "error_of_prompt": "saelab.analysis.dark_matter.prompt",
    "pursue": "saelab.analysis.pursuit",
    "lazy_neurons": "saelab.analysis.lazy_neurons",
    "full_evaluate": "saelab.analysis.saebench.run",
    "compare": "saelab.analysis.compare.compare",
    "load_comparison": "saelab.analysis.compare.folder",
    "build_features": "saelab.features.build",
    "open_features": "saelab.features.store",
    "describe": "saelab.workflows.show",
    "run_explain": "saelab.workflows.explain",
    "ExplainJob": "saelab.workflows.explain_setup",
    "show": "saelab.features.dashboard",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604  the names are strings, ruff cannot see it


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
