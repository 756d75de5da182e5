"""``Portable``: a dictionary in the terms that all checkpoint formats share, between a peer's files and a saelab SAE.

    z     = (s x - b_dec) W_enc + b_enc            ``centered``; without it nothing is subtracted
    f     = TopK(relu(z))                          "topk"
          | relu(z) [z > threshold]                "jumprelu"
          | relu(z)                                "relu"
          | relu(e^r_mag (z - b_enc) + b_mag) [z > 0]     "gated" (b_enc is the gate's bias)
    x_hat = (f W_dec + b_dec) / s + x W_skip       s = ``input_scale``

The folds below change the tensors and not the function. They are computed in float64 and stored in float32.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.config import parse_config
from saelab.core.errors import FormatError
from saelab.sae.base import SAE
from saelab.sae.registry import ARCHITECTURES, build_sae

Kind = Literal["topk", "jumprelu", "relu", "gated"]
TRANSCODER, BATCH_TOPK, MATRYOSHKA = "transcoder", "mutual_choice", "matryoshka"
_INFER_TOPK = ("topk", TRANSCODER, "gradient")
_WITH_K = (*_INFER_TOPK, BATCH_TOPK, MATRYOSHKA)
MIN_NORM = 1e-8
"""Decoder rows shorter than this count as this long where norms are divided by, as in SAELens."""


@dataclass(frozen=True, eq=False)
class Portable:
    """Tensors in float32 on the CPU; see the module's docstring for the equations."""

    kind: Kind
    """How activations follow from pre-activations."""
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    k: float | None = None
    """Features per token ("topk"); of a "jumprelu" that was trained as BatchTopK, on average."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """In scaled units ("jumprelu")."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Bias of the magnitudes ("gated")."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Log of the ratio of magnitude weights to gate weights ("gated")."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """Linear path around the dictionary, of a skip transcoder; applied to raw x."""
    prefixes: tuple[int, ...] | None = None
    """Sizes of the nested dictionaries of a BatchTopK that was trained as Matryoshka; the last is d_sae."""
    centered: bool = True
    """Whether ``b_dec`` is subtracted from the input."""
    transcoder: bool = False
    """Whether the reconstruction is of another site than the input."""
    input_scale: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    """Where it came from and what its files said about its training."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    # Folds -----------------------------------------------------------------------------------------------------------

    def with_centered(self, centered: bool) -> "Portable":
        """Subtract b_dec from the input, or not; the difference goes into the encoder's biases."""
        if self.centered == centered:
            return self
        if self.W_enc.shape[0] != self.b_dec.shape[0]:
            raise FormatError(
                f"b_dec has {self.b_dec.shape[0]} entries and the input {self.d_in}; it cannot be subtracted from it"
            )
        sign = 1.0 if centered else -1.0
        shift = sign * (self.b_dec.double() @ self.W_enc.double())
        b_mag = self.b_mag
        if self.b_mag is not None and self.r_mag is not None:
            b_mag = (self.b_mag.double() + self.r_mag.double().exp() * shift).float()
        return replace(self, b_enc=(self.b_enc.double() + shift).float(), b_mag=b_mag, centered=centered)

    def with_decoder_norms_folded(self) -> "Portable":
        """Give decoder rows norm 1 and multiply pre-activations by what the norms were, so activations change unit.

        This is what ranking or thresholding ``z ||W_dec||`` means ("rescale_acts_by_decoder_norm"): apply it to files
        whose threshold is already in those units.
        """
        norms = self.W_dec.double().norm(dim=1).clamp(min=MIN_NORM)
        return replace(
            self,
            W_enc=(self.W_enc.double() * norms).float(),
            b_enc=(self.b_enc.double() * norms).float(),
            b_mag=None if self.b_mag is None else (self.b_mag.double() * norms).float(),
            W_dec=(self.W_dec.double() / norms.unsqueeze(1)).float(),
        )

    def with_scale_in_weights(self) -> "Portable":
        """Fold s as SAELens does: ``W_enc s``, ``W_dec / s``, ``b_dec / s``. Activations keep their scaled units."""
        s = self.input_scale
        return replace(self, W_enc=self.W_enc * s, W_dec=self.W_dec / s, b_dec=self.b_dec / s, input_scale=1.0)

    def with_scale_in_biases(self) -> "Portable":
        """Fold s as dictionary_learning and OpenMOSS do: biases and thresholds / s. Activations become 1/s times.

        Decoder rows keep their norm.
        """
        s = self.input_scale
        return replace(
            self,
            b_enc=self.b_enc / s,
            b_dec=self.b_dec / s,
            threshold=None if self.threshold is None else self.threshold / s,
            b_mag=None if self.b_mag is None else self.b_mag / s,
            input_scale=1.0,
        )

    def with_affine_input(
        self,
        mean: Float[Tensor, " d_in"],
        matrix: Float[Tensor, "d_in d_in"],
        inverse: Float[Tensor, "d_in d_in"],
    ) -> "Portable":
        """Fold a whitening ``(x - mean) @ matrix`` of the input and its inverse on the reconstruction."""
        centered = self.with_centered(True)
        mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
        return replace(
            centered,
            W_enc=(matrix @ centered.W_enc.double()).float(),
            W_dec=(centered.W_dec.double() @ inverse).float(),
            b_dec=(centered.b_dec.double() @ inverse + mean).float(),
        )

    # The function itself ---------------------------------------------------------------------------------------------

    def dense(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n d_out"]]:
        """Return activations and reconstructions by the equations above, densely: what an import is checked against."""
        scaled = x * self.input_scale
        pre = (scaled - self.b_dec if self.centered else scaled) @ self.W_enc + self.b_enc
        acts = pre.relu()
        if self.kind == "topk":
            assert self.k is not None
            values, indices = acts.topk(int(self.k), dim=1)
            acts = torch.zeros_like(acts).scatter_(1, indices, values)
        elif self.kind == "jumprelu":
            assert self.threshold is not None
            acts = acts * (pre > self.threshold)
        elif self.kind == "gated":
            assert self.b_mag is not None
            assert self.r_mag is not None
            acts = ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu() * (pre > 0)
        recon = (acts @ self.W_dec + self.b_dec) / self.input_scale
        return acts, recon if self.W_skip is None else recon + x @ self.W_skip

    # To and from saelab ----------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        """Name of the saelab architecture that holds it."""
        if self.transcoder:
            return TRANSCODER
        if self.batch_topk:
            return MATRYOSHKA if self.prefixes else BATCH_TOPK
        return self.kind

    @property
    def batch_topk(self) -> bool:
        """Whether it was trained as BatchTopK: one threshold for all features, and an average k."""
        if self.kind != "jumprelu" or self.k is None or self.threshold is None:
            return False
        return bool((self.threshold == self.threshold[0]).all() and self.threshold[0] >= 0)

    def to_sae(self, device: str = "cpu") -> SAE:
        """Return it as a saelab SAE, in evaluation mode and without gradients.

        Raises :class:`FormatError` when this version has no such architecture.
        """
        name = self.architecture
        if name not in ARCHITECTURES:
            raise FormatError(
                f"this checkpoint is a {name} SAE, an architecture this version of saelab does not have "
                f"(it has: {', '.join(ARCHITECTURES)})"
            )
        cls = ARCHITECTURES[name].config
        fields = {
            "architecture": name,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_target": self.W_dec.shape[1],
            "k": int(self.k) if self.kind == "topk" and self.k is not None else self.k,
            "input_scale": self.input_scale,
            "skip": self.W_skip is not None,
        }
        if self.prefixes:
            fields["prefixes"] = [size / self.d_sae for size in self.prefixes]
        config = parse_config(cls, {key: fields[key] for key in fields if key in cls.model_fields}, "imported SAE")
        sae = build_sae(config, seed=None)
        self.with_centered(sae.center is not None)._load_into(sae)
        return sae.to(device).eval().requires_grad_(False)

    def _load_into(self, sae: SAE) -> None:
        """Copy the tensors; buffers that only training needs keep their initial values."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_mag", "r_mag", "W_skip")
        have = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.architecture in (BATCH_TOPK, MATRYOSHKA):
            assert self.threshold is not None
            sae.set_threshold(float(have.pop("threshold")[0]))  # type: ignore[operator]
        own = sae.tensors()
        wanted = own.keys() - {name for name, _ in sae.named_buffers()} | {"threshold"} & own.keys()
        if not wanted <= have.keys() <= own.keys():
            raise FormatError(
                f"this checkpoint holds {', '.join(sorted(have))}; the architecture {self.architecture} is made of "
                f"{', '.join(sorted(own))}"
            )
        sae.load_tensors(own | have)

    @staticmethod
    def from_sae(sae: SAE) -> "Portable":
        """Return a saelab SAE's inference behaviour; whatever has a threshold becomes a JumpReLU.

        Raises :class:`FormatError` for an architecture whose inference no format can hold.
        """
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in sae.tensors().items()}
        name = sae.config.architecture
        threshold = sae.threshold
        if "r_mag" in tensors:
            kind: Kind = "gated"
        elif name in _INFER_TOPK:
            kind = "topk"
        elif threshold is not None:
            kind = "jumprelu"
        elif name in ("relu", "contrastive"):
            kind = "relu"
        else:
            raise FormatError(f"no other library's format can hold the architecture '{name}'; save it with save_sae")
        return Portable(
            kind=kind,
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            k=float(sae.config.k) if name in _WITH_K and hasattr(sae.config, "k") else None,
            threshold=_per_feature(threshold, sae.d_sae) if kind == "jumprelu" and threshold is not None else None,
            b_mag=tensors.get("b_mag"),
            r_mag=tensors.get("r_mag"),
            W_skip=tensors.get("W_skip"),
            prefixes=tuple(sae.config.sizes) if hasattr(sae.config, "sizes") else None,
            centered=sae.center is not None,
            transcoder=name == TRANSCODER,
            input_scale=sae.input_scale,
            meta={"architecture": name},
        )


def _per_feature(threshold: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    return threshold.detach().cpu().float().expand(d_sae).contiguous()
