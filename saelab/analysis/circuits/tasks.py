"""Tasks: paired prompts with right and wrong answers, as data in ``data/tasks`` and as token tensors for a model.

A task's YAML file holds its generator, its texts and its metric. :func:`make_prompts` draws prompts; a prompt belongs
to one of two splits by a hash of its clean side, so that what was found on one is checked on unseen ones.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from saelab.core.assets import asset
from saelab.core.config import Config, load_config
from saelab.core.errors import ConfigError, MissingFileError, TextError, nearest

MetricName = Literal["logit_diff", "logit_margin", "prob_diff", "kl", "nll"]
Split = Literal["train", "heldout"]
Text = str | tuple[int, ...]
"""A prompt or an answer: text, or token ids for models without a tokenizer."""


@dataclass(frozen=True)
class Prompt:
    """A clean prompt where the task applies, a corrupted one as long, and what is right for the clean one."""

    clean: Text
    corrupted: Text
    right: tuple[Text, ...]
    """Answers, each one token (a text's first token is taken); any of them is right."""
    wrong: tuple[Text, ...]
    right_prefix: bool = False
    """The right and wrong answers are all tokens that begin with the given texts."""


class TemplatePair(Config):
    """Texts with slots such as ``{name1}``: the first name drawn from the list ``name``."""

    clean: str
    """Prompt where the task applies."""
    corrupted: str
    """Its counterpart, of as many tokens."""
    right: list[str]
    """Right answers."""
    wrong: list[str]
    """Wrong answers."""


class TaskSpec(Config):
    """A file of ``data/tasks``."""

    name: str
    """What ``--task`` calls it."""
    about: str
    """What has to be done, and what the corrupted prompt is."""
    generator: str
    """How prompts are drawn: ``template``, or one of the functions in ``saelab.analysis.circuits.generators``."""
    metric: MetricName
    """Metric that the literature uses for this task."""
    truth: str | None = None
    """Name of its circuit in ``truth.yaml``, where one is known."""
    lists: dict[str, list[str]] = Field(default_factory=dict)
    """Words to draw from."""
    paired: list[list[str]] = Field(default_factory=list)
    """Lists whose slots of one number are drawn together (``singular1`` and ``plural1`` are the same noun)."""
    templates: list[TemplatePair] = Field(default_factory=list)
    """One is drawn for each prompt."""
    numbers: dict[str, Any] = Field(default_factory=dict)
    """Settings of the generator."""


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """n prompt pairs as tokens of one model, padded on the right (no position before the padding sees it)."""

    name: str
    clean: Int[Tensor, "n t"]
    corrupted: Int[Tensor, "n t"]
    readout: Int[Tensor, " n"]
    """Position whose next-token logits are judged: the last one of the prompt."""
    right: Int[Tensor, "n r"]
    """Right answers, -1 where a prompt has fewer."""
    wrong: Int[Tensor, "n w"]
    dropped: int = 0
    """Prompts left out because the clean and the corrupted side differ in length or an answer has no token."""
    texts: tuple[str, ...] = field(default=())
    """Clean prompts as text."""

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def valid(self) -> Bool[Tensor, "n t"]:
        """True up to the readout, False at padding."""
        return torch.arange(self.clean.shape[1])[None] <= self.readout[:, None].cpu()

    def at(self, rows: slice | Int[Tensor, " m"]) -> "TaskBatch":
        """Some of the prompts."""
        texts = tuple(self.texts[i] for i in torch.arange(len(self))[rows].tolist()) if self.texts else ()
        clean, corrupted, readout = self.clean[rows], self.corrupted[rows], self.readout[rows]
        return TaskBatch(self.name, clean, corrupted, readout, self.right[rows], self.wrong[rows], texts=texts)

    def to(self, device: Any) -> "TaskBatch":
        """The same on another device."""
        tensors = ("clean", "corrupted", "readout", "right", "wrong")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def task_names() -> list[str]:
    """Return the tasks that ship with saelab."""
    return sorted(path.stem for path in asset("data", "tasks").glob("*.yaml") if path.stem != "truth")


def load_task(name: str | Path) -> TaskSpec:
    """Load a shipped task by name, or a task from a YAML file of one's own."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_config(TaskSpec, path)
    if str(name) not in task_names():
        raise MissingFileError(
            f"no task '{name}'{nearest(str(name), task_names())}; give one of {', '.join(task_names())}, a YAML file "
            "of that form, or a prompt file (.csv, .json, .jsonl)"
        )
    return load_config(TaskSpec, asset("data", "tasks", f"{name}.yaml"))


def split_of(prompt: Prompt) -> Split:
    """Return the split that a prompt belongs to, by the CRC-32 of its clean side."""
    return "heldout" if zlib.crc32(repr(prompt.clean).encode()) % 2 else "train"


def task_prompts(task: str | Path, model: Any, n: int, seed: int = 0, split: Split = "train") -> list[Prompt]:
    """Draw (or, from a prompt file, choose) n prompts of one split, all different.

    Raises :class:`TextError` when there are not that many.
    """
    from saelab.analysis.circuits.generators import draw
    from saelab.analysis.circuits.prompt_files import read_prompts

    if Path(task).suffix in (".csv", ".json", ".jsonl"):
        found = [prompt for prompt in read_prompts(task) if split_of(prompt) == split]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
        prompts = [found[i] for i in order[:n]]
    else:
        prompts = draw(load_task(task), model, n, seed, split)
    if len(prompts) < n:
        raise TextError(f"{task} has only {len(prompts)} prompts in its {split} split, {n} were asked for; lower --n")
    return prompts


def task_batch(task: str | Path, model: Any, n: int, seed: int = 0, split: Split = "train") -> TaskBatch:
    """Draw n prompts of a task and turn them into tokens for ``model``."""
    name = task if isinstance(task, str) and Path(task).suffix == "" else Path(task).stem
    return tokenise(task_prompts(task, model, n, seed, split), model, str(name))


def tokenise(prompts: Sequence[Prompt], model: Any, name: str) -> TaskBatch:
    """Turn prompts into token tensors; pairs of unequal length are dropped and counted.

    Raises :class:`TextError` when none is left, or a prompt is longer than the context.
    """
    ids = _Tokeniser(model)
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    kept: list[str] = []
    for prompt in prompts:
        clean, corrupted = ids.prompt(prompt.clean), ids.prompt(prompt.corrupted)
        right, wrong = (ids.answers(texts, prompt.right_prefix) for texts in (prompt.right, prompt.wrong))
        wrong = [token for token in wrong if token not in right]
        if len(clean) == len(corrupted) and right and wrong:
            rows.append((clean, corrupted, right, wrong))
            kept.append(prompt.clean if isinstance(prompt.clean, str) else " ".join(map(str, prompt.clean)))
    if not rows:
        raise TextError(
            f"no prompt of {name} can be used with {model.name}: clean and corrupted sides differ in tokens; "
            "the task may be made for another tokenizer"
        )
    longest = max(len(row[0]) for row in rows)
    if longest > model.n_ctx:
        raise TextError(f"a prompt of {name} has {longest} tokens, the context of {model.name} is {model.n_ctx}")
    columns = list(zip(*rows, strict=True))
    return TaskBatch(
        name,
        _pad(columns[0], 0),
        _pad(columns[1], 0),
        torch.tensor([len(row[0]) - 1 for row in rows]),
        _pad(columns[2], -1),
        _pad(columns[3], -1),
        dropped=len(prompts) - len(rows),
        texts=tuple(kept),
    ).to(model.device)


class _Tokeniser:
    def __init__(self, model: Any) -> None:
        self.model = model
        self._vocabulary: list[str] | None = None

    def prompt(self, text: Text) -> list[int]:
        """Token ids; a text gets the BOS token in front where the tokenizer has one."""
        if not isinstance(text, str):
            return list(text)
        bos = self.model.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self._plain(text)

    def answers(self, texts: Sequence[Text], by_prefix: bool) -> list[int]:
        """First token of each answer, or every token that begins with one of them."""
        if by_prefix:
            return self._beginning_with([str(text) for text in texts])
        ids = [self._plain(text) if isinstance(text, str) else list(text) for text in texts]
        return list(dict.fromkeys(found[0] for found in ids if found))

    def _plain(self, text: str) -> list[int]:
        return list(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _beginning_with(self, starts: list[str]) -> list[int]:
        if self._vocabulary is None:
            self._vocabulary = [self.model.tokenizer.decode([i]) for i in range(self.model.d_vocab)]
        return [i for i, text in enumerate(self._vocabulary) if text.startswith(tuple(starts))]


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "n t"]:
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def require_positive(n: int, what: str) -> None:
    """Refuse a count below 1 in one line."""
    if n < 1:
        raise ConfigError(f"{what} is {n}, expected at least 1")
