"""Codebook: a bottleneck that replaces an activation by a few vectors of a learned codebook (Tamkin, Taufeeque,
Goodman 2023, "Codebook Features: Sparse and Discrete Interpretability for Neural Networks", arXiv 2310.17230).

At a site, or at each head of a site apart, with an activation a of width d:

    n     = (a - mean a) / std a                      LayerNorm without parameters; its scale is not restored
    J     = the k codes c_j of largest <n, c_j> / ||c_j||        (or of least ||n - c_j||)
    out   = 1/k sum over J of c_j

The model is trained around it. Backward (``gradient: ae``, theirs): n receives the gradient of out as if the bottleneck
were the identity, codes receive it too, and beside it that of ``mean over tokens of ||out - n||^2``. ``vqvae``: codes
receive the latter alone, and n a commitment to what was chosen (van den Oord et al. 2017); ``none``: no such loss.
The paper writes a sum over J where its code takes a mean; here the factor 1/k belongs to the trained k, so a code that
is added later adds c_j / k, and one that is taken out takes that away.

A code that nothing has chosen for a while is dead, and is put where some current activation is.
"""  # noqa: D205

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from saelab.core.config import Config
from saelab.core.errors import ActivationError, ConfigError

__all__ = ["CodeEdit", "Codebook", "CodebookConfig"]


class CodebookConfig(Config):
    """One codebook."""

    codes: int = Field(default=1000, gt=0)
    """Number K of codes (of each head)."""
    k: int = Field(default=1, gt=0)
    """Codes that are active at once."""
    similarity: Literal["cosine", "euclidean"] = "cosine"
    """By what codes are chosen."""
    gradient: Literal["ae", "vqvae", "none"] = "ae"
    """What trains the codes beside or instead of the task; see :mod:`saelab.sae.codebook`."""
    commitment: float = Field(default=0.25, ge=0)
    """With vqvae: weight of the pull of activations to their codes."""
    dead_after_tokens: int = Field(default=50_000, gt=0)
    """A code that was not chosen for this many tokens is moved to a current activation."""
    noise: float = Field(default=0.01, ge=0)
    """Standard deviation of what is added to it there."""

    @model_validator(mode="after")
    def _k_fits(self) -> "CodebookConfig":
        if self.k > self.codes:
            raise ValueError(f"k = {self.k} is more than codes = {self.codes}; lower k or raise codes")
        return self


@dataclass(frozen=True)
class CodeEdit:
    """An intervention on the codes at a site."""

    codes: Sequence[int]
    """The codes that are meant."""
    mode: Literal["replace", "add", "disable"] = "replace"
    """Put them in the place of the chosen ones, add them to these, or choose among all others."""
    group: int = 0
    """Which head's codebook (0 where the site has one)."""
    positions: Sequence[int] | None = None
    """Positions in the row, negative from its end; None: everywhere."""


