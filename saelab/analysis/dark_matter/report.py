"""The report: one HTML file with every figure, table and finding. Plotly is in the file; nothing is fetched."""

from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from saelab.analysis.dark_matter.figures import figures
from saelab.analysis.html import page, table

if TYPE_CHECKING:
    from saelab.analysis.dark_matter.result import DarkMatter

SECTIONS: dict[str, tuple[str, str]] = {
    "fvu": (
        "Linear and nonlinear error",
        "FVU of each SAE, split by adding the linear part of its error back: what remains is nonlinear. The bar on top "
        "is the 95 % interval over contexts.",
    ),
    "vector": (
        "How much of the error vector is linear",
        "R2 on test contexts. Dimensions of little variance weigh as much as others in the mean over dimensions (the "
        "paper's number). An error that is only shrinkage has R2 1 before, and none after rescaling.",
    ),
    "norms": (
        "How predictable norms are",
        "R2 of squared norms regressed on the activation, every SAE a point.",
    ),
    "baselines": (
        "What predicts the size of the error",
        "R2 of ||e||^2 from the whole activation and from single numbers. A high R2 that ||x|| alone gives too says "
        "that big activations have big errors, no more.",
    ),
    "scaling": (
        "Scaling with width",
        "Fit of c + a width^-b to the FVU; the band is the 95 % profile interval of the floor c. Points are single "
        "SAEs, so the interval knows nothing of seeds.",
    ),
    "token_scaling": (
        "Do larger SAEs fail on the same tokens?",
        "R2 of the error norm of one SAE predicted from another's on the same token.",
    ),
    "tokens": ("Error norms, token by token", "Test tokens, smallest SAE against largest."),
    "introduced": (
        "Synthetic errors of known size",
        "From the SAE's own codes: some features left out, dense noise in the activation, noise in the reconstruction. "
        "A split that finds the truth lies on the line.",
    ),
    "downstream": (
        "What each part costs the model",
        "Cross-entropy above the untouched model's with the site replaced. Grey: random directions of the same norm.",
    ),
    "pursuit": (
        "Better codes for the same dictionary",
        "The SAE's encoder, gradient pursuit and orthogonal matching pursuit at the encoder's own L0, token by token; "
        "random: gradient pursuit with random directions instead of the decoder's. Speeds were taken in turns on the "
        "machine that made this report.",
    ),
    "earlier": (
        "Error from earlier sites",
        "R2 of each part of the error regressed on what SAEs at other sites reconstruct.",
    ),
    "error_saes": (
        "SAEs trained on the error",
        "FVU of equal SAEs trained on each part; grey: trained on Gaussian noise of that part's covariance.",
    ),
}
TRUE = ("absent", "introduced")
TABLES = ("token_scaling", "pursuit", "earlier", "error_saes", "downstream")


def report_html(result: "DarkMatter") -> str:
    """Return the report as one HTML page."""
    d = result.decomposition
    head = (
        f"<p>{escape(result.site)} of {escape(result.model)} on "
        f"{escape(result.text)}; {d.n_fit:,} tokens of {d.contexts_fit:,} contexts fitted, {d.n_test:,} of "
        f"{d.contexts_test:,} others tested. e = x - x_hat, l its linear part, eta = e - l.</p>"
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in result.notes)
    flagged = [x.name for x in result.decompositions if x.shrinkage.flagged]
    if flagged:
        notes += (
            f'<p class="note">Shrinkage: the linear error of {escape(", ".join(flagged))} may be a reconstruction of '
            "the wrong size, not absent features; see the R2 after rescaling.</p>"
        )
    body = [head, notes, "<h2>Findings</h2>", _findings(result)]
    tables = result.frames()
    for name, (figure, _) in figures(result).items():
        title, text = SECTIONS[name]
        body.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>")
        body.append(figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=f"f-{name}"))
        if name == "introduced" and result.introduced is not None:
            together = pd.DataFrame(result.introduced.correlation).T.reset_index(names="correlation of estimated")
            body.append(table(together.rename(columns=lambda c: f"with true {c}" if c in TRUE else c)))
        if name in TABLES:
            body.append(table(tables[name]))
    body.append("<h2>Every SAE</h2>" + table(result.to_frame().set_index("name").T.reset_index(names="")))
    return page(f"Dark matter of {result.main}", "".join(body))


def _findings(result: "DarkMatter") -> str:
    rows = []
    for f in result.findings():
        verdict = "holds" if f.holds else "does not hold"
        style = "yes" if f.holds else "no"
        rows.append(
            f'<tr><td>{escape(f.claim)}</td><td class="{style}">{verdict}</td><td>{escape(f.measured)}</td>'
            f"<td>{escape(f.control)}</td><td><small>{escape(f.rule)}</small></td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("claim", "here", "measured", "controls", "holds when"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
