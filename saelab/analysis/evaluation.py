"""``Evaluation``: the numbers that say how good an SAE is, and over which tokens and positions they were taken."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab import __version__
from saelab.core.artifacts import prepare_output, read_json, read_manifest, write_json, write_manifest
from saelab.core.errors import CorruptError
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

EVALUATION = "evaluation.json"
"""Name of the file in an evaluation folder."""


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What :func:`saelab.analysis.evaluate.evaluate` found. All sums were taken in float64."""

    fvu: float
    """Fraction of variance unexplained: ``sum ||x - x_hat||^2 / sum ||x - mean(x)||^2`` over the same tokens."""
    explained_variance: float
    """``1 - fvu``."""
    mse: float
    """Mean over tokens of ``||x - x_hat||^2``, summed over dimensions."""
    nmse: float
    """Mean over tokens of ``||x - x_hat||^2 / ||x||^2`` (another number than the FVU)."""
    cosine: float
    """Mean over tokens of the cosine between x and x_hat."""
    shrinkage: float
    """``sum ||x_hat||^2 / sum <x, x_hat>`` on centred data: 1 unbiased, below 1 shrunk."""
    l0: float
    """Mean number of active features per token."""
    l0_std: float
    """Standard deviation of that number over tokens."""
    l0_percentiles: dict[str, int]
    """Percentiles 0, 5, 25, 50, 75, 95 and 100 of the number of active features per token."""
    l0_counts: list[int]
    """Number of tokens with 0, 1, 2, ... active features."""
    dead_fraction: float
    """Share of features that never fired over ``n_tokens`` tokens."""
    dense_fraction: float
    """Share of features that fired on more than ``density_dense`` of the tokens."""
    density_dense: float
    """Density from which on a feature counts as dense."""
    ce_clean: float
    """Mean next-token cross-entropy (nats) of the untouched model over ``n_predictions`` predictions."""
    ce_sae: float
    """The same with the site replaced by the SAE's reconstruction."""
    ce_zero: float
    """The same with the site replaced by zeros."""
    ce_mean: float
    """The same with the site replaced by its mean activation."""
    ce_recovered: float
    """``(ce_zero - ce_sae) / (ce_zero - ce_clean)``: the headline, with zero ablation."""
    ce_recovered_mean: float
    """``(ce_mean - ce_sae) / (ce_mean - ce_clean)``: the stricter one, with mean ablation."""
    kl_sae: float
    """Mean ``KL(clean || spliced)`` in nats over the same predictions."""
    kl_zero: float
    """Mean ``KL(clean || zero-ablated)``."""
    kl_mean: float
    """Mean ``KL(clean || mean-ablated)``."""
    kl_score: float
    """``(kl_zero - kl_sae) / kl_zero``."""
    kl_score_mean: float
    """``(kl_mean - kl_sae) / kl_mean``."""
    n_tokens: int
    """Kept tokens (no BOS, padding or other special tokens): those of the reconstruction and firing statistics."""
    n_predictions: int
    """Predictions scored: every position whose next token is a kept one."""
    n_rows: int
    """Rows of text run through the model."""
    splice: str
    """Positions replaced in the spliced and ablated runs: ``kept`` (the others keep their activation) or ``all``."""
    mean_source: str
    """Whose mean the mean ablation puts in: ``tokens`` (these same tokens) or ``given`` (by the caller)."""
    site: str
    """Where in the model."""
    model: str
    """The model's name."""
    model_fingerprint: str
    """The model's fingerprint."""
    source: str
    """Name of the text."""
    source_fingerprint: str
    """Fingerprint of the text."""
    rows: dict[str, Any]
    """How the text was cut into rows of tokens."""
    sae: str
    """The SAE's architecture or class."""
    d_in: int
    """Activation width."""
    d_sae: int
    """Number of features."""
    sae_fingerprint: str = ""
    """Checksum of the SAE's weights, by which its evaluation is told from another's."""
    saelab_version: str = __version__
    """Version that took the numbers."""
    training_text: bool = False
    """Whether the text is the one the SAE was trained on, so that nothing here is held out."""
    target_site: str = ""
    """Site that is reconstructed and replaced where it is not ``site`` (transcoders); the FVU and the ablations are
    of this one."""
    fvu_trained: float = math.nan
    """FVU of the code as training chooses it (over whole batches, or by gradient) instead of as inference does."""
    l0_trained: float = math.nan
    """Mean number of active features per token of that code."""
    trained_batch: int = 0
    """Tokens that compete with one another in that code."""
    trained_tokens: int = 0
    """Tokens it was measured on; 0: not measured."""
    ce_trained: float = math.nan
    """Cross-entropy with a gradient SAE's reconstruction from features chosen by gradient; nan for other SAEs. The
    choice sees the next token, so this number and the next are flattered."""
    ce_recovered_trained: float = math.nan
    """``(ce_zero - ce_trained) / (ce_zero - ce_clean)``, likewise."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python values."""
        return dataclasses.asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row of all scalar fields (percentiles as ``l0_p50`` ...; ``l0_counts`` and ``rows`` left out)."""
        import pandas as pd

        row = self.to_dict()
        del row["l0_counts"], row["rows"]
        row |= {f"l0_p{q}": value for q, value in row.pop("l0_percentiles").items()}
        return pd.DataFrame([row])

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``loss``: cross-entropy untouched, spliced and ablated; ``l0``: active features per token."""
        from saelab.analysis.figures import counts_per_token, losses

        return {"loss": losses(self), "l0": counts_per_token(self.l0_counts)}

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.site}: FVU {self.fvu:.4f}, L0 {self.l0:.1f}, CE recovered {self.ce_recovered:.4f} "
            f"(clean {self.ce_clean:.3f}, SAE {self.ce_sae:.3f}, zero {self.ce_zero:.3f}, mean {self.ce_mean:.3f}), "
            f"dead {self.dead_fraction:.1%}, {self.n_tokens} tokens of {self.source}"
            f"{', which it was trained on' if self.training_text else ''})"
        )


def save_evaluation(evaluation: Evaluation, folder: str | Path, *, force: bool = False) -> Path:
    """Write an evaluation folder (``evaluation.json`` and the manifest) and return its path."""
    folder = prepare_output(folder, force=force)
    write_json(folder / EVALUATION, evaluation.to_dict())
    headline = (
        "fvu",
        "l0",
        "ce_recovered",
        "dead_fraction",
        "n_tokens",
        "site",
        "model",
        "source",
        "sae",
        "d_sae",
        "sae_fingerprint",
    )
    write_manifest(folder, "evaluation", {name: getattr(evaluation, name) for name in headline})
    return folder


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read what :func:`save_evaluation` wrote."""
    read_manifest(folder, "evaluation")
    path = Path(folder) / EVALUATION
    data = read_json(path)
    fields = dataclasses.fields(Evaluation)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(data, dict) or not needed <= set(data) <= {field.name for field in fields}:
        raise CorruptError(f"{path} does not have the fields of an evaluation; evaluate again")
    floats = {field.name for field in fields if field.type in (float, "float")}
    values: dict[str, Any] = dict(data)
    values |= {name: math.nan for name in floats & set(values) if values[name] is None}
    return Evaluation(**values)