class Codebook(nn.Module):
    """The codebooks of one site: ``codes`` (groups, K, d_group), one group per head or one in all.

    :meth:`forward` keeps, of its last call, ``loss`` (the reconstruction, 0-dim) and ``chosen`` (B, T, groups, k).
    Buffer ``unused`` (groups, K): tokens since each code was chosen.
    """

    unused: Int[Tensor, "groups codes"]

    def __init__(self, config: CodebookConfig, width: int, groups: int = 1, seed: int = 0) -> None:
        """Draw codes at random; ``groups`` equal parts of the activation have a codebook each."""
        super().__init__()
        if width % groups:
            raise ConfigError(f"a width of {width} does not fall into {groups} heads")
        self.config, self.width, self.groups = config, width, groups
        draw = torch.Generator().manual_seed(seed)
        self.codes = nn.Parameter(torch.randn(groups, config.codes, width // groups, generator=draw))
        self.register_buffer("unused", torch.zeros(groups, config.codes, dtype=torch.int64))
        self.loss: Tensor = torch.zeros(())
        self.chosen: Tensor | None = None

    def forward(self, a: Float[Tensor, "b t width"], edits: Sequence[CodeEdit] = ()) -> Float[Tensor, "b t width"]:
        """Return what takes the place of an activation; in training mode, count which codes are used."""
        n = self.normalized(a)
        with torch.no_grad():
            chosen = self._choose(n, edits)
        self.chosen = chosen
        out = self._mean(chosen)
        if self.training:
            self._count(chosen)
        self.loss = self._loss(n, out)
        if self.config.gradient == "vqvae":
            out = out.detach()
        out = out + (n - n.detach())  # straight through: value of out, gradient of the identity for n
        for edit in edits:
            if edit.mode != "disable":
                out = self._edited(out, edit)
        return out.flatten(2).to(a.dtype)

    def normalized(self, a: Float[Tensor, "b t width"]) -> Float[Tensor, "b t groups d"]:
        """Return the activation, head by head, with mean 0 and variance 1."""
        if a.shape[-1] != self.width:
            raise ActivationError(f"activations are {a.shape[-1]} wide, this codebook was made for {self.width}")
        parts = a.to(self.codes.dtype).reshape(*a.shape[:-1], self.groups, self.width // self.groups)
        return nn.functional.layer_norm(parts, parts.shape[-1:])

    @torch.no_grad()
    def start_from(self, a: Float[Tensor, "b t width"], keep: Bool[Tensor, "b t"], generator: torch.Generator) -> None:
        """Put every code at the activation of a random kept token, with noise."""
        self._place(self.normalized(a)[keep], torch.ones_like(self.unused, dtype=torch.bool), generator)

    @torch.no_grad()
    def revive(self, a: Float[Tensor, "b t width"], keep: Bool[Tensor, "b t"], generator: torch.Generator) -> int:
        """Move dead codes to activations of random kept tokens; return how many there were."""
        dead = self.unused >= self.config.dead_after_tokens
        if bool(dead.any()):
            self._place(self.normalized(a)[keep], dead, generator)
        return int(dead.sum())

    def _place(self, n: Float[Tensor, "m groups d"], where: Bool[Tensor, "g c"], generator: torch.Generator) -> None:
        for group in range(self.groups):
            count = int(where[group].sum())
            rows = torch.randint(n.shape[0], (count,), generator=generator).to(n.device)
            noise = torch.randn(count, n.shape[-1], generator=generator).to(n)
            self.codes[group, where[group]] = n[rows, group] + self.config.noise * noise
        self.unused[where] = 0

    def _choose(self, n: Float[Tensor, "b t groups d"], edits: Sequence[CodeEdit]) -> Int[Tensor, "b t groups k"]:
        # At most 16M similarities at a time.
        step = max(1, (1 << 24) // (self.groups * self.config.codes * n.shape[1]))
        parts = []
        for start in range(0, n.shape[0], step):
            scores = torch.einsum("btgd,gcd->btgc", n[start : start + step], self.codes)
            norms = torch.linalg.vector_norm(self.codes, dim=2)
            if self.config.similarity == "cosine":
                scores = scores / norms.clamp(min=1e-12)
            else:
                scores = 2 * scores - norms.square()
            for edit in edits:
                if edit.mode == "disable":
                    self._mask(scores, edit)
            parts.append(scores.topk(self.config.k, dim=3).indices)
        return torch.cat(parts)

    def _mean(self, chosen: Int[Tensor, "b t groups k"]) -> Float[Tensor, "b t groups d"]:
        b, t, g, k = chosen.shape
        flat = chosen + self.config.codes * torch.arange(g, device=chosen.device).view(1, 1, g, 1)
        # embedding_bag sums k rows without holding (b, t, g, k, d).
        summed = nn.functional.embedding_bag(flat.view(-1, k), self.codes.flatten(0, 1), mode="sum")
        return summed.view(b, t, g, -1) / k

    def _loss(self, n: Tensor, out: Tensor) -> Float[Tensor, ""]:
        tokens = max(n.shape[0] * n.shape[1], 1)
        if self.config.gradient == "none":
            return n.new_zeros(())
        loss = (out - n.detach()).square().sum() / tokens
        if self.config.gradient == "vqvae":
            loss = loss + self.config.commitment * (out.detach() - n).square().sum() / tokens
        return loss

    @torch.no_grad()
    def _count(self, chosen: Int[Tensor, "b t groups k"]) -> None:
        used = torch.zeros_like(self.unused, dtype=torch.bool)
        for group in range(self.groups):
            used[group, chosen[:, :, group].flatten()] = True
        self.unused.copy_(torch.where(used, 0, self.unused + chosen.shape[0] * chosen.shape[1]))

    # Interventions ---------------------------------------------------------------------------------------------------

    def _mask(self, scores: Float[Tensor, "b t groups codes"], edit: CodeEdit) -> None:
        codes = self._codes_of(edit)
        if len(set(edit.codes)) + self.config.k > self.config.codes:
            raise ConfigError(f"{len(edit.codes)} codes are disabled, but {self.config.k} must be left to choose")
        part = scores[:, self._positions(edit, scores.shape[1])]
        part[:, :, edit.group, codes] = -torch.inf
        scores[:, self._positions(edit, scores.shape[1])] = part

    def _edited(self, out: Float[Tensor, "b t groups d"], edit: CodeEdit) -> Float[Tensor, "b t groups d"]:
        value = self.codes[edit.group, self._codes_of(edit)]
        where = self._positions(edit, out.shape[1])
        out = out.clone()
        if edit.mode == "replace":
            out[:, where, edit.group] = value.mean(0)
        else:
            out[:, where, edit.group] += value.sum(0) / self.config.k
        return out

    def _positions(self, edit: CodeEdit, length: int) -> Int[Tensor, " n"]:
        wanted = range(length) if edit.positions is None else [p for p in edit.positions if -length <= p < length]
        return torch.tensor([p % length for p in wanted], dtype=torch.int64, device=self.codes.device)

    def _codes_of(self, edit: CodeEdit) -> Int[Tensor, " n"]:
        if not 0 <= edit.group < self.groups or not edit.codes:
            raise ConfigError(f"an edit names group {edit.group} and {len(edit.codes)} codes; there are {self.groups}")
        if not all(0 <= code < self.config.codes for code in edit.codes):
            raise ConfigError(f"an edit names codes {list(edit.codes)}; there are {self.config.codes} (from 0 on)")
        return torch.tensor(list(edit.codes), dtype=torch.int64, device=self.codes.device)
