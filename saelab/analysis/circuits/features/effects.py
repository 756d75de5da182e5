"""Effects of latents and errors on a metric (Marks et al. 2024, arXiv 2403.19647): first order, integrated, and exact.

With ``x = f W_dec + b + e`` at a site, replacing latent i by its value on the corrupted prompt moves x by
``(f'_i - f_i) W_dec[i]``, and the error by ``e' - e``. So all three follow from gradients with respect to x itself,
the gradient passing through latents and error alike:

* ``atp``: ``(f'_i - f_i) W_dec[i] . dm/dx`` at the clean run: one backward for all sites;
* ``ig``: the same with the gradient averaged at the midpoints between x and x' (one site at a time, latents and error
  moved together); the effects of a site sum to ``m(x := x') - m(clean)``;
* :func:`exact_effects`: the model run with the one node replaced.

The error's d entries are contracted into one node per position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits.metrics import at_readout, measure
from saelab.analysis.circuits.nodes import Coded, NodeAddress, SiteDictionary, read_sites
from saelab.analysis.circuits.tasks import MetricName, TaskBatch
from saelab.core.errors import ConfigError

EffectMethod = Literal["atp", "ig"]
PatchValue = Literal["corrupted", "zero"]


@dataclass(frozen=True, eq=False)
class SiteEffects:
    """Effects at one site, for each prompt and position (0 at padding)."""

    site: str
    latents: Float[Tensor, "b t f"]
    """m(latent replaced) - m(clean), predicted."""
    error: Float[Tensor, "b t"]
    """The same for the SAE's error at each position."""
    gradient: Float[Tensor, "b t d"]
    """Gradient that they come from."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects at every site."""

    method: EffectMethod
    metric: MetricName
    patch: PatchValue
    clean: dict[str, Coded]
    other: dict[str, Coded]
    sites: dict[str, SiteEffects]
    clean_score: Float[Tensor, " b"]
    """Metric of each clean prompt."""


class FeatureRunner:
    """A model, its SAEs and a batch of a task: what effects, edges and circuits are measured with."""

    def __init__(
        self,
        model: Any,
        dictionaries: Sequence[SiteDictionary],
        batch: TaskBatch,
        metric: MetricName,
        patch: PatchValue = "corrupted",
    ) -> None:
        if not dictionaries:
            raise ConfigError("no SAE was given; a feature circuit needs one for at least one site")
        self.model, self.dictionaries, self.batch = model, list(dictionaries), batch
        self.metric_name, self.patch = metric, patch
        self.valid: Float[Tensor, "b t 1"] = batch.valid.to(model.device)[..., None].float()
        self.clean = read_sites(model, batch.clean, dictionaries)
        self.other = read_sites(model, batch.corrupted, dictionaries) if patch == "corrupted" else self._zeros()
        self.reference: Float[Tensor, "b v"] = self.logits({})
        self.clean_score = self.metric(self.reference)

    def _zeros(self) -> dict[str, Coded]:
        return {
            site: Coded(torch.zeros_like(c.x), torch.zeros_like(c.latents), torch.zeros_like(c.error))
            for site, c in self.clean.items()
        }

    def logits(self, replace: dict[str, Any], grad: bool = False) -> Float[Tensor, "b v"]:
        """Logits at the readout with functions at some sites."""
        return at_readout(self.model.logits(self.batch.clean, replace, grad=grad), self.batch.readout)

    def metric(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
        """Metric per prompt."""
        return measure(self.metric_name, logits, self.batch, self.reference)

    def score(self, replace: dict[str, Any]) -> float:
        """Mean metric with functions at some sites."""
        return float(self.metric(self.logits(replace)).double().mean())


def gradients(runner: FeatureRunner) -> dict[str, Float[Tensor, "b t d"]]:
    """Gradient of the summed metric with respect to the activation at every site, in the clean run."""
    held: dict[str, Tensor] = {}

    def hold(site: str) -> Any:
        def visit(x: Tensor) -> Tensor:
            held[site] = x if x.requires_grad else x.detach().requires_grad_()
            return held[site]

        return visit

    with torch.enable_grad():
        total = runner.metric(runner.logits({d.site: hold(d.site) for d in runner.dictionaries}, grad=True)).sum()
        found = torch.autograd.grad(total, list(held.values()))
    return {site: g.float() for site, g in zip(held, found, strict=True)}


def integrated_gradient(runner: FeatureRunner, site: str, steps: int) -> Float[Tensor, "b t d"]:
    """Mean gradient at the midpoints between the clean and the other activation at one site."""
    clean, other = runner.clean[site].x, _target(runner, site)
    total = torch.zeros_like(clean)
    for k in range(steps):
        leaf = (clean + (k + 0.5) / steps * (other - clean) * runner.valid).requires_grad_()

        def put(x: Tensor, leaf: Tensor = leaf) -> Tensor:
            return leaf.to(x.dtype)

        with torch.enable_grad():
            metric = runner.metric(runner.logits({site: put}, grad=True)).sum()
            total += torch.autograd.grad(metric, leaf)[0].float()
    return total / steps


def _target(runner: FeatureRunner, site: str) -> Float[Tensor, "b t d"]:
    """Activation with all latents and the error at their other values."""
    dictionary = next(d for d in runner.dictionaries if d.site == site)
    clean, other = runner.clean[site], runner.other[site]
    return clean.x + (other.latents - clean.latents) @ dictionary.rows + other.error - clean.error


def node_effects(runner: FeatureRunner, method: EffectMethod, steps: int = 10) -> Effects:
    """Effects of every latent and error at every site."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}, expected at least 1")
    found = gradients(runner) if method == "atp" else {}
    sites: dict[str, SiteEffects] = {}
    for d in runner.dictionaries:
        gradient = found[d.site] if method == "atp" else integrated_gradient(runner, d.site, steps)
        gradient = gradient * runner.valid
        clean, other = runner.clean[d.site], runner.other[d.site]
        latents = (other.latents - clean.latents) * (gradient @ d.rows.T)
        error = ((other.error - clean.error) * gradient).sum(-1)
        sites[d.site] = SiteEffects(d.site, latents, error, gradient)
    return Effects(method, runner.metric_name, runner.patch, runner.clean, runner.other, sites, runner.clean_score)


@torch.no_grad()
def exact_effects(runner: FeatureRunner, nodes: Sequence[NodeAddress]) -> Float[Tensor, "n b"]:
    """``m(node replaced) - m(clean)`` of each prompt, by one run for each node."""
    found = []
    for node in nodes:
        d = next((d for d in runner.dictionaries if d.site == node.site), None)
        if d is None:
            raise ConfigError(f"node {node} is at a site without an SAE (there are {', '.join(runner.clean)})")
        clean, other = runner.clean[d.site], runner.other[d.site]
        if node.index == "error":
            step = other.error - clean.error
        else:
            step = (other.latents - clean.latents)[..., node.index, None] * d.rows[node.index]
        where = runner.valid
        if node.position is not None:
            where = torch.zeros_like(where)
            where[:, node.position] = runner.valid[:, node.position]

        def put(x: Tensor, step: Tensor = step * where) -> Tensor:
            return x + step.to(x.dtype)

        found.append(runner.metric(runner.logits({d.site: put})) - runner.clean_score)
    return torch.stack(found)
