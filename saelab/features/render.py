"""Contexts in colour for the terminal. Tokens are data: nothing in them is taken as markup or as a control sequence."""

import dataclasses
import unicodedata
from typing import TYPE_CHECKING

from saelab.features.query import Context

if TYPE_CHECKING:
    from rich.text import Text

STRONGEST = (214, 120, 0)
"""Background, in RGB, of a token as active as the scale's maximum."""
WEAKEST = (255, 244, 224)
"""Background of a token that is barely active."""


def visible(token: str) -> str:
    r"""Show a token on one line: newlines as ``⏎``, tabs as ``→``, other control and format characters as ``\x1b``."""
    return "".join(_visible(character) for character in token)


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "→"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character


def render_context(context: Context, maximum: float | None = None) -> "Text":
    """Return a context as one line of styled text: the stronger the activation, the stronger the background.

    ``maximum`` is the value of the strongest colour (by default the context's own strongest, give the feature's to
    compare contexts). The peak is underlined.
    """
    from rich.style import Style
    from rich.text import Text

    scale = maximum if maximum else float(context.values.max(initial=0.0))
    line = Text(no_wrap=True, overflow="ellipsis", end="")
    for k, (token, value) in enumerate(zip(context.tokens, context.values.tolist(), strict=True)):
        style = Style()
        if value > 0 and scale > 0:
            strength = min(value / scale, 1.0)
            red, green, blue = (round(w + (s - w) * strength) for w, s in zip(WEAKEST, STRONGEST, strict=True))
            style = Style(color="black", bgcolor=f"rgb({red},{green},{blue})")
        if k == context.peak:
            style += Style(bold=True, underline=True)
        line.append(visible(token), style)
    return line


def fit_context(context: Context, width: int) -> Context:
    """Return the stretch of a context around its peak that fits ``width`` columns, two thirds of it before the peak.

    The peak's token is always kept, whole tokens are left out at both ends.
    """
    from rich.cells import cell_len

    widths = [cell_len(visible(token)) for token in context.tokens]
    start = stop = context.peak
    room = max(width - widths[context.peak], 0)
    before = room * 2 // 3
    while start > 0 and widths[start - 1] <= before:
        start -= 1
        before -= widths[start]
        room -= widths[start]
    while stop + 1 < len(widths) and widths[stop + 1] <= room:
        stop += 1
        room -= widths[stop]
    return dataclasses.replace(
        context,
        tokens=context.tokens[start : stop + 1],
        token_ids=context.token_ids[start : stop + 1],
        values=context.values[start : stop + 1],
        peak=context.peak - start,
        start=context.start + start,
        text="".join(context.tokens[start : stop + 1]),
    )
