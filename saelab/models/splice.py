"""Put an SAE into a running model for the length of a ``with`` block."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import SiteError
from saelab.models.sites import Site, hooked

if TYPE_CHECKING:
    from saelab.models.subject import SubjectModel


@runtime_checkable
class Codec(Protocol):
    """What is spliced in: raw activations (N, d) to a code and back (``saelab.sae.SAE`` and the like)."""

    def encode(self, x: Float[Tensor, "n d"]) -> Any:
        """Return the code of some activations."""

    def decode(self, code: Any) -> Float[Tensor, "n d"]:
        """Return the reconstruction of a code."""


@dataclass
class Spliced:
    """What the last run through the splice looked like, by site."""

    code: dict[str, Any]
    """The codes of all its tokens, (B T) in order."""
    x: dict[str, Float[Tensor, "b t d"]]
    """The activations that came."""
    x_hat: dict[str, Float[Tensor, "b t d"]]
    """Their reconstructions."""


@contextmanager
def splice(
    model: "SubjectModel", dictionary: Codec | Mapping[str, Codec], site: str | None = None, *, keep_error: bool = False
) -> Iterator[Spliced]:
    """Run ``model`` with its activation at ``site`` replaced by the reconstruction; see :meth:`SubjectModel.splice`."""
    wanted = _by_site(dictionary, site)
    sites = [model.site(name) for name in wanted]
    seen = Spliced({}, {}, {})

    def visit(place: Site, value: Tensor) -> Tensor:
        x = place.flat(value, value.shape[0])
        flat = rearrange(x, "b t d -> (b t) d").float()
        codec = wanted[place.name]
        code = codec.encode(flat)
        x_hat = codec.decode(code).view(x.shape)
        seen.code[place.name], seen.x[place.name], seen.x_hat[place.name] = code, x, x_hat
        # The error is a constant: gradients go through the dictionary alone, as in sparse feature circuits.
        new = x_hat + (x.float() - x_hat).detach() if keep_error else x_hat
        return place.shaped(new.to(value.dtype), value)

    with ExitStack() as stack:
        if all(place.address is not None for place in sites):
            stack.enter_context(hooked(model.plain, sites, visit))
        else:
            stack.enter_context(model.through_bridge())
        hooks = [(place.name, _bridge_hook(place, visit)) for place in sites]
        stack.enter_context(model.bridge.hooks(fwd_hooks=hooks))
        yield seen


def _by_site(dictionary: Codec | Mapping[str, Codec], site: str | None) -> dict[str, Codec]:
    if isinstance(dictionary, Mapping):
        if site is not None:
            raise SiteError(f"site {site} was given beside a mapping of sites; give one or the other")
        return dict(dictionary)
    where = site or getattr(dictionary, "site", None)
    if where is None:
        raise SiteError("the SAE does not say where it belongs; name the site, such as blocks.2.hook_resid_post")
    target = getattr(dictionary, "target_site", None)
    if target is not None and target != where:
        raise SiteError(f"a transcoder reads {where} and writes {target}; saelab eval and logits(replace=...) run it")
    return {where: dictionary}


def _bridge_hook(site: Site, visit: Any) -> Any:
    def hook(value: Tensor, hook: Any) -> Any:
        return visit(site, value)

    return hook
