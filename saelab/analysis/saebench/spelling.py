"""The first-letter task: words that are single tokens, each after the same few tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from saelab.analysis.saebench.examples import LabelledSet, collect
from saelab.features.protocols import Dictionary, Model

PROMPT = "import"
LEAST_LETTERS, TRAIN_SHARE = 3, 0.7


def words_of(tokenizer: Any) -> tuple[list[int], list[str]]:
    """Token ids that stand for a blank and a word of three or more letters (a-z), and their words in lower case."""
    ids, words = [], []
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        word = text[1:].lower()
        if (
            token not in special
            and text[:1] == " "
            and len(word) >= LEAST_LETTERS
            and word.isascii()
            and word.isalpha()
        ):
            ids.append(token)
            words.append(word)
    return ids, words


def spelling_set(
    model: Model,
    site: str,
    dictionaries: Mapping[str, Dictionary],
    tokenizer: Any,
    *,
    prompt: str = PROMPT,
    seed: int = 0,
) -> LabelledSet | None:
    """Read each word's token after ``prompt``; classes are first letters. None when the tokenizer has too few words.

    Words that differ in case alone are on the same side of the split.
    """
    ids, words = words_of(tokenizer)
    letters = tuple(sorted({word[0] for word in words}))
    if len(words) < 100:
        return None
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head = head + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*head, token] for token in ids])
    example = np.full(tuple(tokens.shape), -1, np.int64)
    example[:, -1] = np.arange(len(ids))
    pooled = collect(model, site, dictionaries, tokens, example, title="words")
    distinct = sorted(set(words))
    drawn = np.random.default_rng([seed, 50]).random(len(distinct)) < TRAIN_SHARE
    side = dict(zip(distinct, drawn.tolist(), strict=True))
    y = np.array([letters.index(word[0]) for word in words], np.int64)
    about = {"labels": "first letter of the word", "prompt": prompt}
    return LabelledSet("first_letter", letters, pooled, y, np.array([side[word] for word in words]), about)
