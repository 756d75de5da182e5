"""SAEs trained on the error and on its parts (section 3.6), beside SAEs trained on Gaussians of the same covariance.

Nonlinear error that consists of features should be rebuilt better than noise of its covariance is; how much better is
what the control says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.activations.stream import StoreStream
from saelab.analysis.dark_matter.decompose import reconstruct
from saelab.analysis.dark_matter.tokens import Tokens
from saelab.analysis.reconstruction import Reconstruction
from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.progress import progress
from saelab.core.regression import CrossMoments, LinearMap
from saelab.features.protocols import Dictionary
from saelab.features.rows import encode_in_parts
from saelab.sae.folder import load_sae
from saelab.training.config import FitConfig
from saelab.training.loop import fit

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("error", "linear", "nonlinear")


@dataclass(frozen=True)
class ErrorSae:
    """An SAE trained on one part of another SAE's error."""

    part: str
    """``error`` (e), ``linear`` (l) or ``nonlinear`` (eta)."""
    fvu: float
    """Its FVU on that part of the error, test contexts."""
    fvu_gaussian: float
    """Control: FVU of an equal SAE trained and tested on Gaussian noise with the same mean and covariance."""
    l0: float
    """Mean number of active features."""
    dead_fraction: float
    """Share of its features that never fired on the test tokens."""
    d_sae: int
    """Number of features."""
    tokens: int
    """Tokens it was trained on."""
    n_test: int
    """Test tokens."""


def frame(results: list[ErrorSae]) -> "pd.DataFrame":
    """One row per part."""
    import pandas as pd

    return pd.DataFrame([vars(r) for r in results])


