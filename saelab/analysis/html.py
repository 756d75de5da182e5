"""Reports as one HTML file: Plotly and style are in the page, nothing is fetched."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2.4rem} p{max-width:48rem} small{opacity:.75}
table{border-collapse:collapse;font-size:.82rem;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid #8884;text-align:left;vertical-align:top} th{white-space:nowrap}
.yes{color:#0a8f66;font-weight:600}.no{color:#c65a10;font-weight:600}
.note{border-left:3px solid #e69f00;padding-left:.7rem}
.main-svg text{fill:currentColor!important}
"""


def page(title: str, body: str) -> str:
    """Return a whole page; ``body`` is HTML, figures made with ``to_html(include_plotlyjs=False)`` work in it."""
    from plotly.offline import get_plotlyjs

    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def table(frame: "pd.DataFrame") -> str:
    """Return a frame as an HTML table, numbers with four digits, columns of lists left out."""
    columns = [c for c in frame.columns if not frame[c].map(lambda v: isinstance(v, list | dict)).any()]
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    rows = [
        "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>"
        for row in frame[columns].itertuples(index=False)
    ]
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
