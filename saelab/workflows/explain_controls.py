"""Stores of the controls of ``saelab explain``: built on the same text, beside the store, once."""

import numpy as np

from saelab.analysis.autointerp.controls import (
    NEURONS,
    RANDOM,
    WIDEST,
    ControlDictionary,
    StoreRows,
    control_features,
    neuron_site,
    neurons,
    random_directions,
    site_sample,
    untrained,
)
from saelab.analysis.autointerp.scorers.base import settings_of
from saelab.core.artifacts import read_json, write_json
from saelab.core.errors import SaelabError
from saelab.features.build import build_features
from saelab.features.store import FeatureStore, open_features
from saelab.workflows.explain_setup import Setup, Subject


def control_subject(setup: Setup, name: str) -> Subject | None:
    """Return a control and the features of it that are scored; None, with a note, when it cannot be made."""
    store, seed = setup.store, setup.job.examples.seed
    site = str(store.manifest["site"])
    if setup.model is None:
        return None
    if name == NEURONS:
        found = neuron_site(setup.model, site)
        if found is None:
            setup.notes.append("no MLP neurons in the layer of the site: that control is left out")
            return None
        site = found
    with setup.timed("control stores", 1):
        dictionary = _dictionary(setup, name, site)
        if dictionary is None:
            return None
        built = _built(setup, name, dictionary, site)
    live = np.flatnonzero(np.asarray(built.column("count")) > 0).astype(np.int64)
    return Subject(name, built, control_features(live, setup.job.control_features, seed), dictionary, site)


def _dictionary(setup: Setup, name: str, site: str) -> ControlDictionary | None:
    store, seed = setup.store, setup.job.examples.seed
    l0 = float(store.manifest["l0"])
    if name == NEURONS:
        return neurons(setup.model.width(site), l0)
    if name != RANDOM and setup.sae is None:
        return None
    sample = site_sample(setup.model, store, site)
    if name != RANDOM:
        assert setup.sae is not None, "looked at above"
        return untrained(setup.sae, sample, l0, seed)
    density = np.asarray(store.column("density"), np.float64)
    density = density[density > 0]
    chosen = np.random.default_rng([seed, 3]).choice(density, min(len(density), WIDEST), replace=False)
    return random_directions(sample, chosen, seed)


def _built(setup: Setup, name: str, dictionary: ControlDictionary, site: str) -> FeatureStore:
    """Open the control's store, or build it when it is not there or of something else."""
    store = setup.store
    folder = store.path.resolve().with_name(f"_{store.path.resolve().name}.controls")
    folder.mkdir(exist_ok=True)
    about = [store.manifest[key] for key in ("sae_fingerprint", "source_fingerprint", "n_tokens", "model_fingerprint")]
    settings, note = settings_of(name, setup.job.examples.seed, *about), folder / f"{name}.json"
    try:
        if read_json(note) == {"settings": settings}:
            return open_features(folder / name)
    except SaelabError:  # not there, or half-written: build it
        pass
    note.unlink(missing_ok=True)
    built = build_features(setup.model, dictionary, StoreRows(store), site, folder / name, force=True, nearest=False)
    write_json(note, {"settings": settings})
    return built
