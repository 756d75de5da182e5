"""Models whose circuit is known because their weights are set by hand, as GPT-2 folders that ``load_model`` takes.

Two devices make a GPT-2 exact. The residual stream is mirrored, every value v also stands as -v, so that LayerNorm's
mean is 0; and ``layer_norm_epsilon`` is 1e8 with weights of 1e4, so that LayerNorm is the identity up to 1e-7. Parts
that the circuit does not need are decoys: random weights that read everything and write where nobody reads.

=============  =======================================================================================================
hand-induction two layers: head 0.0 copies the previous token, head 1.0 looks for the present token there
trigger        (the same model, task ``trigger``)
reverse        four layers (Lindner et al. 2023, "Tracr", have the task; this construction is causal and our own)
proportion     two layers: share of marked tokens among those of the asked kind in the same half
=============  =======================================================================================================
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ConfigError, nearest

SHARP = 60.0
"""Attention score of a match: exp(-60) is nothing beside 1."""
EPSILON = 1e8
JUNK = 6
"""Residual dimensions that only decoys write."""


class HandSet:
    """A GPT-2 under construction, in terms of named parts of one half of the (mirrored) residual stream."""

    def __init__(
        self, spaces: dict[str, int], *, n_layers: int, n_heads: int, d_head: int, hidden: int, n_ctx: int, seed: int
    ) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        from saelab.models.loading import quiet

        width = n_heads * d_head
        self.n_heads, self.d_head, self.half = n_heads, d_head, width // 2
        self.spaces: dict[str, slice] = {}
        start = 0
        for name, size in {**spaces, "junk": JUNK}.items():
            self.spaces[name] = slice(start, start + size)
            start += size
        assert start <= self.half, "the spaces do not fit the width"
        self.generator = torch.Generator().manual_seed(seed)
        config = GPT2Config(
            vocab_size=spaces["token"],
            n_positions=n_ctx,
            n_embd=width,
            n_layer=n_layers,
            n_head=n_heads,
            n_inner=hidden,
            activation_function="relu",
            layer_norm_epsilon=EPSILON,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng(), quiet():
            self.model: Any = GPT2LMHeadModel(config)
        for parameter in self.model.requires_grad_(False).parameters():
            parameter.zero_()
        core = self.model.transformer
        for norm in [core.ln_f, *(n for block in core.h for n in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(EPSILON**0.5)

    def eye(self, space: str, into: int | None = None) -> Float[Tensor, "d e"]:
        """Read the coordinates of a space into the first dimensions of a head (or of so many)."""
        where = self.spaces[space]
        n = where.stop - where.start
        matrix = torch.zeros(2 * self.half, self.d_head if into is None else into)
        matrix[where.start : where.stop, :n] = torch.eye(n)
        return matrix

    def direction(self, space: str, index: int) -> Float[Tensor, " d"]:
        """Read vector of one coordinate."""
        vector = torch.zeros(2 * self.half)
        vector[self.spaces[space].start + index] = 1
        return vector

    def mirror(self, matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Turn write vectors of the first half into mirrored ones."""
        half = matrix[:, : self.half]
        return torch.cat([half, -half], 1)

    def embed(self) -> None:
        """Token t writes coordinate t of ``token``; position p coordinate p of ``place``."""
        core = self.model.transformer
        for weight, space in ((core.wte.weight, "token"), (core.wpe.weight, "place")):
            weight.copy_(self.mirror(self.eye(space, weight.shape[0]).T))

    def head(self, layer: int, head: int, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Set a head: q, k, v (d, d_head), out (d_head, d). Scores are q . k, without the usual scaling."""
        attn = self.model.transformer.h[layer].attn
        where = slice(head * self.d_head, (head + 1) * self.d_head)
        for n, matrix in enumerate((q * self.d_head**0.5, k, v)):
            attn.c_attn.weight[:, n * 2 * self.half :][:, where] = matrix
        attn.c_proj.weight[where] = self.mirror(out)

    def unit(self, layer: int, number: int, read: Tensor, bias: float, write: Tensor) -> None:
        """Set a hidden unit of an MLP: adds relu(x . read + bias) * write."""
        mlp = self.model.transformer.h[layer].mlp
        mlp.c_fc.weight[:, number] = read
        mlp.c_fc.bias[number] = bias
        mlp.c_proj.weight[number] = self.mirror(write[None])[0]

    def decoy_head(self, layer: int, head: int) -> None:
        """A head with random queries, keys and values that writes to ``junk``."""
        q, k, v = (torch.randn(2 * self.half, self.d_head, generator=self.generator) * 0.2 for _ in range(3))
        out = torch.zeros(self.d_head, 2 * self.half)
        out[:, self.spaces["junk"]] = torch.randn(self.d_head, JUNK, generator=self.generator) * 0.2
        self.head(layer, head, q=q, k=k, v=v, out=out)

    def decoy_mlp(self, layer: int) -> None:
        """An MLP of random units that write to ``junk``."""
        for number in range(4):
            write = torch.zeros(2 * self.half)
            write[self.spaces["junk"]] = torch.randn(JUNK, generator=self.generator) * 0.2
            self.unit(layer, number, torch.randn(2 * self.half, generator=self.generator) * 0.2, 0.1, write)

    def unembed(self, space: str, scale: float, first: int = 0) -> None:
        """The logit of token ``first + i`` is ``scale`` times coordinate i of a space."""
        where = self.spaces[space]
        for i in range(where.stop - where.start):
            self.model.lm_head.weight[first + i] = self.direction(space, i) * scale

    def save(self, folder: Path) -> Path:
        """Write the model folder."""
        from saelab.models.loading import quiet

        with quiet():
            self.model.save_pretrained(folder)
        return folder


def hand_induction(folder: Path, seed: int = 0) -> Path:
    """Heads 0.0 and 1.0 do induction over 19 tokens (0 is BOS, where head 1.0 rests); all other heads are decoys."""
    vocab, places = 20, 16
    made = HandSet(
        {"token": vocab, "place": places, "previous": vocab, "out": vocab},
        n_layers=2,
        n_heads=4,
        d_head=48,
        hidden=4,
        n_ctx=places,
        seed=seed,
    )
    made.embed()
    before = torch.zeros(2 * made.half, made.d_head)
    place = made.spaces["place"]
    for p in range(1, places):
        before[place.start + p, p - 1] = SHARP
    previous = torch.zeros(made.d_head, 2 * made.half)
    previous[:vocab, made.spaces["previous"]] = torch.eye(vocab)
    made.head(0, 0, q=before, k=made.eye("place"), v=made.eye("token"), out=previous)
    # Without a match the head rests on BOS: half a match's score, to every query alike.
    keys = made.eye("previous")
    keys[made.spaces["token"].start, :] = 0.5
    out = torch.zeros(made.d_head, 2 * made.half)
    out[1:vocab, made.spaces["out"].start + 1 : made.spaces["out"].stop] = torch.eye(vocab - 1)
    made.head(1, 0, q=made.eye("token") * SHARP, k=keys, v=made.eye("token"), out=out)
    for layer in range(2):
        for head in range(1, 4):
            made.decoy_head(layer, head)
        made.decoy_mlp(layer)
    made.unembed("out", 10.0)
    return made.save(folder)


def reverse(folder: Path, seed: int = 0) -> Path:
    """Answer the j-th slot after n <= 5 letters by the (n+1-j)-th letter.

    0.0 attends to everything alike: share f = n / (p + 1) of letters at position p. m0 keeps f in slots. m1 knows n
    from f and p, and writes the place n + 1 - j = 2n + 1 - p as a number. m2 makes it one-hot. 3.0 looks there.
    """
    letters, longest = 3, 5
    slot, places = letters + 1, 2 * longest + 1
    spaces = {
        "token": slot + 1,
        "place": places,
        "share": 1,
        "kept": 1,
        "target": 1,
        "asked": longest + 1,
        "out": letters,
    }
    made = HandSet(spaces, n_layers=4, n_heads=2, d_head=36, hidden=64, n_ctx=places, seed=seed)
    made.embed()
    zero = torch.zeros(2 * made.half, made.d_head)
    is_letter, share = zero.clone(), torch.zeros(made.d_head, 2 * made.half)
    is_letter[made.spaces["token"].start + 1 : made.spaces["token"].start + slot, 0] = 1
    share[0, made.spaces["share"]] = 1
    made.head(0, 0, q=zero, k=zero, v=is_letter, out=share)
    in_slot = made.direction("token", slot)
    made.unit(0, 0, made.direction("share", 0) + 2 * in_slot, -2.0, made.direction("kept", 0))
    number, width, gate = 0, 1 / (2 * places), 100.0
    for n in range(1, longest + 1):
        for p in range(n + 1, 2 * n + 1):
            for shift, height in ((width, 1.0), (0.0, -2.0), (-width, 1.0)):
                read = made.direction("kept", 0) / width + gate * (made.direction("place", p) + in_slot)
                bias = (shift - n / (p + 1)) / width - 2 * gate
                made.unit(1, number, read, bias, made.direction("target", 0) * height * (2 * n + 1 - p))
                number += 1
    number = 0
    for place in range(1, longest + 1):
        for shift, height in ((1.0, 1.0), (0.0, -2.0), (-1.0, 1.0)):
            write = made.direction("asked", place) * height
            made.unit(2, number, made.direction("target", 0), shift - place, write)
            number += 1
    keys, values = zero.clone(), zero.clone()
    keys[made.spaces["place"].start : made.spaces["place"].start + longest + 1, : longest + 1] = torch.eye(longest + 1)
    values[made.spaces["token"].start + 1 : made.spaces["token"].start + slot, :letters] = torch.eye(letters)
    out = torch.zeros(made.d_head, 2 * made.half)
    out[:letters, made.spaces["out"]] = torch.eye(letters)
    made.head(3, 0, q=made.eye("asked") * SHARP, k=keys, v=values, out=out)
    for layer in range(4):
        made.decoy_head(layer, 1)
        if layer in (1, 2):
            made.decoy_head(layer, 0)
    made.decoy_mlp(3)
    made.unembed("out", 10.0, first=1)
    return made.save(folder)


def proportion(folder: Path, seed: int = 0) -> Path:
    """m0 says whether a token is marked; 1.0 averages that over the tokens of the asked kind in the same half."""
    from saelab.analysis.circuits.generators import SHARES

    vocab, places = 12, 9
    spaces = {"token": vocab, "place": places, "marked": 1, "share": 1}
    made = HandSet(spaces, n_layers=2, n_heads=2, d_head=32, hidden=8, n_ctx=places, seed=seed)
    made.embed()
    token, place = made.spaces["token"].start, made.spaces["place"].start
    made.unit(0, 0, made.direction("token", 2) + made.direction("token", 4), 0.0, made.direction("marked", 0))
    query, key, value = (torch.zeros(2 * made.half, made.d_head) for _ in range(3))
    for kind, (asked, plain) in enumerate(((5, 1), (6, 3))):
        query[token + asked, kind] = SHARP
        key[token + plain, kind] = key[token + plain + 1, kind] = 1
    for p in range(1, places):
        query[place + p, 2 + (p > 4)] = SHARP
        key[place + p, 2 + (p > 4)] = 1
    value[made.spaces["marked"].start, 0] = 1
    out = torch.zeros(made.d_head, 2 * made.half)
    out[0, made.spaces["share"]] = 1
    made.head(1, 0, q=query, k=key, v=value, out=out)
    # -(f - s)^2 up to f^2: linear in f, largest for the nearest share s. The final norm's bias supplies the constant.
    core = made.model.transformer
    constant = made.half - 1
    core.ln_f.bias[constant] = 1.0
    for i, share in enumerate(SHARES):
        made.model.lm_head.weight[7 + i] = made.direction("share", 0) * 80 * share
        made.model.lm_head.weight[7 + i, constant] = -40 * share**2
    made.model.lm_head.weight[:7, constant] = -60.0
    for layer in range(2):
        made.decoy_head(layer, 1)
    made.decoy_head(0, 0)
    made.decoy_mlp(1)
    return made.save(folder)


KNOWN: dict[str, Callable[[Path, int], Path]] = {
    "hand-induction": hand_induction,
    "reverse": reverse,
    "proportion": proportion,
}
"""Hand-set models by name."""


def write_known(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a hand-set model; ``seed`` draws the decoys. Raises :class:`ConfigError` for an unknown name."""
    if name not in KNOWN:
        raise ConfigError(f"no hand-set model '{name}'{nearest(name, KNOWN)} (known: {', '.join(KNOWN)})")
    with torch.no_grad():
        return KNOWN[name](Path(folder), seed)


def known_names() -> Sequence[str]:
    """Names of the hand-set models."""
    return tuple(KNOWN)
