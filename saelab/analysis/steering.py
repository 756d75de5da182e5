"""Steering: change what an SAE's features write into a running model, and compare what the model then says.

With ``v`` what the SAE writes for an activation of 1, ``v_hat = v / ||v||`` and ``f`` the feature's activation at a
position, an edit changes the activation h at that position:

* ``add``      h + strength v
* ``clamp``    h + (strength - f) v: the feature as if it were ``strength``, the SAE's error kept
* ``ablate``   h - f v: clamp to 0
* ``project``  h + (strength - 1) <h, v_hat> v_hat: the component along v times ``strength`` (1 changes nothing)
* ``cap``      h + (min(<h, v_hat>, strength) - <h, v_hat>) v_hat: that component no larger than ``strength``

``add``, ``clamp`` and ``ablate`` of several features refer to the same h; the other two follow in the order given.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.analysis.prompt import write_directions
from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError
from saelab.features.protocols import Dictionary, Model, Replace
from saelab.features.rows import encode_in_parts, require_fit

if TYPE_CHECKING:
    import pandas as pd

MODES = ("add", "clamp", "ablate", "project", "cap")
"""What can be done to a feature; see the module."""
POSITIONS = ("all", "prompt", "generated", "last")
"""Where it can be done: everywhere, in the prompt, in what is written, at the prompt's last token."""


@dataclass(frozen=True)
class Edit:
    """What to do to one feature."""

    feature: int
    """The feature."""
    mode: str = "add"
    """How: one of ``MODES``."""
    strength: float = 0.0
    """By how much; not used by ``ablate``."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The same seed draws the same noise for every text, so equal logits give equal texts."""

    max_new_tokens: int = 40
    """Tokens to write."""
    temperature: float = 0.5
    """0 takes the likeliest token."""
    seed: int = 16
    """Seed of the noise."""
    frequency_penalty: float = 1.0
    """Taken off a token's logit for each time it was written already."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A text that a model wrote."""

    tokens: Int[Tensor, " t"]
    """Prompt and what was written."""
    n_prompt: int
    """Length of the prompt."""


@dataclass(frozen=True, eq=False)
class Steering:
    """A site, and the edits made there."""

    sae: Dictionary
    """The SAE whose features are edited."""
    site: str
    """Where in the model."""
    edits: tuple[Edit, ...]
    """What is done."""
    positions: str = "all"
    """Which positions: one of ``POSITIONS``."""
    _directions: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is '{self.positions}', expected one of {', '.join(POSITIONS)}")
        for edit in self.edits:
            if edit.mode not in MODES:
                raise ConfigError(f"mode is '{edit.mode}', expected one of {', '.join(MODES)}")
            if not 0 <= edit.feature < self.sae.d_sae:
                raise ConfigError(
                    f"feature {edit.feature} does not exist; the SAE has features 0 to {self.sae.d_sae - 1}"
                )
            if not abs(edit.strength) < float("inf"):
                raise ConfigError(
                    f"the strength of feature {edit.feature} is {edit.strength}, expected a finite number"
                )
        self._directions.extend(write_directions(self.sae, [edit.feature for edit in self.edits]))

    def replacement(self, keep: Bool[Tensor, " t"], n_prompt: int) -> Replace:
        """Return the function to put at the site, for T tokens of which the first ``n_prompt`` are the prompt.

        Positions where ``keep`` is False (BOS and other special tokens) are never edited.
        """
        place = torch.arange(len(keep))
        where = (
            keep
            & {
                "all": place >= 0,
                "prompt": place < n_prompt,
                "generated": place >= n_prompt,
                "last": place == n_prompt - 1,
            }[self.positions]
        )

        def replace(x: Tensor) -> Tensor:
            if not self.edits or not bool(where.any()):
                return x
            x = x.clone()
            x[:, where] = torch.stack([self.edited(row) for row in x[:, where]])
            return x

        return replace

    @torch.no_grad()
    def edited(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return activations, in the model's units and dtype, after the edits."""
        directions = [v.to(h.device, torch.float32) for v in self._directions]
        pairs = list(zip(self.edits, directions, strict=True))
        latent = [(edit, v) for edit, v in pairs if edit.mode in ("add", "clamp", "ablate")]
        change = torch.zeros_like(h, dtype=torch.float32)
        if any(edit.mode != "add" for edit, _ in latent):
            code = encode_in_parts(self.sae, h, self.site)
        for edit, v in latent:
            if edit.mode == "add":
                change += edit.strength * v
                continue
            wanted = edit.strength if edit.mode == "clamp" else 0.0
            change += (wanted - _values(code, edit.feature).to(h.device))[:, None] * v
        new = (h.float() + change).to(h.dtype)
        for edit, v in pairs:
            if edit.mode not in ("project", "cap"):
                continue
            unit = v / v.norm().clamp_min(1e-30)
            along = new.float() @ unit
            target = edit.strength * along if edit.mode == "project" else along.clamp(max=edit.strength)
            new = (new.float() + (target - along)[:, None] * unit).to(h.dtype)
        return new


def _values(code: SparseCode, feature: int) -> Float[Tensor, " n"]:
    values = torch.zeros(code.n_tokens, device=code.values.device)
    mine = code.indices == feature
    values[code.rows()[mine]] = code.values[mine].float()
    return values


@torch.no_grad()
def generate(model: Any, tokens: Int[Tensor, " t"], decoding: Decoding, steering: Steering | None = None) -> Generation:
    """Let the model go on from a prompt, with or without steering.

    Writing ends with ``max_new_tokens``, the end-of-text token, or the model's context. The model runs on the whole
    text for each token, so that edits of any kind act on every position as they would in one pass.
    """
    if steering is not None:
        require_fit(model, steering.sae, steering.site)
    generator = torch.Generator().manual_seed(decoding.seed)
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int64)
    written = torch.zeros(model.d_vocab)
    text = tokens
    for _ in range(decoding.max_new_tokens):
        # The noise of a step is drawn whatever the logits are: texts of one seed share it.
        noise = torch.rand(model.d_vocab, generator=generator).clamp_(1e-20, 1 - 1e-7)
        if len(text) >= model.n_ctx:
            break
        replace = None
        if steering is not None:
            replace = {steering.site: steering.replacement(~torch.isin(text, special), len(tokens))}
        logits = model.logits(text[None], replace=replace)[0, -1].float().cpu() - decoding.frequency_penalty * written
        if decoding.temperature > 0:
            logits = logits / decoding.temperature - noise.log().neg().log()
        new = int(logits.argmax())
        if new == model.tokenizer.eos_token_id:
            break
        written[new] += 1
        text = torch.cat([text, torch.tensor([new])])
    return Generation(text, len(tokens))


