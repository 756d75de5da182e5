"""``AttentionExplanation``: why a feature of an attention SAE fires at one token of a prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class AttentionExplanation(Result):
    """One feature at one token: which heads make it, from which tokens, and the tree below."""

    feature: int
    """Number of the feature."""
    site: str
    """Site of the SAE, ``blocks.N.attn.hook_z``."""
    tokens: tuple[str, ...]
    """The prompt's tokens as text."""
    position: int
    """The token that is explained."""
    pre_activation: float
    """The feature's pre-activation there, in scaled units: the sum of all terms and a constant."""
    heads: tuple[dict[str, Any], ...]
    """Per head: ``head``, ``weights`` (share of what the feature writes) and ``activation`` (its term here)."""
    sources: tuple[dict[str, Any], ...]
    """Largest terms by head and source position: ``head``, ``source``, ``token``, ``term``."""
    tree: dict[str, Any]
    """What fed the feature, and what fed that, as nested mappings."""
    tree_lines: tuple[str, ...]
    """The same as lines of text."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per head and source position, the largest terms first."""
        import pandas as pd

        return pd.DataFrame(list(self.sources))

    def head_frame(self) -> "pd.DataFrame":
        """One row per head."""
        import pandas as pd

        return pd.DataFrame(list(self.heads))

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Each head's term in the pre-activation."""
        from plotly import graph_objects as go

        from saelab.core.plotting import BLUE, figure

        frame = self.head_frame()
        bar = go.Bar(x=frame["head"], y=frame["activation"], marker={"color": BLUE})
        axes = {
            "xaxis": {"title": "head (layer.head)", "type": "category"},
            "yaxis": {"title": "term of the pre-activation"},
        }
        return {"heads": (figure(bar, **axes), frame)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the lines of text."""
        lists = {"tokens": list(self.tokens), "heads": list(self.heads), "sources": list(self.sources)}
        return {**{k: v for k, v in vars(self).items() if k != "tree_lines"}, **lists}

    def __repr__(self) -> str:
        token = self.tokens[self.position]
        return (
            f"AttentionExplanation(feature {self.feature} at {self.site} on {token!r} ({self.position}): "
            f"pre-activation {self.pre_activation:.4g})"
        )
