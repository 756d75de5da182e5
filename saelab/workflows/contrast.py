"""Contrast: what the halves of a contrastive SAE know, on pairs it was not trained on."""

from typing import TYPE_CHECKING

from pydantic import Field

from saelab.core.config import Config, parse_config
from saelab.core.errors import ConfigError
from saelab.workflows.evaluate import DEFAULT_TEXT
from saelab.workflows.pairs import PairsJob, collect_pairs
from saelab.workflows.sources import load

if TYPE_CHECKING:
    from saelab.analysis.contrast import ContrastReport


class ContrastJob(Config):
    """What ``saelab contrast`` needs; model, site and kind of pairs are those the SAE was trained on."""

    sae: str
    """Folder of a contrastive SAE."""
    text: str | None = None
    """Text to make pairs from; an SAE trained on 'stdlib:train' defaults to 'stdlib:heldout'."""
    file: str | None = None
    """File of paired texts, where it was trained on one."""
    device: str = "cpu"
    """Torch device of model and SAE."""
    max_pairs: int = Field(default=4000, ge=20)
    """Number of pairs."""
    seed: int = Field(default=1, ge=0)
    """Seed of the forks and of the control's labels."""


def run_contrast(job: ContrastJob) -> "ContrastReport":
    """Collect pairs and report on them."""
    import torch

    from saelab.analysis.contrast import contrast
    from saelab.sae.folder import load_meta, load_sae

    sae, recorded = load_sae(job.sae, device=job.device), load_meta(job.sae).get("provenance", {})
    if "pairs" not in recorded or not hasattr(sae, "common_features"):
        raise ConfigError(f"{job.sae} is no contrastive SAE trained on pairs; train one with configs/contrastive.yaml")
    trained = recorded["pairs"]
    settings = {key: recorded[key] for key in ("model", "revision", "dtype") if recorded.get(key)}
    settings |= {"device": job.device, "max_pairs": job.max_pairs, "with_context": trained["with_context"]}
    settings |= {"columns": recorded["columns"]} if recorded.get("columns") else {}
    settings |= {"tokens": recorded["tokens"]} if recorded.get("tokens") else {}
    if job.file is not None:
        settings["file"] = job.file
    elif trained["kind"] == "file":
        raise ConfigError(f"{job.sae} was trained on the pairs of {trained['text']}; give --file, best of other pairs")
    else:
        settings["text"] = job.text or DEFAULT_TEXT.get(trained["text"], trained["text"])
    pairs_job = parse_config(PairsJob, settings, str(job.sae))
    pairs = collect_pairs(pairs_job, load(pairs_job), recorded["site"], job.seed)
    sides = [
        side if pairs.context is None else torch.cat([pairs.context, side], 1)
        for side in (pairs.positive, pairs.negative)
    ]
    return contrast(sae, sides[0], sides[1], job.seed)
