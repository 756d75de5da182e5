"""The activation-sparsity report: one HTML file, Plotly inside, nothing fetched."""

from html import escape
from typing import TYPE_CHECKING

from saelab.analysis.html import page, table

if TYPE_CHECKING:
    from saelab.analysis.lazy_neurons import LazyNeurons

TITLES = {
    "layers": ("How many neurons are active", "Three ways to count, averaged over tokens."),
    "energy": ("Where the energy is", "Share of the squared norm held by each token's strongest units."),
    "rates": ("How often each unit is active", "Share of tokens on which each unit is over the threshold."),
    "curve": ("Only the strongest neurons", "Loss with the strongest (or random) neurons of each token, all layers."),
    "comparison": (
        "Neurons against the SAE at equal L0",
        "Loss with the block's neurons cut to the strongest k of each token, and with the SAE in its place.",
    ),
}


def report_html(result: "LazyNeurons") -> str:
    """Return the report as one HTML page."""
    from saelab.analysis.lazy_figures import figures

    body = [
        f"<p>{escape(result.model)} on {escape(result.source)}, {result.n_tokens:,} tokens. {result.positive:.1%} of "
        f"the neurons are positive on a token, {result.above:.1%} over {result.epsilon:g} of their layer's root mean "
        "square.</p>",
        table(result.to_frame()),
    ]
    c = result.comparison
    if c is not None:
        same = "The FVUs are of the same vector." if c.same_object else "The FVUs are of different makers of the site."
        body.append(
            f"<p>{escape(c.sae)} at {escape(c.site)}: L0 {c.l0:.1f}, cross-entropy {c.ce_sae:.3f} (clean "
            f"{c.ce_clean:.3f}); {c.points[0].k} neurons of {escape(c.neurons)}: {c.points[0].ce:.3f}. {same}</p>"
        )
    for name, (figure, _) in figures(result).items():
        title, text = TITLES[name]
        body.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>")
        body.append(figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=f"f-{name}"))
    return page(f"Activation sparsity of {result.model}", "".join(body))
