"""What a small model of Python source has learned: accuracy at places of held-out code where the answer is known."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.models.language import predictions

CLOSERS = ")]}"


@dataclass(frozen=True)
class Probe:
    """Accuracy at one kind of place."""

    places: int
    """How many there were."""
    accuracy: float
    """Share of them where the model's first choice is what stands there."""
    chance: float
    """Share that the most frequent single answer would get right."""


@dataclass(frozen=True)
class Probes:
    """Accuracies on real text, each beside the best constant answer."""

    next_token: Probe
    """All tokens."""
    bracket: Probe
    """Where a token begins with a closing bracket: the kind of bracket, ), ] or }, by the probability of each."""
    indent: Probe
    """Where a line break follows a colon: break and indentation, exactly."""
    self_: Probe
    """What follows ``(`` in ``def name(`` on an indented line: the token, mostly ``self``."""

    def to_dict(self) -> dict[str, dict[str, float]]:
        """One entry per probe."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def probe(model: Any, tokenizer: Any, documents: Iterable[str], *, context: int) -> Probes:
    """Compare a Hugging Face causal LM's first choices with ``documents`` at the places named in :class:`Probes`."""
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in range(len(tokenizer))]
    firsts = torch.tensor([CLOSERS.find(piece[0]) if piece else -1 for piece in pieces])
    kinds = torch.stack([firsts == kind for kind in range(len(CLOSERS))]).float()
    tokens: list[Int[np.ndarray, " n"]] = []
    choices: list[Int[np.ndarray, " n"]] = []
    brackets: list[Int[np.ndarray, " n"]] = []
    for logits, targets in predictions(model, tokenizer, documents, context=context):
        mass: Float[Tensor, "n kinds"] = logits.softmax(-1) @ kinds.T
        tokens.append(targets.numpy())
        choices.append(logits.argmax(-1).numpy())
        brackets.append(mass.argmax(-1).numpy())
    came, chosen, kind = np.concatenate(tokens), np.concatenate(choices), np.concatenate(brackets)
    places = _places(pieces, came)
    true_kind = firsts.numpy()[came]
    closing = true_kind >= 0
    return Probes(
        next_token=_score(chosen, came, np.ones(len(came), dtype=bool)),
        bracket=_score(kind, true_kind, closing),
        indent=_score(chosen, came, places["indent"]),
        self_=_score(chosen, came, places["self"]),
    )


def _score(given: Int[np.ndarray, " n"], true: Int[np.ndarray, " n"], where: Bool[np.ndarray, " n"]) -> Probe:
    answers, n = true[where], int(where.sum())
    if n == 0:
        return Probe(places=0, accuracy=float("nan"), chance=float("nan"))
    return Probe(
        places=n, accuracy=float((given[where] == answers).mean()), chance=float(np.bincount(answers).max() / n)
    )


def _places(pieces: list[str], came: Int[np.ndarray, " n"]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Mark the tokens that follow a colon with a line break, and those that open a method's parameters."""
    indent = np.zeros(len(came), dtype=bool)
    parameters = np.zeros(len(came), dtype=bool)
    line = ""
    for at, token in enumerate(came.tolist()):
        piece = pieces[token]
        indent[at] = line.endswith(":") and piece.startswith("\n")
        words = line.split()
        parameters[at] = line[:1] == " " and line.endswith("(") and len(words) == 2 and words[0] == "def"
        line = piece.rpartition("\n")[2] if "\n" in piece else line + piece
    return {"indent": indent, "self": parameters}
