r"""Tokens in colour as HTML. Tokens are data: everything in them is escaped, control characters are shown by name.

A character whose bytes lie across several tokens is shown whole in the token that holds its first byte; the tokens that
hold only its other bytes show those, small, as ``\x98``. The colour of a token is its value over a common maximum, one
hue whose strength alone varies, so it reads the same to colour-blind eyes and on light and dark pages.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from saelab.core.counts import HistogramResult
from saelab.features.query import Context, Interval
from saelab.features.render import visible
from saelab.features.vocabulary import Vocabulary

RAISES = (230, 140, 0)
"""Colour, in RGB, of a positive value as large as the maximum."""
LOWERS = (70, 130, 220)
"""Colour of a negative value as large as the maximum."""

CSS = """
.sl{font-family:"Source Code Pro",ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem;
 line-height:1.75}
.sl .c{display:flex;gap:.75rem;padding:.3rem 0;border-bottom:1px solid rgba(128,128,128,.18)}
.sl .n{flex:0 0 4.2rem;text-align:right;font-variant-numeric:tabular-nums;opacity:.75}
.sl .n small{display:block;opacity:.75;font-size:.68rem;line-height:1.1}
.sl .x{flex:1 1 auto;min-width:0;white-space:break-spaces;overflow-wrap:anywhere;unicode-bidi:isolate;direction:ltr}
.sl .t{position:relative;border-radius:3px;padding:.12em 0;unicode-bidi:isolate}
.sl .t.d{color:#111}
.sl .t.p{text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px;font-weight:700}
.sl .t i{font-style:normal;opacity:.45}
.sl .t i.b{font-size:.68em;opacity:.6}
.sl .t:hover{outline:1.5px solid currentColor;z-index:1}
.sl .t:hover::after{content:attr(data-tip);position:absolute;left:0;top:1.7em;z-index:1000;white-space:pre;
 background:#1d2330;color:#fff;font:400 .74rem/1.45 "Source Code Pro",ui-monospace,monospace;padding:.4rem .6rem;
 border-radius:5px;box-shadow:0 2px 10px rgba(0,0,0,.35);pointer-events:none}
.sl .w{display:flex;justify-content:space-between;gap:.5rem;border-radius:3px;padding:0 .35rem;margin:1px 0}
.sl .w span:first-child{white-space:pre;overflow:hidden;text-overflow:ellipsis;unicode-bidi:isolate;direction:ltr}
.sl .w span:last-child{font-variant-numeric:tabular-nums;opacity:.8}
.sl .h{font:600 .74rem/1.6 inherit;opacity:.7;padding:0 .35rem}
.sl .k{display:inline-flex;align-items:center;gap:.5rem;white-space:nowrap}
.sl .l{display:flex;flex-wrap:wrap;align-items:center;gap:0 .8rem;font-size:.74rem;opacity:.85;padding-bottom:.2rem}
.sl .l b{display:inline-block;width:9rem;height:.7rem;border-radius:3px;border:1px solid rgba(128,128,128,.35)}
.sl .g{display:flex;height:9rem;border-bottom:1px solid rgba(128,128,128,.5)}
.sl .g b{flex:1 1 0;position:relative;border-right:1px solid transparent;background-clip:padding-box}
.sl .g b:hover{outline:1px solid rgba(128,128,128,.7)}
.sl .g b:hover::after{content:attr(data-tip);position:absolute;left:0;top:.4rem;z-index:1000;white-space:pre;
 background:#1d2330;color:#fff;font:400 .74rem/1.45 "Source Code Pro",ui-monospace,monospace;padding:.4rem .6rem;
 border-radius:5px;pointer-events:none}
.sl .g b:nth-child(n+26):hover::after{left:auto;right:0}
.sl .a{display:flex;justify-content:space-between;font-size:.74rem;opacity:.8}
@media (max-width:640px){.sl .n{flex-basis:3rem}.sl{font-size:.76rem}}
"""
"""Style of everything made here; a page includes it once."""


class Shown(NamedTuple):
    """How one token is written."""

    text: str
    """Its characters, control characters by name."""
    rest: str
    r"""Bytes, as ``\x98``, that belong to a character begun in an earlier token, when that is all there is."""


def shown(pieces: Sequence[bytes]) -> list[Shown]:
    """Return how each of some consecutive tokens, given as bytes, is written."""
    result: list[Shown] = []
    k = 0
    while k < len(pieces):
        try:
            result.append(Shown(visible(pieces[k].decode()), ""))
            k += 1
        except UnicodeDecodeError:
            stop = k + 1
            while stop < len(pieces) and not _decodes(b"".join(pieces[k:stop])) and not _decodes(pieces[stop]):
                stop += 1
            result.extend(_divided(pieces[k:stop]))
            k = stop
    return result


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _divided(pieces: Sequence[bytes]) -> list[Shown]:
    """Give each character to the piece that holds its first byte."""
    data = b"".join(pieces)
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces]).tolist()
    texts, whole = [""] * len(pieces), [False] * len(pieces)
    at = 0
    while at < len(data):
        size = next((n for n in (1, 2, 3, 4) if _decodes(data[at : at + n]) and at + n <= len(data)), 0)
        text = visible(data[at : at + size].decode()) if size else f"\\x{data[at]:02x}"
        texts[owner[at]] += text
        for byte in range(at, at + max(size, 1)):
            whole[owner[byte]] = True
        at += max(size, 1)
    rests = [
        "" if text else "".join(f"\\x{byte:02x}" for byte in piece) for text, piece in zip(texts, pieces, strict=True)
    ]
    return [Shown(text, rest) for text, rest in zip(texts, rests, strict=True)]


def tokens_html(
    pieces: Sequence[bytes],
    values: np.ndarray,
    maximum: float,
    *,
    peak: int | None = None,
    hover: Sequence[str] | None = None,
) -> str:
    """Return tokens, given as bytes, as coloured spans.

    ``maximum`` is the (positive) value of the strongest colour; negative values have a colour of their own. ``hover``
    has a text for each token, shown beside its value; ``peak`` is underlined.
    """
    return "".join(
        _span(how, piece, float(value), maximum, peaked=k == peak, more="" if hover is None else hover[k])
        for k, (how, piece, value) in enumerate(zip(shown(pieces), pieces, np.asarray(values).tolist(), strict=True))
    )


def _span(how: Shown, piece: bytes, value: float, maximum: float, *, peaked: bool, more: str) -> str:
    strength = min(abs(value) / maximum, 1.0) if maximum > 0 and np.isfinite(value) else 0.0
    classes, style = "t", ""
    if strength > 0:
        red, green, blue = RAISES if value > 0 else LOWERS
        # Weak activations stay visible: the faintest has an opacity of 0.12.
        opacity = 0.12 + 0.83 * strength
        style = f' style="background:rgba({red},{green},{blue},{opacity:.2f})"'
        classes += " d" if opacity > 0.7 else ""
    classes += " p" if peaked else ""
    body = f'<i class="b">{escape(how.rest)}</i>' if how.rest else _marks(how.text)
    parts = [f"{value:.4g}"]
    if how.rest or not _decodes(piece):
        parts.append("bytes " + piece.hex(" "))
    if more:
        parts.append(more)
    tip = escape("\n".join(parts), quote=True).replace("\n", "&#10;")
    return f'<span class="{classes}"{style} data-tip="{tip}">{body}</span>'


def _marks(text: str) -> str:
    """Escape a text, its stand-ins for newline and tab dimmed."""
    body = escape(text, quote=True)
    return body.replace("⏎", "<i>⏎</i>").replace("→", "<i>→</i>") if ("⏎" in body or "→" in body) else body


def contexts_html(
    contexts: Sequence[Context],
    vocabulary: Vocabulary,
    maximum: float,
    effects: Sequence[np.ndarray] | None = None,
) -> str:
    """Return contexts as a list: the value at the peak, where it is, and the text in colour.

    With ``effects``, a signed number for each token of each context, the colours are theirs, on a scale from
    ``-maximum`` to ``maximum``, and pointing at a token also says its activation; nan has no colour.
    """
    rows = []
    for k, context in enumerate(contexts):
        pieces = [vocabulary.bytes_of(int(i)) for i in context.token_ids]
        hover = [f"row {context.row}, position {context.position - context.peak + j}" for j in range(len(pieces))]
        values = context.values
        if effects is not None:
            values = np.nan_to_num(effects[k])
            hover = [f"activation {value:.4g}\n{where}" for value, where in zip(context.values, hover, strict=True)]
        body = tokens_html(pieces, values, maximum, peak=context.peak, hover=hover)
        place = f"<small>{context.row}:{context.position}</small>"
        rows.append(f'<div class="c"><div class="n">{context.value:.3g}{place}</div><div class="x">{body}</div></div>')
    return f'<div class="sl">{"".join(rows)}</div>'


def weights_html(title: str, pieces: Sequence[bytes], values: np.ndarray, maximum: float) -> str:
    """Return tokens with a signed number each, the bar behind a token as long as the number is large."""
    lines = [f'<div class="h">{escape(title)}</div>']
    for piece, value in zip(pieces, np.asarray(values).tolist(), strict=True):
        ((text, rest),) = shown([piece])
        share = 100 * min(abs(value) / maximum, 1.0) if maximum > 0 else 0.0
        colour = f"rgba({','.join(map(str, RAISES if value > 0 else LOWERS))},.38)"
        bar = f"background:linear-gradient(90deg,{colour} {share:.0f}%,transparent {share:.0f}%)"
        token = f"“{escape(text or rest)}”"
        lines.append(f'<div class="w" style="{bar}"><span>{token}</span><span>{value:+.3f}</span></div>')
    return f'<div class="sl">{"".join(lines)}</div>'


def legend_html(maximum: float, label: str = "activation", *, signed: bool = False) -> str:
    """Return the colour scale with its ends named."""
    high, low = (f"rgba({','.join(map(str, colour))}" for colour in (RAISES, LOWERS))
    least, bar = "0", f"linear-gradient(90deg,{high},.12),{high},.95))"
    if signed:
        least, bar = (
            f"{-maximum:.3g}",
            f"linear-gradient(90deg,{low},.95),{low},.12),transparent,{high},.12),{high},.95))",
        )
    scale = f'<span class="k">{least} <b style="background:{bar}"></b> {maximum:.3g}</span>'
    return f'<div class="sl"><div class="l">{escape(label)} {scale}</div></div>'


def bars_html(result: HistogramResult, x_title: str, unit: str, *, logarithmic: bool = False) -> str:
    """Return a histogram as bars; pointing at one says its bounds and count. ``unit`` is what is counted."""
    counts = np.asarray(result.counts, np.float64)
    most = float(counts.max(initial=0.0))
    # On the logarithmic scale a count of 1 keeps a visible bar.
    heights = np.log2(counts + 1) / np.log2(most + 1) if logarithmic and most else counts / max(most, 1.0)
    colour = f"rgb({','.join(map(str, RAISES))})"
    bars = []
    for height, low, high, count in zip(heights, result.edges[:-1], result.edges[1:], counts, strict=True):
        share = 0.0 if not count else max(100 * float(height), 1.0)
        style = f"background-image:linear-gradient(0deg,{colour} {share:.1f}%,transparent {share:.1f}%)"
        tip = f"{low:.3g} to {high:.3g}&#10;{int(count):,} {escape(unit)}"
        bars.append(f'<b style="{style}" data-tip="{tip}"></b>')
    about = f"{escape(x_title)}, {'logarithmic' if logarithmic else 'linear'} counts, highest bar {int(most):,}"
    axis = f"<span>{result.edges[0]:.3g}</span><span>{escape(x_title)}</span><span>{result.edges[-1]:.3g}</span>"
    top = f'<div class="l">highest bar: {int(most):,} {escape(unit)}{", logarithmic" if logarithmic else ""}</div>'
    return (
        f'<div class="sl">{top}<div class="g" role="img" aria-label="{about}">{"".join(bars)}</div>'
        f'<div class="a">{axis}</div></div>'
    )


def interval_html(part: Interval, total: int) -> str:
    """Return the heading of a part of a feature's range; ``total`` counts all its activations."""
    return (
        f'<div class="sl"><div class="h"><b>{part.low:.3g} to {part.high:.3g}</b>: {part.count:,} activations, '
        f"{part.count / max(total, 1):.2%}</div></div>"
    )


def spread(values: np.ndarray, bins: int = 50) -> HistogramResult:
    """Return the histogram of some numbers between the least and the largest of them."""
    counts, edges = np.histogram(np.asarray(values, np.float64), bins)
    return HistogramResult(edges.astype(np.float64), counts.astype(np.int64), 0, 0)
