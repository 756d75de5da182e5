"""``CodebookModel``: a language model with codebooks at some of its sites, in memory and on disk.

On disk: the model as a Hugging Face folder (``model/``; without its codebooks it is not the model that was trained),
``codebooks.safetensors``, ``codebooks.json`` and the manifest.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.core.artifacts import read_json, read_manifest, read_safetensors, write_json, write_manifest
from saelab.core.artifacts import write_safetensors as write_tensors
from saelab.core.config import parse_config
from saelab.core.errors import CorruptError, ModelError, SiteError, nearest
from saelab.models.loading import quiet
from saelab.models.sites import Replacement
from saelab.models.subject import SubjectModel, load_model
from saelab.sae.codebook import Codebook, CodebookConfig, CodeEdit

KIND, CONFIG, WEIGHTS, MODEL = "codebook-model", "codebooks.json", "codebooks.safetensors", "model"


class CodebookModel(nn.Module):
    """A subject model and the codebook at each of some sites."""

    def __init__(self, subject: SubjectModel, codebooks: Mapping[str, Codebook]) -> None:
        super().__init__()
        self.subject = subject
        self.plain = subject.plain
        self.sites = list(codebooks)
        """Sites with a codebook, in the order of the forward pass."""
        self.codebooks = nn.ModuleList(codebooks.values())

    def codebook(self, site: str) -> Codebook:
        """Return the codebook at a site; :class:`SiteError` where there is none."""
        if site not in self.sites:
            raise SiteError(f"there is no codebook at '{site}'{nearest(site, self.sites)} ({', '.join(self.sites)})")
        found = self.codebooks[self.sites.index(site)]
        assert isinstance(found, Codebook)
        return found

    def logits(
        self,
        tokens: Int[Tensor, "b t"],
        edits: Mapping[str, Sequence[CodeEdit]] | None = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "b t vocab"]:
        """Return next-token logits of the model with its codebooks, and with some codes edited."""
        wanted = {self.codebook(site): list(found) for site, found in (edits or {}).items()}

        def through(site: str) -> Replacement:
            codebook = self.codebook(site)
            return lambda a: codebook(a, wanted.get(codebook, ()))

        return self.subject.logits(tokens, {site: through(site) for site in self.sites}, grad=grad)

    def chosen(self, tokens: Int[Tensor, "b t"]) -> dict[str, Int[Tensor, "b t groups k"]]:
        """Return the codes that each site chooses at each token."""
        self.logits(tokens)
        found = {site: self.codebook(site).chosen for site in self.sites}
        return {site: chosen for site, chosen in found.items() if chosen is not None}

    def loss(self) -> Float[Tensor, ""]:
        """Sum of the codebooks' own losses of the last forward pass."""
        losses = [self.codebook(site).loss for site in self.sites]
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def generate(
        self,
        tokens: Int[Tensor, "b t"],
        n: int,
        edits: Mapping[str, Sequence[CodeEdit]] | None = None,
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Int[Tensor, "b t_plus_n"]:
        """Return the rows gone on with for n tokens; ``temperature`` 0 takes the most probable one.

        Positions of the edits are those of the growing row; None edits all of them, prompt included.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            last = self.logits(tokens, edits)[:, -1].float().cpu()
            if temperature == 0:
                chosen = last.argmax(1)
            else:
                chosen = torch.multinomial((last / temperature).softmax(1), 1, generator=generator).squeeze(1)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
        return tokens


def add_codebooks(
    subject: SubjectModel, sites: Sequence[str], config: CodebookConfig, seed: int = 0, *, per_head: bool = True
) -> CodebookModel:
    """Put untrained codebooks at sites of a model: one for each head where a site has heads (``per_head``)."""
    made = {}
    for number, site in enumerate(sorted(dict.fromkeys(sites), key=subject.layer)):
        groups = len(subject.head_slices(site)) if per_head else 1
        made[site] = Codebook(config, subject.width(site), groups, seed * 1_000_003 + number)
    return CodebookModel(subject, made).to(subject.device)


def save_codebook_model(model: CodebookModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the folder; ``about`` (JSON-able) goes into the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    plain: Any = model.plain
    with quiet():
        plain.save_pretrained(folder / MODEL, safe_serialization=True)
        with contextlib.suppress(ModelError):  # a model of bare token ids has no tokenizer
            model.subject.tokenizer.save_pretrained(folder / MODEL)
    tensors = {f"{i}.{k}": v for i, book in enumerate(model.codebooks) for k, v in book.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors)
    books = [model.codebook(site) for site in model.sites]
    entries = [
        {"site": site, "width": book.width, "groups": book.groups, "config": book.config.model_dump(mode="json")}
        for site, book in zip(model.sites, books, strict=True)
    ]
    write_json(folder / CONFIG, {"codebooks": entries})
    write_manifest(folder, KIND, {"sites": model.sites, **about})


def load_codebook_model(folder: str | Path, device: str = "cpu") -> CodebookModel:
    """Load what :func:`save_codebook_model` wrote, in evaluation mode and without gradients."""
    folder = Path(folder)
    read_manifest(folder, KIND)
    subject = load_model(str(folder / MODEL), device=device)
    entries, tensors = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS, device)
    books: dict[str, Codebook] = {}
    try:
        for number, entry in enumerate(entries["codebooks"]):
            config = parse_config(CodebookConfig, entry["config"], str(folder / CONFIG))
            book = Codebook(config, int(entry["width"]), int(entry["groups"]))
            book.load_state_dict({k: tensors[f"{number}.{k}"] for k in book.state_dict()})
            books[str(entry["site"])] = book
    except (KeyError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{folder}: {CONFIG} and {WEIGHTS} do not fit together ({error}); train again") from None
    return CodebookModel(subject, books).to(device).eval().requires_grad_(False)
