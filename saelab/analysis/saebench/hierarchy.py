"""Absorption where the truth is planted: an SAE of the same architecture, trained on features in a hierarchy.

Data: orthonormal directions, some of them parents with children; a child is on only when its parent is, so

    x = a_p v_p + a_c v_c + noise

A dictionary that is paid for sparsity can silence the parent where a child is on and write v_p + v_c with one feature:
absorption, here with the direction v_p known. Each child is rare (a fortieth of its parent's occurrences), so that
sparse probing does not take its feature for a main one, and k is 1 where a parent and a child are two: sparser than
the truth, as real SAEs are. The result speaks of architecture and sparsity, not of the one trained SAE evaluated.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from saelab.analysis.saebench.absorption import absorption
from saelab.analysis.saebench.controls import Untrained, scale_of
from saelab.analysis.saebench.examples import LabelledSet, Pooled
from saelab.analysis.saebench.result import EvalResult, mean
from saelab.core.batch import Batch
from saelab.features.protocols import Dictionary
from saelab.features.rows import encode_in_parts
from saelab.sae import SAE, SAEConfig
from saelab.sae.folder import load_sae
from saelab.sae.topk import TopKConfig
from saelab.training.config import FitConfig, TrainingConfig
from saelab.training.loop import fit

EVAL = "absorption_planted"
PARENTS, CHILDREN, WIDTH, PARENT_RATE, NOISE, ACTIVE = 4, 20, 128, 0.25, 0.01, 1
STEPS, BATCH = 1500, 1024


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Samples of planted parents and children."""

    x: Float[Tensor, "n d"]
    """Activations."""
    parents: Bool[Tensor, "n p"]
    """Which parents are on."""
    directions: Float[Tensor, "p d"]
    """Directions of the parents."""


def sample(n: int, seed: int, directions_seed: int = 0) -> Hierarchy:
    """Draw n samples: each parent is on at a rate of 1/4, and then, in half of the cases, one of its 20 children."""
    fixed = torch.Generator().manual_seed(directions_seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))[0].T
    generator = torch.Generator().manual_seed(seed)
    parents = torch.rand(n, PARENTS, generator=generator) < PARENT_RATE
    child = torch.randint(0, 2 * CHILDREN, (n, PARENTS), generator=generator)
    children = torch.nn.functional.one_hot(child, 2 * CHILDREN)[..., :CHILDREN].bool() & parents[..., None]
    codes = torch.cat([parents.float(), children.flatten(1).float()], 1)
    codes = codes * (0.8 + 0.4 * torch.rand(codes.shape, generator=generator))
    x = codes @ basis[: codes.shape[1]] + NOISE * torch.randn(n, WIDTH, generator=generator)
    return Hierarchy(x, parents, basis[:PARENTS])


class _Samples:
    """The samples as a batch source, in a new random order each epoch."""

    d_in = WIDTH

    def __init__(self, x: Tensor, batch: int, seed: int) -> None:
        self.x, self.batch, self.seed, self.step = x, batch, seed, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.seed + self.step)
            self.step += 1
            yield Batch(self.x[torch.randint(0, len(self.x), (self.batch,), generator=generator)])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def train_small(config: SAEConfig, x: Float[Tensor, "n d"], *, steps: int, lr: float, seed: int) -> SAE:
    """Train an SAE on a matrix in memory with the ordinary training loop, and return it."""
    source = _Samples(x, min(BATCH, len(x)), seed)
    source.d_in = x.shape[1]
    training = TrainingConfig(
        tokens=steps * source.batch, batch_size=source.batch, lr=lr, seed=seed, device="cpu", dead_after_tokens=100_000
    )
    with tempfile.TemporaryDirectory() as folder:
        fit([FitConfig(name="small", sae=config, training=training)], source, folder)
        return load_sae(f"{folder}/small")


