"""Reading a judge's reply. Anything but the form asked for is None, and the caller counts it as a failure.

The reply as a whole must be the answer: a list found somewhere in it (the first bracket, say) could be an example, a
quotation of the text that was judged, or an instruction hidden in that text.
"""

import json
import math
import re

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```[a-z]*\n(.*)\n```\Z", re.DOTALL)
_LABELS = re.compile(r"\A\[\s*[01](?:\s*,\s*[01])*\s*\]\Z")
_INDEX = re.compile(r"\A(?:\[RESPONSE\]:\s*)?(\d+)\Z")
EXPLANATION = "[EXPLANATION]:"
"""What stands before an explanation on its line."""


def answer_of(text: str) -> str:
    """Return a reply without its thoughts (``<think>``), code fence and surrounding space."""
    bare = _THOUGHT.sub("", text, count=1).strip()
    fenced = _FENCE.match(bare)
    return fenced.group(1).strip() if fenced else bare


def parse_labels(text: str, count: int) -> list[int] | None:
    """Read ``[1, 0, ...]`` with exactly ``count`` zeros and ones."""
    bare = answer_of(text)
    if not _LABELS.match(bare):
        return None
    labels = [int(digit) for digit in re.findall(r"[01]", bare)]
    return labels if len(labels) == count else None


def parse_index(text: str, count: int) -> int | None:
    """Read a number from 1 to ``count``; returns it from 0."""
    found = _INDEX.match(answer_of(text))
    number = int(found.group(1)) if found else 0
    return number - 1 if 1 <= number <= count else None


def parse_numbers(text: str, count: int) -> list[float] | None:
    """Read a JSON list of exactly ``count`` numbers from 0 to 10."""
    try:
        found = json.loads(answer_of(text))
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(found, list) or len(found) != count:
        return None
    numbers = [float(x) for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
    return numbers if len(numbers) == count and all(math.isfinite(x) and 0 <= x <= 10 for x in numbers) else None


def parse_explanation(text: str) -> str | None:
    """Read what follows ``[EXPLANATION]:`` on the last line that has it."""
    lines = [line for line in answer_of(text).splitlines() if EXPLANATION in line]
    said = " ".join(lines[-1].split(EXPLANATION, 1)[1].split()) if lines else ""
    return said or None
