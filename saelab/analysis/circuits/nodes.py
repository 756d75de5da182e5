"""Node addresses, and reading many sites with SAEs: what feature circuits and attention tools stand on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.errors import ActivationError, ConfigError
from saelab.features.protocols import Dictionary

ERROR: Literal["error"] = "error"


@dataclass(frozen=True)
class NodeAddress:
    """A latent, or the SAE's error, at a site, at one position or at all together."""

    site: str
    position: int | None
    """Position in the prompt; None where positions are summed."""
    index: int | Literal["error"]

    def __str__(self) -> str:
        where = "all" if self.position is None else str(self.position)
        return f"{self.site}/{where}/{self.index}"

    @staticmethod
    def parse(text: str) -> "NodeAddress":
        """Undo ``str``."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ConfigError(f"'{text}' is no node address, expected SITE/POSITION/INDEX")
        site, where, index = parts
        return NodeAddress(site, None if where == "all" else int(where), "error" if index == "error" else int(index))


@dataclass(frozen=True, eq=False)
class Coded:
    """Activations at a site as an SAE sees them: ``x = latents @ rows + bias + error``."""

    x: Float[Tensor, "b t d"]
    latents: Float[Tensor, "b t f"]
    error: Float[Tensor, "b t d"]


class SiteDictionary:
    """An SAE at a site of a model: dense codes and errors in raw units."""

    def __init__(self, site: str, sae: Dictionary, width: int) -> None:
        if sae.d_in != width:
            raise ActivationError(f"the SAE for {site} takes width {sae.d_in}, the site has {width}; give its own site")
        if sae.W_dec.shape[1] != width:
            raise ActivationError(
                f"the dictionary for {site} writes another site (a transcoder); an SAE is needed here"
            )
        self.site, self.sae = site, sae
        self.scale = float(getattr(sae, "input_scale", 1.0))
        self.rows: Float[Tensor, "f d"] = sae.W_dec.detach().float() / self.scale
        """What one unit of a latent adds to the activation."""
        self.reads: Float[Tensor, "f d"] = sae.W_enc.detach().float().T * self.scale
        """Gradient of an active latent with respect to the activation."""

    @property
    def n(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    @torch.no_grad()
    def code(self, x: Float[Tensor, "b t d"]) -> Coded:
        """Split activations into latents and error."""
        flat = x.detach().float().flatten(0, 1)
        code = self.sae.encode(flat)
        error = (flat - self.sae.decode(code)).view(x.shape)
        return Coded(x.detach().float(), code.to_dense().view(*x.shape[:2], -1).float(), error)


Visit = Callable[[Tensor], Tensor]


def run_sites(model: Any, tokens: Int[Tensor, "b t"], visits: dict[str, Visit], grad: bool = False) -> Tensor:
    """Logits (B, T, vocab) with functions at some sites (None means look only)."""
    logits: Tensor = model.logits(tokens, visits, grad=grad)
    return logits


def read_sites(model: Any, tokens: Int[Tensor, "b t"], dictionaries: Sequence[SiteDictionary]) -> dict[str, Coded]:
    """Codes and errors at every site of a batch."""
    found = model.read(tokens, [d.site for d in dictionaries])
    return {d.site: d.code(found[d.site]) for d in dictionaries}


def in_order(model: Any, dictionaries: Sequence[SiteDictionary]) -> list[SiteDictionary]:
    """Sort by the forward pass; refuse two dictionaries for one site."""
    names = [d.site for d in dictionaries]
    if len(set(names)) < len(names):
        raise ConfigError(f"two SAEs for one site among {', '.join(names)}; give one for each")
    order = {name: i for i, name in enumerate(model.sites())}
    return sorted(dictionaries, key=lambda d: order.get(d.site, len(order)))
