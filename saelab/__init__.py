"""saelab: a sparse-autoencoder interpretability workbench.

    import saelab
    store = saelab.harvest("embedded", "blocks.2.hook_resid_post", max_tokens=200_000, out="runs/store")
    trained = saelab.train("configs/demo-topk.yaml", store=store, out="runs/sae")
    saelab.evaluate(trained, max_tokens=20_000)
    features = saelab.build_features(trained, max_tokens=50_000, out="runs/features")
    saelab.show(7, features)

The functions are the commands of ``saelab``, with the same keys (docs/api.md). Names are imported when first used, so
``import saelab`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saelab import circuits as circuits
    from saelab.activations.store import ActivationStore as ActivationStore
    from saelab.activations.store import open_store as open_store
    from saelab.core.code import SparseCode as SparseCode
    from saelab.features.dashboard import show as show
    from saelab.features.store import FeatureStore as FeatureStore
    from saelab.features.store import open_features as open_features
    from saelab.models.subject import SubjectModel as SubjectModel
    from saelab.models.subject import load_model as load_model
    from saelab.models.text import open_text as open_text
    from saelab.sae.base import SAE as SAE
    from saelab.sae.folder import load_sae as load_sae
    from saelab.sae.folder import save_sae as save_sae
    from saelab.workflows.api import build_features as build_features
    from saelab.workflows.api import evaluate as evaluate
    from saelab.workflows.api import harvest as harvest
    from saelab.workflows.api import train as train
    from saelab.workflows.opening import open_result as open_result
    from saelab.workflows.questions import compare as compare
    from saelab.workflows.questions import contrast as contrast
    from saelab.workflows.questions import core_neurons as core_neurons
    from saelab.workflows.questions import dark_matter as dark_matter
    from saelab.workflows.questions import explain as explain
    from saelab.workflows.questions import lazy_neurons as lazy_neurons
    from saelab.workflows.questions import sparsify as sparsify

_WHERE = {
    "load_model": "saelab.models.subject",
    "open_text": "saelab.models.text",
    "harvest": "saelab.workflows.api",
    "open_store": "saelab.activations.store",
    "train": "saelab.workflows.api",
    "load_sae": "saelab.sae.folder",
    "save_sae": "saelab.sae.folder",
    "evaluate": "saelab.workflows.api",
    "build_features": "saelab.workflows.api",
    "open_features": "saelab.features.store",
    "show": "saelab.features.dashboard",
    "dark_matter": "saelab.workflows.questions",
    "circuits": "saelab.circuits",
    "explain": "saelab.workflows.questions",
    "compare": "saelab.workflows.questions",
    "sparsify": "saelab.workflows.questions",
    "lazy_neurons": "saelab.workflows.questions",
    "core_neurons": "saelab.workflows.questions",
    "contrast": "saelab.workflows.questions",
    "open_result": "saelab.workflows.opening",
    "SAE": "saelab.sae.base",
    "ActivationStore": "saelab.activations.store",
    "FeatureStore": "saelab.features.store",
    "SparseCode": "saelab.core.code",
    "SubjectModel": "saelab.models.subject",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604  the names are strings, ruff cannot see it


if not TYPE_CHECKING:  # to a type checker a name is what is imported above, and a misspelt one an error

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'saelab' has no attribute {name!r}")
        module = importlib.import_module(_WHERE[name])
        value = module if module.__name__ == f"saelab.{name}" else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
