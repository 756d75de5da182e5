"""Generators: how the prompts of each task are drawn. ``GENERATORS`` maps the name in a task's file to its function.

Every generator is a pure function of the task's file, the model's vocabulary and a NumPy generator.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saelab.analysis.circuits.tasks import Prompt, Split, TaskSpec, split_of
from saelab.core.errors import ConfigError, nearest

ATTEMPTS = 60
"""Draws per prompt wanted before the generator gives up on finding more different ones."""
Generator = Callable[[TaskSpec, Sequence[int], np.random.Generator], Prompt | None]


def draw(spec: TaskSpec, model: Any, n: int, seed: int, split: Split) -> list[Prompt]:
    """Draw up to n different prompts of one split; fewer when the task does not have as many."""
    if spec.generator not in GENERATORS:
        raise ConfigError(
            f"task {spec.name}: no generator '{spec.generator}'{nearest(spec.generator, GENERATORS)} "
            f"(known: {', '.join(GENERATORS)})"
        )
    function, on_tokens = GENERATORS[spec.generator]
    vocabulary = words(model) if on_tokens == "any" else range(model.d_vocab)
    generator = np.random.default_rng(seed)
    found: dict[Any, Prompt] = {}
    for _ in range(ATTEMPTS * n):
        if len(found) == n:
            break
        prompt = function(spec, vocabulary, generator)
        if prompt is not None and split_of(prompt) == split:
            found.setdefault(prompt.clean, prompt)
    return list(found.values())


def words(model: Any) -> Sequence[int]:
    """Token ids to draw random prompts from: whole lower-case words of a tokenizer, or all ids but 0 without one."""
    from saelab.core.errors import ModelError

    try:
        tokenizer = model.tokenizer
    except ModelError:
        return range(1, model.d_vocab)
    texts = [tokenizer.decode([i]) for i in range(model.d_vocab)]
    tokens = tokenizer.convert_ids_to_tokens(list(range(model.d_vocab)))
    # The marks of byte-level and of sentence-piece tokenizers for a space in front.
    words = [
        i
        for i, (text, token) in enumerate(zip(texts, tokens, strict=True))
        if re.fullmatch(r"[a-z]{3,}", text.strip()) and str(token)[:1] in "Ġ▁"
    ]
    return words if len(words) > 64 else range(1, model.d_vocab)


def template(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt:
    """Fill the slots of one of the templates; slots of one list get different words."""
    chosen = spec.templates[int(generator.integers(len(spec.templates)))]
    fill = _Slots(spec, generator)
    clean, corrupted = fill(chosen.clean), fill(chosen.corrupted)
    right, wrong = tuple(map(fill, chosen.right)), tuple(map(fill, chosen.wrong))
    by_prefix = all(len(text) == 1 and not text.isalnum() for text in right)
    return Prompt(clean, corrupted, right, wrong, by_prefix)


class _Slots:
    """Fills ``{list1}``; the same slot always gets the same word."""

    def __init__(self, spec: TaskSpec, generator: np.random.Generator) -> None:
        self._spec = spec
        self._order: dict[str, np.ndarray] = {}
        for name, words in spec.lists.items():
            mates = next((group for group in spec.paired if name in group), [name])
            if mates[0] not in self._order:
                self._order[mates[0]] = generator.permutation(len(words))
            self._order[name] = self._order[mates[0]]

    def __call__(self, text: str) -> str:
        return re.sub(r"\{([a-z]+)(\d+)\}", self._word, text)

    def _word(self, match: "re.Match[str]") -> str:
        name, number = match[1], int(match[2])
        if name not in self._order or number > len(self._order[name]):
            raise ConfigError(f"task {self._spec.name}: slot {match[0]} has no list or too short a one")
        return self._spec.lists[name][int(self._order[name][number - 1])]


def greater_than(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt:
    """Draw a template with a year 02 to 98; right are the two-digit numbers above it, wrong the others."""
    chosen = spec.templates[0]
    fill, year = _Slots(spec, generator), int(generator.integers(2, 99))
    right = tuple(f"{y:02d}" for y in range(year + 1, 100))
    wrong = tuple(f"{y:02d}" for y in range(year + 1))
    return Prompt(fill(chosen.clean.replace("{year}", f"{year:02d}")), fill(chosen.corrupted), right, wrong)


def induction(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt:
    """Draw ``0 block block[:i+1]``; corrupted is ``0 other-block block[:i+1]``."""
    size = int(spec.numbers["block"])
    low, high = spec.numbers["readout"]
    tokens = [int(t) for t in generator.choice(np.asarray(vocabulary), 2 * size, replace=False)]
    block, other, i = tokens[:size], tokens[size:], int(generator.integers(low, high))
    tail = block[: i + 1]
    return Prompt((0, *block, *tail), (0, *other, *tail), ((block[i + 1],),), ((other[i + 1],),))


def trigger(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt:
    """Draw ``0 filler.. A B filler.. A``; corrupted has a filler for the first A. Triggers are the first ids."""
    n_triggers = int(spec.numbers["triggers"])
    low, high = spec.numbers["length"]
    triggers, fillers = np.asarray(vocabulary)[:n_triggers], np.asarray(vocabulary)[n_triggers:]
    length = int(generator.integers(low, high + 1))
    words = [int(t) for t in generator.choice(fillers, length + 1, replace=False)]
    body, spare, a = words[:length], words[length], int(generator.choice(triggers))
    place = int(generator.integers(0, length - 2))
    clean = [*body[:place], a, *body[place + 1 :], a]
    corrupted = [*body[:place], spare, *body[place + 1 :], a]
    others = [t for t in body if t not in (body[place], body[place + 1])]
    wrong = others[int(generator.integers(len(others)))]
    return Prompt((0, *clean), (0, *corrupted), ((body[place + 1],),), ((wrong,),))


def sort(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt | None:
    """Draw six letters and the first j sorted ones; corrupted: other letters with the same j and another next one."""
    letters, length = int(spec.numbers["letters"]), int(spec.numbers["length"])
    clean, corrupted = (tuple(int(v) for v in generator.integers(0, letters, length)) for _ in range(2))
    done = int(generator.integers(0, length))
    a, b = sorted(clean), sorted(corrupted)
    if a[:done] != b[:done] or a[done] == b[done]:
        return None
    return Prompt((*clean, *a[:done]), (*corrupted, *b[:done]), ((a[done],),), ((b[done],),))


def reverse(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt | None:
    """Draw ``0 letters slot..``: the j-th slot is answered by the j-th letter from the end."""
    n_letters, slot = int(spec.numbers["letters"]), int(spec.numbers["letters"]) + 1
    length = int(generator.integers(1, int(spec.numbers["longest"]) + 1))
    words = [tuple(int(v) for v in generator.integers(1, n_letters + 1, length)) for _ in range(2)]
    j = int(generator.integers(1, length + 1))
    if words[0][-j] == words[1][-j]:
        return None
    clean, corrupted = ((0, *word, *[slot] * j) for word in words)
    return Prompt(clean, corrupted, ((words[0][-j],),), ((words[1][-j],),))


SHARES = (0.0, 1 / 3, 0.5, 2 / 3, 1.0)
"""Answers of the task `proportion`: tokens 7 to 11."""


def proportion(spec: TaskSpec, vocabulary: Sequence[int], generator: np.random.Generator) -> Prompt | None:
    """Draw three tokens and a question (first half), or four and three and a question (second half).

    1, 2 are letters and 3, 4 digits, of which 2 and 4 are marked; 5 asks for letters, 6 for digits. The answer is the
    share of marked ones among the tokens of that kind in the same half.
    """
    second = bool(generator.integers(2))
    kind = int(generator.integers(2))
    sides = []
    for _ in range(2):
        tokens = [int(t) for t in generator.integers(1, 5, 7 if second else 3)]
        asked = [t for t in (tokens[4:] if second else tokens) if (t - 1) // 2 == kind]
        if not asked:
            return None
        share = sum(t % 2 == 0 for t in asked) / len(asked)
        sides.append(((0, *tokens, 5 + kind), 7 + int(np.abs(np.asarray(SHARES) - share).argmin())))
    (clean, right), (corrupted, wrong) = sides
    return None if right == wrong else Prompt(clean, corrupted, ((right,),), ((wrong,),))


GENERATORS: dict[str, tuple[Generator, str]] = {
    "template": (template, "text"),
    "greater_than": (greater_than, "text"),
    "induction": (induction, "any"),
    "trigger": (trigger, "any"),
    "sort": (sort, "own"),
    "reverse": (reverse, "own"),
    "proportion": (proportion, "own"),
}
"""Each generator, and what its prompts are made of: texts, any tokens of the model, or token ids of its own."""