def planted_absorption(config: SAEConfig, *, steps: int = STEPS, n: int = 20_000, seed: int = 0) -> EvalResult:
    """Train an SAE of the architecture of ``config`` on the hierarchy and score its absorption of the parents.

    It has one feature per planted one and, where the architecture has a k or an L0 to aim at, a sparsity of 1. One that
    needs gradients is trained as TopK.
    """
    small = small_config(config, d_in=WIDTH, d_sae=PARENTS * (1 + CHILDREN), k=ACTIVE)
    train, test = sample(n, seed + 1), sample(n // 4, seed + 2)
    sae = train_small(small, train.x, steps=steps, lr=3e-3, seed=seed)
    control = Untrained(sae, train.x.mean(0), ACTIVE, seed)
    dictionaries: dict[str, Dictionary] = {"sae": sae, "untrained": control}
    data = _labelled(
        torch.cat([train.x[: n // 4], test.x]), torch.cat([train.parents[: n // 4], test.parents]), dictionaries
    )
    decoders = {name: d.W_dec.numpy() / scale_of(d) for name, d in dictionaries.items()}
    about = {"architecture": small.architecture, "d_sae": small.d_sae, "k": ACTIVE, "steps": steps, "random_seed": seed}
    about |= {
        "parents": PARENTS,
        "children_each": CHILDREN,
        "parent_rate": PARENT_RATE,
        "trained": "for this evaluation",
    }
    return _over_parents(data, decoders, about, test.directions.numpy())


def small_config(config: SAEConfig, *, d_in: int, d_sae: int, k: int) -> SAEConfig:
    """Return the architecture's config at other sizes, its other settings kept; TopK where that cannot be."""
    from saelab.sae.registry import ARCHITECTURES

    values = config.model_dump()
    values |= {"d_in": d_in, "d_sae": d_sae, "input_scale": None}
    for name in ("k", "target_l0"):
        if name in values and values[name] is not None:
            values[name] = k
    entry = ARCHITECTURES[config.architecture]
    plain = TopKConfig(d_in=d_in, d_sae=d_sae, k=k)
    if getattr(entry.sae, "needs_gradient", False) or config.d_out != config.d_in:
        return plain
    try:
        return entry.config(**values)
    except ValueError:  # settings that fit the large SAE's sizes alone (a fixed list of widths, say)
        return plain


def _labelled(x: Tensor, parents: Tensor, dictionaries: dict[str, Dictionary]) -> list[LabelledSet]:
    """One set per parent: the first half is training."""
    codes = {}
    for name, dictionary in dictionaries.items():
        code = encode_in_parts(dictionary, x, "planted").positive()
        arrays = (code.values.numpy(), code.indices.numpy(), code.offsets.numpy())
        codes[name] = sparse.csr_matrix(arrays, shape=(code.n_tokens, code.d_sae))
    pooled = Pooled(x.numpy(), codes)
    train = np.arange(len(x)) < len(x) // 2
    return [
        LabelledSet("hier", (f"parent {p}",), pooled, np.where(parents[:, p].numpy(), 0, 1).astype(np.int64), train)
        for p in range(PARENTS)
    ]


def _over_parents(
    data: list[LabelledSet], decoders: dict[str, np.ndarray], about: dict[str, Any], directions: np.ndarray
) -> EvalResult:
    """Score each parent and join the results as those of one evaluation."""
    found = [
        absorption(part, decoders, eval_type_id=EVAL, config=about, directions=directions[[p]])
        for p, part in enumerate(data)
    ]
    scored = [result for result in found if not result.skipped]
    if not scored:
        return found[0]
    groups = {
        name: {"mean": {key: mean([r.value(key, name) for r in scored]) for key in scored[0].metrics["mean"]}}
        for name in (None, "untrained")
    }
    parts = {
        key: {side: [value for r in scored for value in r.parts[key][side]] for side in decoders}
        for key in scored[0].parts
    }
    for name, group in groups.items():  # spreads are over the parents, each of which is an evaluation of its own here
        del group["mean"]["std_dev_num_split_features"]
        for key in ("mean_absorption_fraction_score", "mean_full_absorption_score"):
            spread = np.std(parts[key][name or "sae"], ddof=min(1, len(scored) - 1))
            group["mean"]["std_dev_" + key.removeprefix("mean_")] = float(spread)
    config = {**scored[0].config, "classes_scored": len(scored), "classes_skipped": len(found) - len(scored)}
    return dataclasses.replace(
        scored[0],
        config=config,
        metrics=groups[None],
        controls={"untrained": groups["untrained"]},
        details=[detail for r in scored for detail in r.details],
        parts=parts,
    )
