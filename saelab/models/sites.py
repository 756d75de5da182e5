"""Sites: where in a model an activation is read or replaced, by TransformerLens name.

``TransformerBridge`` supplies the names. Most of them are the input or the output of one module of the plain Hugging
Face model, so saelab hooks that module directly: the plain model runs its fused attention and none of the bridge's
per-hook Python (2-3 times faster on a small Llama at context 128). :func:`survey` runs the bridge and the plain model
once on a few tokens, and a site is read from the plain model only where both gave the same values; every other site
(the per-head queries of GPT-2's joint projection, the normalised value inside a LayerNorm) is read through the bridge.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.core.errors import SiteError, nearest

Replacement = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
"""What :meth:`saelab.models.subject.SubjectModel.logits` puts in the place of an activation."""

_BLOCK_SITES = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
_NOT_ACTIVATIONS = re.compile(r"hook_(pattern|attn_scores|scale|cos|sin|unembed)$|^unembed\.hook_out$|rotary_emb")
_PROBE_BATCH, _PROBE_LENGTH = 2, 7


@dataclass(frozen=True)
class Address:
    """One end of a module of the plain Hugging Face model."""

    module: str
    """Dotted path of the module (``transformer.h.3.mlp``)."""
    end: Literal["in", "out"]
    """Its first input or its (first) output."""


@dataclass(frozen=True)
class Site:
    """A place in a model that holds one vector per token."""

    name: str
    """The TransformerLens name, or the bridge's own (``blocks.3.mlp.out.hook_in``)."""
    layer: int
    """Number of the block; -1 before the first block, the number of blocks after the last."""
    width: int
    """Length of the vector (attention heads flattened: n_heads * d_head)."""
    n_heads: int | None
    """Number of heads that are flattened into the vector, or None."""
    address: Address | None
    """Where the plain model has it; None when only the bridge computes it."""

    def flat(self, value: Tensor, batch: int) -> Float[Tensor, "b t d"]:
        """Turn what the hook saw into (B, T, d): heads flattened, a shared position axis expanded."""
        value = value.flatten(2) if value.dim() == 4 else value
        return value.expand(batch, -1, -1) if value.shape[0] != batch else value

    def shaped(self, value: Float[Tensor, "b t d"], like: Tensor) -> Tensor:
        """Undo :meth:`flat`: give ``value`` the head axis that ``like`` has."""
        return value.reshape(like.shape) if like.dim() == 4 else value


class SiteTable:
    """The sites of one model, by name."""

    def __init__(self, sites: Mapping[str, Site], n_layers: int) -> None:
        self._sites = dict(sites)
        self._n_layers = n_layers

    def names(self) -> list[str]:
        """Return the canonical TransformerLens names that this model answers to, in the order of the forward pass."""
        names = ["hook_embed", "hook_pos_embed"]
        names += [f"blocks.{layer}.{suffix}" for layer in range(self._n_layers) for suffix in _BLOCK_SITES]
        names += ["ln_final.hook_normalized", "ln_final.hook_out"]
        return [name for name in names if name in self._sites]

    def __getitem__(self, name: str) -> Site:
        if name not in self._sites:
            raise SiteError(
                f"the model has no site '{name}'{nearest(name, self._sites)} (`model.sites()` lists them, "
                f"for example blocks.{self._n_layers // 2}.hook_resid_post)"
            )
        return self._sites[name]


def addresses(bridge: Any, paths: Mapping[int, str]) -> dict[str, Address | None]:
    """Map each hook name of ``bridge`` to the end of the plain module it stands for, or None.

    ``paths`` gives the dotted path of each module the bridge was built around, by ``id``.
    """
    found: dict[str, Address | None] = {}
    for name, hook in bridge.hook_dict.items():
        own_name = hook.name or ""
        owner, _, end = own_name.rpartition(".")
        component: Any = bridge
        for part in owner.split("."):
            component = getattr(component, part, None)
        original = getattr(component, "original_component", None) if component is not None else None
        path = paths.get(id(original)) if original is not None else None
        found[name] = Address(path, "in" if end == "hook_in" else "out") if path and end in _ENDS else None
    return found


