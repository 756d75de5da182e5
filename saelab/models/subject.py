"""The subject model: read the activation at a site, or replace it by a function of itself, in a running model."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.core.errors import ModelError
from saelab.core.named import opened
from saelab.models.loading import Loaded, boot_bridge, load_plain, load_tokenizer
from saelab.models.sites import Replacement, Site, SiteTable, call, capture, hooked, survey
from saelab.models.splice import Codec, Spliced, splice


def load_model(
    name: "str | SubjectModel", dtype: str = "float32", device: str = "cpu", revision: str | None = None
) -> "SubjectModel":
    """Load the model under study.

    ``name`` is ``"embedded"``, a local Hugging Face folder, or a hub id (of which ``revision`` chooses a branch, tag or
    commit). ``dtype``, ``"float32"`` or ``"bfloat16"``, is the dtype of the weights, and so of the activations. A
    model that is loaded already is returned as it is.

    Raises :class:`ModelError` (unknown model, missing files, unsupported architecture) or :class:`FormatError` (the
    weights are a pickle). A missing tokenizer is an error only when it is asked for.
    """
    thing = opened(name)
    if isinstance(thing, SubjectModel):
        return thing
    loaded = load_plain(str(name), dtype, device, revision)
    try:
        tokenizer, problem = load_tokenizer(loaded, revision), None
    except ModelError as error:
        tokenizer, problem = None, error
    bridge, paths = boot_bridge(loaded, tokenizer, dtype)
    model = SubjectModel(str(name), loaded, bridge, paths, tokenizer=tokenizer, tokenizer_problem=problem)
    model.revision = revision
    return model


class SubjectModel:
    """A causal language model whose activations can be read and replaced by site name.

    ``bridge`` is the ``TransformerBridge`` (compatibility mode off, so activations are the Hugging Face model's own);
    ``plain`` is the Hugging Face model it shares its weights with, which does the work wherever a site is the input or
    output of one of its modules. Made by :func:`load_model`.
    """

    def __init__(
        self,
        name: str,
        loaded: Loaded,
        bridge: Any,
        paths: Mapping[int, str],
        *,
        tokenizer: Any,
        tokenizer_problem: ModelError | None,
    ) -> None:
        self.name = name
        """What :func:`load_model` was given."""
        self.revision: str | None = None
        """Revision that was asked for, of a hub id."""
        self.fingerprint = loaded.fingerprint
        """Identifies config and weights, wherever the files lie."""
        self.folder = loaded.folder
        """Folder of the model's files (the hub cache's for a hub id), if there is one."""
        self.bridge = bridge
        self.plain: nn.Module = loaded.plain
        self._paths = dict(paths)
        self._tokenizer = tokenizer
        self._tokenizer_problem = tokenizer_problem
        self.n_ctx = int(bridge.cfg.n_ctx)
        self.n_layers = int(bridge.cfg.n_layers)
        self.d_model = int(bridge.cfg.d_model)
        self.d_vocab = int(bridge.cfg.d_vocab)
        self._table: SiteTable | None = None
        self._bridge_only = 0

    def __repr__(self) -> str:
        return (
            f"SubjectModel({self.name!r}: {self.n_layers} layers, d_model {self.d_model}, context {self.n_ctx}, "
            f"vocabulary {self.d_vocab:,}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as Hugging Face loads it; :class:`ModelError` when the model has none."""
        if self._tokenizer_problem is not None:
            raise ModelError(str(self._tokenizer_problem))
        return self._tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return next(self.plain.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.plain.parameters()).device

    def sites(self) -> list[str]:
        """Return the canonical site names, in the order of the forward pass.

        :meth:`read` and the others also accept the bridge's own names (``blocks.3.mlp.out.hook_in``).
        """
        return self._sites().names()

    def site(self, name: str) -> Site:
        """Return what is known about a site; :class:`SiteError` with near matches for an unknown name."""
        return self._sites()[name]

    def width(self, site: str) -> int:
        """Length of the vector at ``site`` (n_heads * d_head at ``hook_z``)."""
        return self.site(site).width

    def layer(self, site: str) -> int:
        """Block that ``site`` is in; -1 before the first block, ``n_layers`` after the last."""
        return self.site(site).layer

    def head_slices(self, site: str) -> list[slice]:
        """Return which part of the flattened vector belongs to each head; one slice for a site without heads."""
        found = self.site(site)
        size = found.width // (found.n_heads or 1)
        return [slice(h * size, (h + 1) * size) for h in range(found.n_heads or 1)]

    def read(self, tokens: Int[Tensor, "b t"], sites: str | Sequence[str]) -> dict[str, Float[Tensor, "b t d"]]:
        """Return the activation at each site for each token, in the model's dtype.

        Only the layers up to the last site run. No gradients. Heads are flattened.
        """
        wanted = self._lookup(sites)
        tokens = self._check(tokens)
        with torch.no_grad():
            if self._bridge_only or any(site.address is None for site in wanted):
                return self._read_through_bridge(tokens, wanted)
            with capture(self.plain, wanted) as (seen, run):
                run(tokens)
        assert len(seen) == len(wanted), "a surveyed site did not come by"
        return {site.name: seen[site.name] for site in wanted}

    def logits(
        self, tokens: Int[Tensor, "b t"], replace: Mapping[str, Replacement] | None = None, grad: bool = False
    ) -> Float[Tensor, "b t vocab"]:
        """Return next-token logits, with the activation at some sites replaced by a function of itself.

        Each function gets (B, T, d) in the model's dtype and returns (B, T, d); everything after the site follows
        from what it returned. With ``grad`` the result can be differentiated with respect to what the functions bring
        in (the model's own weights need no gradient).
        """
        replace = replace or {}
        wanted = self._lookup(list(replace)) if replace else []
        tokens = self._check(tokens)

        def visit(site: Site, value: Tensor) -> Tensor:
            new = replace[site.name](site.flat(value, tokens.shape[0]))
            return site.shaped(new.to(value.dtype), value)

        with torch.set_grad_enabled(grad):
            if not self._bridge_only and all(site.address is not None for site in wanted):
                with hooked(self.plain, wanted, visit):
                    return call(self.plain, tokens)
            hooks = [(site.name, _bridge_hook(site, visit)) for site in wanted]
            with warnings.catch_warnings():
                # The bridge says that editing a normalised value changes the rounding; that is what was asked for.
                warnings.filterwarnings("ignore", message="A forward hook edited")
                return cast(Tensor, self.bridge.run_with_hooks(tokens, fwd_hooks=hooks))

    def losses_after(self, head: Int[Tensor, " h"], tails: Int[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        """Return the loss (nats) of each token of n texts, every text read after the same head of one token or more.

        The head runs once: the texts share its keys and values. A model that keeps none reads it before each text.
        """
        head, tails = self._check(head[None]), self._check(tails)
        if head.shape[1] + tails.shape[1] > self.n_ctx:
            raise ModelError(
                f"a head of {head.shape[1]} tokens and texts of {tails.shape[1]} do not fit the context of "
                f"{self.name}, which is {self.n_ctx}; cut the texts"
            )
        with torch.no_grad():
            first = self.plain(head, use_cache=True)
            cache: Any = getattr(first, "past_key_values", None)
            if hasattr(cache, "batch_repeat_interleave"):
                logits = first.logits[:, -1:].expand(len(tails), -1, -1)
                if tails.shape[1] > 1:
                    cache.batch_repeat_interleave(len(tails))
                    rest = self.plain(tails[:, :-1], past_key_values=cache, use_cache=True).logits
                    logits = torch.cat([logits, rest], 1)
            else:
                logits = call(self.plain, torch.cat([head.expand(len(tails), -1), tails], 1))[:, head.shape[1] - 1 : -1]
            return nn.functional.cross_entropy(logits.float().transpose(1, 2), tails, reduction="none")

    def splice(
        self,
        dictionary: Codec | Mapping[str, Codec],
        site: str | None = None,
        *,
        keep_error: bool = False,
    ) -> AbstractContextManager[Spliced]:
        """Replace the activation at ``site`` by ``decode(encode(x))`` for the length of a ``with`` block.

        Whatever runs the model inside sees the splice: :meth:`logits` (also with ``grad=True``), :meth:`read`, the
        bridge's ``forward``, ``run_with_cache`` and ``generate``, and ``plain.generate``. ``dictionary`` is an SAE
        whose own ``site`` is used when none is given, or a mapping of sites to SAEs. With ``keep_error`` what the SAE
        misses is added back as a constant: values stay what they were, gradients go through the SAE. The object that
        the block gets holds code, activation and reconstruction of the last run, by site.

        Raises :class:`SiteError` when it is not known where the SAE belongs.
        """
        return splice(self, dictionary, site, keep_error=keep_error)

    @contextmanager
    def through_bridge(self) -> Iterator[None]:
        """Let :meth:`read` and :meth:`logits` run the bridge and not the plain model, where its hooks are."""
        self._bridge_only += 1
        try:
            yield
        finally:
            self._bridge_only -= 1

    def read_with_gradient(
        self, tokens: Int[Tensor, "b t"], keep: Bool[Tensor, "b t"], sites: Sequence[str]
    ) -> tuple[dict[str, Float[Tensor, "b t d"]], dict[str, Float[Tensor, "b t d"]]]:
        """Return the activations, and the gradient of the summed next-token cross-entropy with respect to them.

        The loss is the plain sum of -log p(token t+1 | tokens up to t) over every kept token t+1, so a gradient does
        not shrink with batch or context size; the gradient at position t holds the effect on all later losses.
        Gradients are float32.
        """
        held: dict[str, Tensor] = {}

        def hold(name: str) -> Replacement:
            def visit(x: Tensor) -> Tensor:
                # The first site is the root of the graph; later ones depend on it and keep their place in it.
                held[name] = x if x.requires_grad else x.detach().requires_grad_()
                return held[name]

            return visit

        logits = self.logits(tokens, {name: hold(name) for name in sites}, grad=True)
        targets = tokens[:, 1:].to(logits.device)
        losses = nn.functional.cross_entropy(
            rearrange(logits[:, :-1].float(), "b t v -> (b t) v"), rearrange(targets, "b t -> (b t)"), reduction="none"
        )
        loss = losses[rearrange(keep[:, 1:], "b t -> (b t)").to(losses.device)].sum()
        found = torch.autograd.grad(loss, [held[name] for name in sites])
        gradients = {name: gradient.float() for name, gradient in zip(sites, found, strict=True)}
        return {name: held[name].detach() for name in sites}, gradients

    def _read_through_bridge(self, tokens: Tensor, wanted: Sequence[Site]) -> dict[str, Tensor]:
        names = [site.name for site in wanted]
        stop = max(site.layer for site in wanted) + 1
        _, cache = self.bridge.run_with_cache(
            tokens, names_filter=names, stop_at_layer=stop if stop <= self.n_layers else None
        )
        return {site.name: site.flat(cache[site.name], tokens.shape[0]) for site in wanted}

    def _lookup(self, sites: str | Sequence[str]) -> list[Site]:
        names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
        return [self.site(name) for name in names]

    def _sites(self) -> SiteTable:
        if self._table is None:
            self._table = survey(self.bridge, self.plain, self._paths)
        return self._table

    def _check(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.n_ctx:
            raise ModelError(
                f"{tokens.shape[1]} tokens do not fit the context of {self.name}, which is {self.n_ctx}; cut the text"
            )
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= self.d_vocab:
            raise ModelError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.name} (0 to "
                f"{self.d_vocab - 1}); was the text tokenised for another model?"
            )
        return tokens.to(self.device)


def _bridge_hook(site: Site, visit: Any) -> Any:
    def hook(value: Tensor, hook: Any) -> Tensor:
        return cast(Tensor, visit(site, value))

    return hook
