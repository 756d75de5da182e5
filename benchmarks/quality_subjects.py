"""The models that ``quality.py`` measures SAEs on: how each is loaded, its text, its site, its stores.

``embedded`` is there for everyone. The other two are public TinyStories models that are not part of this project:
``--data`` (or the variable SAELAB_QUALITY_DATA) names a folder with ``relu-stories2M/``, ``stories260K/`` (Hugging Face
folders) and ``text/tinystories-600.jsonl``; without it they are skipped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.activations.store import ActivationStore, open_store
from saelab.core.artifacts import MANIFEST
from saelab.models.loading import Loaded, boot_bridge, load_plain, load_tokenizer
from saelab.models.subject import SubjectModel, load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig

STORIES = "text/tinystories-600.jsonl"
TRAIN_STORIES = 480
"""Stories that SAEs are trained on; the rest is held out (of the SAEs' training: the models have seen all of them)."""


@dataclass(frozen=True)
class Subject:
    """A model, a site, and how much is trained on."""

    name: str
    site: str
    d_sae: int
    tokens: int
    """Tokens each SAE is trained on."""
    harvest_tokens: int
    """Tokens in the store; when fewer than ``tokens``, they are repeated."""
    heldout_tokens: int
    load: Callable[[Path], SubjectModel]
    folder: str | None = None
    """What must be in the data folder."""

    def texts(self, data: Path, work: Path) -> tuple[str, str]:
        """Return training and held-out text."""
        if self.folder is None:
            return "stdlib:train", "stdlib:heldout"
        lines = (data / STORIES).read_text(encoding="utf-8").splitlines()
        for name, part in (("train", lines[:TRAIN_STORIES]), ("heldout", lines[TRAIN_STORIES:])):
            (work / f"stories-{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        return str(work / "stories-train.jsonl"), str(work / "stories-heldout.jsonl")

    def tokens_config(self) -> TokensConfig:
        """Return how text becomes rows: code is packed, stories have a row each."""
        return TokensConfig(context=256, packing="packed" if self.folder is None else "documents")

    def missing(self, data: Path | None) -> str | None:
        """Say why this subject cannot be measured, if so."""
        if self.folder is None:
            return None
        if data is None:
            return "no --data folder given"
        wanted = [data / self.folder / "config.json", data / STORIES]
        absent = [str(path) for path in wanted if not path.is_file()]
        return f"{', '.join(absent)} not found" if absent else None


@dataclass(frozen=True)
class Opened:
    """A subject, loaded, and its two stores."""

    subject: Subject
    model: SubjectModel
    train: ActivationStore
    heldout: ActivationStore
    heldout_rows: TokenRows
    """The rows of tokens that the held-out store was made of."""


def open_subject(subject: Subject, data: Path | None, work: Path) -> Opened:
    """Load the model and harvest both texts with gradients, unless that was done before."""
    work.mkdir(parents=True, exist_ok=True)
    model = subject.load(data or work)
    train_text, heldout_text = subject.texts(data or work, work)
    stores, rows = [], None
    for name, text, tokens in (
        ("train", train_text, subject.harvest_tokens),
        ("heldout", heldout_text, subject.heldout_tokens),
    ):
        rows = TokenRows(model.tokenizer, open_text(text), subject.tokens_config(), model.n_ctx)
        if (work / name / MANIFEST).is_file():
            stores.append(open_store(work / name))
            stores[-1].check_model(model)
            continue
        config = HarvestConfig(max_tokens=tokens, gradients=True)
        stores.append(harvest(model, rows, [subject.site], work / name, config, resume=True))
    assert rows is not None
    return Opened(subject, model, stores[0], stores[1], rows)


# Models --------------------------------------------------------------------------------------------------------------


def _embedded(data: Path) -> SubjectModel:
    del data
    return load_model("embedded")


def _stories260k(data: Path) -> SubjectModel:
    return load_model(str(data / "stories260K"))


def _relu_stories(data: Path) -> SubjectModel:
    """Load a "relufied" Llama.

    Its config looks like a plain Llama's, and as one it prints garbage: it was trained with ReLU(y - norm_relu_shift)
    after the two norms of each block and ReLU(gate - gate_relu_shift) in its MLPs. Both are put into the plain model
    before the bridge is built around a copy of it.
    """
    folder = data / "relu-stories2M"
    plain = load_plain(str(folder), "float32", "cpu", None)
    shifted(plain, json.loads((folder / "config.json").read_text()))
    tokenizer = load_tokenizer(plain, None)
    bridge, paths = boot_bridge(plain, tokenizer, "float32")
    return SubjectModel("relu-stories2M", plain, bridge, paths, tokenizer=tokenizer, tokenizer_problem=None)


class ShiftedReLU(nn.Module):
    """ReLU(x - shift)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(x - shift)."""
        return torch.relu(x - self.shift)


def shifted(loaded: Loaded, config: dict[str, Any]) -> None:
    """Give a Llama the two shifts of its config."""
    after_norm = ShiftedReLU(float(config["norm_relu_shift"]))
    plain: Any = loaded.plain
    for layer in plain.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, args, out: after_norm(out))
        layer.mlp.act_fn = ShiftedReLU(float(config["gate_relu_shift"]))


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("embedded", "blocks.2.hook_resid_post", 1024, 204_800, 409_600, 80_000, _embedded),
        Subject(
            "relu-stories2M",
            "blocks.3.hook_resid_post",
            1024,
            204_800,
            409_600,
            80_000,
            _relu_stories,
            "relu-stories2M",
        ),
        Subject("stories260K", "blocks.3.hook_resid_post", 512, 204_800, 204_800, 80_000, _stories260k, "stories260K"),
    )
}