_ENDS = ("hook_in", "hook_out")


def survey(bridge: Any, plain: nn.Module, paths: Mapping[int, str]) -> SiteTable:
    """Run both models on a few tokens and tabulate the sites: widths, heads, and which plain module agrees."""
    n_layers, n_ctx, vocab = int(bridge.cfg.n_layers), int(bridge.cfg.n_ctx), int(bridge.cfg.d_vocab)
    length = min(_PROBE_LENGTH, n_ctx)
    device = next(plain.parameters()).device
    tokens = torch.arange(_PROBE_BATCH * length, device=device).remainder(vocab).view(_PROBE_BATCH, length)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    where = addresses(bridge, paths)
    sites: dict[str, Site] = {}
    for name, address in where.items():
        value = cache.cache_dict.get(name)
        if value is None or _NOT_ACTIVATIONS.search(name) or not _per_token(value, length):
            continue
        heads = value.shape[2] if value.dim() == 4 else None
        sites[name] = Site(name, _layer(name, n_layers), value.shape[2:].numel(), heads, address)
    addressed = [site for site in sites.values() if site.address is not None]
    with torch.no_grad(), capture(plain, addressed) as (seen, run):
        run(tokens)
    for site in addressed:
        value = seen.get(site.name)
        expected = site.flat(cache[site.name], _PROBE_BATCH)
        if value is None or not _agrees(value, expected):
            sites[site.name] = Site(site.name, site.layer, site.width, site.n_heads, None)
    return SiteTable(sites, n_layers)


Run = Callable[[Int[Tensor, "b t"]], Tensor | None]


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[dict[str, Tensor], Run]]:
    """Yield ``(seen, run)``: ``run(tokens)`` runs ``model`` up to the last of ``sites`` and no further.

    The forward pass is left by an exception as soon as every site has been seen, so that neither the blocks above nor
    the unembedding are computed. ``seen[name]`` is then (B, T, d). Sites without an address are not allowed here.
    ``run`` returns None when it stopped early, else the logits (some site never came by).
    """
    seen: dict[str, Tensor] = {}
    batch = [0]

    def keep(site: Site, value: Tensor) -> None:
        seen[site.name] = site.flat(value, batch[0])
        if len(seen) == len(sites):
            raise _Done

    def run(tokens: Int[Tensor, "b t"]) -> Tensor | None:
        seen.clear()
        batch[0] = tokens.shape[0]
        try:
            return call(model, tokens)
        except _Done:
            return None

    with hooked(model, sites, keep):
        yield seen, run


class _Done(Exception):
    """Leaves the forward pass once every wanted site has been seen."""


@contextmanager
def hooked(model: nn.Module, sites: Sequence[Site], visit: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``visit(site, value)`` when the forward pass comes by; a tensor it returns takes the value's place."""
    handles = []
    try:
        for site in sites:
            assert site.address is not None, f"{site.name} has no place in the plain model"
            module = model.get_submodule(site.address.module)
            if site.address.end == "in":
                handles.append(module.register_forward_pre_hook(_on_input(site, visit), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_on_output(site, visit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def call(model: nn.Module, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t vocab"]:
    """Logits of a plain Hugging Face causal LM, without a key-value cache."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def _on_input(site: Site, visit: Callable[[Site, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = visit(site, args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = visit(site, kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    return hook


def _on_output(site: Site, visit: Callable[[Site, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = visit(site, first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _per_token(value: Any, length: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (3, 4):
        return False
    return value.shape[0] == _PROBE_BATCH and value.shape[1] == length


def _agrees(value: Tensor, expected: Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    tolerance = 1e-3 if value.dtype == torch.float32 else 5e-2
    difference = (value.double() - expected.double()).abs().max()
    return bool(difference <= tolerance * expected.double().abs().max())


def _layer(name: str, n_layers: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1])
    return n_layers if name.startswith(("ln_final", "unembed")) else -1
