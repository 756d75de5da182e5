"""The error of an SAE on a prompt, token by token, split by a linear map that was fitted on a store."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from saelab.analysis.dark_matter.decompose import reconstruct
from saelab.analysis.dark_matter.losses import losses
from saelab.analysis.prompt import kept, tokenise
from saelab.core.errors import ActivationError
from saelab.core.regression import LinearMap
from saelab.core.result import Result
from saelab.features.protocols import Dictionary, Model
from saelab.features.rows import read_site, require_fit

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class PromptError(Result):
    """Error norms at each token of a prompt; nan at BOS and other special tokens, which are not encoded."""

    token_id: Int64[np.ndarray, " t"]
    """Token ids, BOS first where the model has one."""
    texts: list[str]
    """What each token stands for."""
    keep: Bool[np.ndarray, " t"]
    """False at special tokens."""
    total: Float32[np.ndarray, " t"]
    """``||e||^2``."""
    linear: Float32[np.ndarray, " t"]
    """``||l||^2``."""
    nonlinear: Float32[np.ndarray, " t"]
    """``||eta||^2``."""
    x: Float32[np.ndarray, " t"]
    """``||x||^2``."""
    loss: Float32[np.ndarray, " t"]
    """``-log p(token | tokens before)`` in nats; nan at position 0."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per token."""
        import pandas as pd

        columns = ("token_id", "keep", "total", "linear", "nonlinear", "x", "loss")
        return pd.DataFrame({"text": self.texts, **{name: getattr(self, name) for name in columns}})

    def __repr__(self) -> str:
        total, size = (float(np.nansum(v[self.keep])) for v in (self.total, self.x))
        return f"PromptError({len(self.texts)} tokens: {total / max(size, 1e-30):.1%} of the squared norm unexplained)"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Share of each token's squared norm in the linear and in the nonlinear part of the error."""
        from plotly import graph_objects as go

        from saelab.core.plotting import SKY, VERMILLION, escape, figure

        frame, places = self.to_frame(), list(range(len(self.texts)))
        bars = [
            go.Bar(x=places, y=frame[name] / frame["x"], name=name, marker={"color": colour})
            for name, colour in (("nonlinear", VERMILLION), ("linear", SKY))
        ]
        labels = {"tickmode": "array", "tickvals": places, "ticktext": [escape(repr(text)) for text in self.texts]}
        axes = {"xaxis": {"title": "token", **labels}, "yaxis": {"title": "share of ||x||²", "tickformat": ".0%"}}
        return {"error": (figure(*bars, barmode="group", **axes), frame)}


@torch.no_grad()
def error_of_prompt(
    model: Model, sae: Dictionary, text: str, *, site: str, linear: LinearMap, bos: bool = True
) -> PromptError:
    """Run a prompt through model and SAE and split the error at each token.

    ``linear`` is the SAE's map of a dark-matter result: ``load_dark_matter(folder).maps[name]``. Raises
    :class:`TextError` for an empty or too long prompt, :class:`ActivationError` when map, SAE and site do not fit.
    """
    width = require_fit(model, sae, site)
    if linear.weight.shape[0] != width:
        raise ActivationError(
            f"the linear map is for activations of width {linear.weight.shape[0]}, but {site} has width {width}; take "
            "the map of a dark-matter result of this SAE"
        )
    ids = tokenise(model, text, bos)
    keep = kept(model, ids)
    x = read_site(model, ids[None], site)[0].float().cpu()
    e = x[keep] - reconstruct(sae, x[keep], site)
    along = linear(x[keep])

    def spread(values: torch.Tensor) -> np.ndarray:
        result = np.full(len(ids), np.nan, np.float32)
        result[keep.numpy()] = values.square().sum(1).numpy()
        return result

    tokenizer = getattr(model, "tokenizer", None)
    texts = [tokenizer.decode([i]) if tokenizer is not None else f"<{i}>" for i in ids.tolist()]
    return PromptError(
        token_id=ids.numpy(),
        texts=texts,
        keep=keep.numpy(),
        total=spread(e),
        linear=spread(along),
        nonlinear=spread(e - along),
        x=spread(x[keep]),
        loss=losses(model.logits(ids[None]), ids[None])[0].numpy(),
    )