class ErrorStream:
    """A batch source of one part of an SAE's error, over a stream of activations."""

    def __init__(self, stream: StoreStream, site: str, sae: Dictionary, linear: LinearMap, part: str) -> None:
        assert part in PARTS
        self.stream, self.site, self.sae, self.linear, self.part = stream, site, sae, linear, part

    @property
    def d_in(self) -> int:
        """Width of the error."""
        return self.stream.d_in

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches whose ``x`` is that part of the error."""
        for batch in self.stream:
            yield Batch(part_of(self.sae, batch.x, self.linear, self.site, self.part))

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream below."""
        return {**self.stream.state_dict(), "part": self.part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.stream.load_state_dict({k: v for k, v in state.items() if k != "part"})


class GaussianStream:
    """A batch source of Gaussian vectors of a given mean and covariance: batch k is a function of the seed and k."""

    def __init__(
        self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"], batch_size: int, seed: int = 0
    ) -> None:
        values, vectors = torch.linalg.eigh(covariance.double())
        self.root = (vectors * values.clamp_min(0).sqrt()).float()
        self.mean, self.batch_size, self.seed, self.step = mean.float(), batch_size, seed, 0

    @property
    def d_in(self) -> int:
        """Width of the vectors."""
        return len(self.mean)

    def draw(self, n: int, step: int) -> Float[Tensor, "n d"]:
        """Return n vectors."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn: Tensor = torch.randn(n, self.d_in, generator=generator) @ self.root.T
        return self.mean + drawn

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        while True:
            batch = Batch(self.draw(self.batch_size, self.step))
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Number of batches handed out."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self.step = int(state["step"])


def part_of(sae: Dictionary, x: Float[Tensor, "n d"], linear: LinearMap, site: str, part: str) -> Float[Tensor, "n d"]:
    """Return ``e``, ``l`` or ``eta`` of raw activations."""
    if part == "linear":
        return linear(x)
    e = x - reconstruct(sae, x, site)
    return e if part == "error" else e - linear(x)


def train_on_errors(
    tokens: Tokens,
    site: str,
    sae: Dictionary,
    linear: LinearMap,
    out: str | Path,
    *,
    sae_config: Mapping[str, Any],
    training: Mapping[str, Any],
    store: ActivationStore | None = None,
    seed: int = 0,
) -> list[ErrorSae]:
    """Train equal SAEs on e, l and eta and on their Gaussian twins, below ``out``; test on the test contexts.

    Training tokens are those of ``store`` if one is given (it must not hold the test contexts), else the contexts of
    the fit. ``sae_config`` and ``training`` are as in a YAML file; ``d_in`` is added.
    """
    with torch.no_grad():
        covariance = _covariances(tokens, site, sae, linear)
    out, results = Path(out), []
    for part in PARTS:
        config = parse_config(
            FitConfig,
            {"name": part, "sae": {**sae_config, "d_in": tokens.width(site)}, "training": dict(training)},
            "error SAEs",
        )
        size = config.training.batch_size
        stream = _stream(tokens, site, store, size, seed)
        trained = fit([config], ErrorStream(stream, site, sae, linear, part), out / part)[0]
        mean, spread = covariance[part]
        noise = GaussianStream(mean, spread, size, seed + 1)
        twin = config.model_copy(update={"name": f"{part}-gaussian"})
        control = fit([twin], noise, out / twin.name)[0]
        with torch.no_grad():
            results.append(_tested(tokens, site, sae, linear, part, trained.path, control.path, noise, trained.tokens))
    return results


def _stream(tokens: Tokens, site: str, store: ActivationStore | None, batch_size: int, seed: int) -> StoreStream:
    if store is not None:
        return store.stream(site, batch_size, seed)
    index = tokens.index[tokens.fit]

    def gather(name: str, rows: Tensor) -> Tensor:
        return tokens.gather(name, index[rows])

    return StoreStream(
        gather,
        n_rows=len(index),
        d_in=tokens.width(site),
        site=site,
        batch_size=batch_size,
        seed=seed,
        target_site=None,
        gradient=False,
        epochs=None,
        identity="contexts of the fit",
    )


def _covariances(tokens: Tokens, site: str, sae: Dictionary, linear: LinearMap) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and covariance of each part over the contexts of the fit."""
    d = tokens.width(site)
    moments = {part: CrossMoments(d, 0) for part in PARTS}
    with progress("error covariance", int(tokens.fit.sum())) as bar:
        for chunk in tokens.only(tokens.fit).chunks(site):
            x = chunk.x[site]
            e, along = x - reconstruct(sae, x, site), linear(x)
            for part, value in zip(PARTS, (e, along, e - along), strict=True):
                moments[part].update(value, value[:, :0])
            bar.advance(len(x))
    return {part: (m.mean_x, m.xx / m.n) for part, m in moments.items()}


def _tested(  # noqa: PLR0917
    tokens: Tokens,
    site: str,
    sae: Dictionary,
    linear: LinearMap,
    part: str,
    path: Path,
    control_path: Path,
    noise: GaussianStream,
    trained: int,
) -> ErrorSae:
    own, control = load_sae(path), load_sae(control_path)
    real, null = Reconstruction(noise.mean), Reconstruction(noise.mean)
    fired, active = torch.zeros(own.d_sae, dtype=torch.int64), 0
    for k, chunk in enumerate(tokens.only(~tokens.fit).chunks(site)):
        x = part_of(sae, chunk.x[site], linear, site, part)
        code = encode_in_parts(own, x, site).positive()
        real.update(x, own.decode(code))
        fired += torch.bincount(code.indices, minlength=own.d_sae)
        active += code.nnz
        # Batches of the training count from 0; these were never drawn.
        drawn = noise.draw(len(x), -1 - k)
        null.update(drawn, reconstruct(control, drawn, site))
    result = real.result()
    return ErrorSae(
        part=part,
        fvu=result.fvu,
        fvu_gaussian=null.result().fvu,
        l0=active / max(result.n, 1),
        dead_fraction=float((fired == 0).double().mean()),
        d_sae=own.d_sae,
        tokens=trained,
        n_test=result.n,
    )
