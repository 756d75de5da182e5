"""What a dark-matter job names, opened and checked against each other before anything is computed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.core.artifacts import read_manifest
from saelab.core.errors import ConfigError, FormatError, SiteError, StoreError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.sae.base import SAE
    from saelab.workflows.dark_matter import DarkMatterJob


class Inputs:
    """Everything a job names, open and fit for one another.

    ``store``, ``tokens``, ``site``, ``main`` (a name), ``saes`` and ``folders`` (by name, the SAEs in order of width),
    ``earlier`` (by site), ``training_store``, ``model`` and ``rows`` (None when the model is not to run).
    """

    def __init__(self, job: "DarkMatterJob") -> None:
        from saelab.activations.store import open_store
        from saelab.analysis.dark_matter.tokens import tokens_of_store

        self.store = open_store(job.store)
        main = _folders(job.sae)
        if len(main) > 1:
            raise ConfigError(
                f"{job.sae} holds {len(main)} SAEs ({', '.join(p.name for p in main)}); give one of them as SAE "
                "and the folder as --ladder"
            )
        self.folders = _named([*main, *(p for given in job.ladder for p in _folders(given))])
        self.saes = {name: _load(path) for name, path in self.folders.items()}
        self.main = next(iter(self.folders))
        self.site = job.site or _recorded(self.folders[self.main], "site") or _only_site(self.store, job)
        for name, path in self.folders.items():
            self._check(name, path, self.site)
        order = sorted(self.saes, key=lambda name: (self.saes[name].d_sae, name))
        self.saes = {name: self.saes[name] for name in order}
        self.earlier: dict[str, SAE] = {}
        for given in job.earlier:
            for path in _folders(given):
                site = _recorded(path, "site")
                if site is None or site == self.site:
                    raise ConfigError(
                        f"--earlier {path} records site {site}, expected an SAE of another site than {self.site}"
                    )
                self._check(str(path), path, site)
                self.earlier[site] = _load(path)
        self.tokens = tokens_of_store(
            self.store,
            self.site,
            max_tokens=job.max_tokens,
            skip_positions=job.skip_positions,
            fit_share=job.fit_share,
            seed=job.seed,
        )
        self.training_store = None if job.error_saes.store is None else open_store(job.error_saes.store)
        if self.training_store is not None:
            self.training_store.d_in(self.site)
            if self.training_store.fingerprint == self.store.fingerprint:
                self.training_store = None
        self.model: Any = None
        self.rows: Any = None
        if job.model_parts:
            self.model, self.rows = _model(job, self.store)

    def _check(self, name: str, path: Path, site: str) -> None:
        made_by = self.store.manifest["model"]
        recorded = _recorded(path, "model_fingerprint")
        if recorded is not None and recorded != made_by["fingerprint"]:
            raise StoreError(
                f"{path} was trained on {_recorded(path, 'model')} ({recorded}), but {self.store.path} is of "
                f"{made_by['name']} ({made_by['fingerprint']}); give a store of the same model"
            )
        own_site = _recorded(path, "site")
        if own_site is not None and own_site != site:
            raise ConfigError(f"{path} was trained at {own_site}, not at {site}; a ladder is of one site")
        width, d_in = self.store.d_in(site), self.saes[name].d_in if name in self.saes else _load(path).d_in
        if width != d_in:
            raise StoreError(
                f"{path} reads activations of width {d_in}, but {self.store.path} has width {width} at {site}; give a "
                "store of the site it was trained on"
            )

    def notes(self) -> list[str]:
        """What a reader should know."""
        notes = list(self.tokens.notes)
        for name, path in self.folders.items():
            if _recorded(path, "store_fingerprint") == self.store.fingerprint:
                notes.append(f"{name} was trained on this store: its error is smaller here than on other text")
        return notes


def _model(job: "DarkMatterJob", store: "ActivationStore") -> tuple[Any, Any]:
    """Load the store's model and open its text, cut as in the harvest."""
    from saelab.models.tokens import TokensConfig
    from saelab.workflows.corpus import CorpusJob

    made_by, text = store.manifest["model"], store.manifest["text"]
    source = job.text or text.get("source")
    if source is None:
        raise StoreError(f"{store.path} does not record its text; give --text, or --model_parts false")
    keys = ("context", "packing", "bos", "min_tokens", "max_rows")
    corpus = CorpusJob(
        model=job.model or str(made_by["name"]),
        dtype=made_by["dtype"],
        device=job.device,
        text=source,
        column=job.column,
        tokens=TokensConfig(**{key: text[key] for key in keys if text.get(key) is not None}),
    )
    model = corpus.load()
    store.check_model(model)
    return model, corpus.rows(model)


def _folders(given: str | Path) -> list[Path]:
    """The SAE folder itself, or those in the folder of a training, by name."""
    path = Path(given)
    kind = read_manifest(path)["kind"]
    if kind == "sae":
        return [path]
    if kind != "run":
        raise FormatError(f"{path} is a saelab {kind} folder, expected an SAE or a training of several")
    found = sorted(p.parent for p in path.glob("*/manifest.json") if read_manifest(p.parent)["kind"] == "sae")
    if not found:
        raise FormatError(f"{path} is a run without SAEs directly below it; give the folder of saelab train")
    return found


def _named(folders: list[Path]) -> dict[str, Path]:
    """Names of SAEs: the folder's, with its parent's where two are alike; an SAE given twice counts once."""
    distinct = list({path.resolve(): path for path in folders}.values())
    names = [path.resolve().name for path in distinct]
    return {
        name if names.count(name) == 1 else f"{path.resolve().parent.name}.{name}": path
        for name, path in zip(names, distinct, strict=True)
    }


def _load(path: Path) -> "SAE":
    from saelab.sae.folder import load_sae

    sae = load_sae(path)
    if sae.config.d_out != sae.d_in or sae.config.architecture == "transcoder" or _recorded(path, "target_site"):
        raise ConfigError(f"{path} reconstructs another site than it reads; dark-matter needs an SAE of one site")
    return sae


def _recorded(path: Path, key: str) -> str | None:
    from saelab.sae.folder import load_meta

    value = load_meta(path).get("provenance", {}).get(key)
    return None if value is None else str(value)


def _only_site(store: "ActivationStore", job: "DarkMatterJob") -> str:
    if len(store.sites) > 1:
        raise SiteError(f"{job.sae} does not record its site; give --site, one of {', '.join(store.sites)}")
    return store.sites[0]