@torch.no_grad()
def next_token_effect(
    model: Model, tokens: Int[Tensor, " t"], keep: Bool[Tensor, " t"], steering: Steering
) -> "pd.DataFrame":
    """What steering does to the next token's distribution.

    One row for each token of the vocabulary: ``token``, ``default`` and ``steered`` probability, ``change`` (their
    difference) and ``log_ratio`` (log of their ratio, nats); largest absolute change first.
    """
    import pandas as pd

    require_fit(model, steering.sae, steering.site)
    replace = {steering.site: steering.replacement(keep, len(tokens))}
    before = model.logits(tokens[None])[0, -1].double().cpu().log_softmax(-1)
    after = model.logits(tokens[None], replace=replace)[0, -1].double().cpu().log_softmax(-1)
    frame = pd.DataFrame(
        {
            "token": range(len(before)),
            "default": before.exp().numpy(),
            "steered": after.exp().numpy(),
            "change": (after.exp() - before.exp()).numpy(),
            "log_ratio": (after - before).numpy(),
        }
    )
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def identities(model: Any, sae: Dictionary, site: str, tokens: Int[Tensor, " t"], feature: int) -> dict[str, float]:
    """Check, on this very prompt, the edits that must change nothing; the largest change of an activation for each.

    ``add 0``; ``clamp to current``: position by position to the value that the feature has there; ``project 1``;
    ``cap twice``: what a second cap changes. All are 0, but for ``cap twice``, which may be off by rounding.
    """
    (x,) = (value[0].float() for value in model.read(tokens[None], [site]).values())
    values = _values(encode_in_parts(sae, x, site), feature)

    def apply(mode: str, strength: float, h: Tensor) -> Tensor:
        return Steering(sae, site, (Edit(feature, mode, strength),)).edited(h)

    clamped = torch.cat([apply("clamp", float(v), h[None]) for v, h in zip(values, x, strict=True)])
    unit = write_directions(sae, [feature])[0].to(x)
    middle = float((x @ unit / unit.norm().clamp_min(1e-30)).median())
    capped = apply("cap", middle, x)
    changes = {
        "add 0": apply("add", 0.0, x) - x,
        "clamp to current": clamped - x,
        "project 1": apply("project", 1.0, x) - x,
        "cap twice": apply("cap", middle, capped) - capped,
    }
    return {name: float(change.abs().max()) for name, change in changes.items()}
