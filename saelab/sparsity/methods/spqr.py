"""SpQR: few bits for nearly all weights, many for the few that matter (Dettmers et al. 2023, arXiv 2306.03078).

Weights are quantised column by column with the error made up for by the columns to the right (as GPTQ and SparseGPT
do), in groups of ``group`` inputs of one output row with a scale and a zero each; scales and zeros are quantised again,
16 neighbouring rows together. Weights whose quantisation would cost most, (w - q(w))^2 / [H^-1]_jj, stay in
16 bits in CSR. GQSA (Zeng et al. 2024, arXiv 2412.17560) drops whole groups too: those with the least sum of squared
Wanda scores.

Our design: the outlier threshold is the quantile that gives the ``outliers`` share, and both quantised levels are plain
min-max grids.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor

from saelab.core.errors import ConfigError
from saelab.sparsity.methods.base import Method, Pruned
from saelab.sparsity.methods.sparsegpt import inverse_factor
from saelab.sparsity.methods.wanda import wanda_score
from saelab.sparsity.pattern import Pattern, keep_largest, require_share
from saelab.sparsity.statistics import InputStatistics

SECOND = 16
"""Rows whose scales (and zeros) for a group of inputs are quantised together."""


class SpQR(Method):
    """Quantise to ``bits`` with 16-bit outliers; the folder holds the dequantised weights and the codes."""

    name: Literal["spqr"] = "spqr"
    need = "gram"
    patterned = False
    bits: int = Field(default=3, ge=2, le=8)
    """Bits of a weight."""
    second_bits: int = Field(default=3, ge=2, le=8)
    """Bits of a scale and of a zero."""
    group: int = Field(default=16, ge=2)
    """Inputs that share a scale."""
    outliers: float = Field(default=0.01, ge=0, lt=1)
    """Share of the weights kept in 16 bits."""
    dropped: float = Field(default=0.0, ge=0, lt=1)
    """Share of the groups dropped whole (GQSA); 0 is SpQR."""
    damping: float = Field(default=0.01, gt=0)
    """lambda of the Hessian, as a share of its mean diagonal."""

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Quantise one layer."""
        assert inputs is not None
        if weight.shape[1] % self.group:
            raise ConfigError(
                f"groups of {self.group} do not divide a layer of {weight.shape[1]} inputs; choose a group that does, "
                "or exclude the layer"
            )
        work = weight.clone()
        there = self._groups_that_stay(work, inputs)
        factor = inverse_factor(inputs.gram, self.damping).float()
        loud = self._outliers(work, there, factor)
        layer = self._quantise(work, there, loud, factor)
        new = layer.dequantised()
        mask = there
        return Pruned(new, mask, {"bits_per_weight": layer.bits_per_weight()}, layer.tensors())

    def _groups_that_stay(self, weight: Tensor, inputs: InputStatistics) -> Bool[Tensor, "out in"]:
        score = wanda_score(weight, inputs).square().view(weight.shape[0], -1, self.group).sum(2)
        gone = round(require_share(self.dropped) * score.numel())
        kept = keep_largest(score.reshape(1, -1), score.numel() - gone).view(score.shape)
        return kept.repeat_interleave(self.group, dim=1)

    def _outliers(self, weight: Tensor, there: Tensor, factor: Tensor) -> Bool[Tensor, "out in"]:
        grid = fit(weight.view(-1, self.group), self.bits)
        rounded = grid.value(grid.code(weight.view(-1, self.group))).view(weight.shape)
        cost = (weight - rounded).square() / factor.diagonal().square()
        cost = torch.where(there, cost, torch.full_like(cost, -1.0))
        return keep_largest(cost.reshape(1, -1), round(self.outliers * cost.numel())).view(cost.shape) & there

    def _quantise(self, weight: Tensor, there: Tensor, loud: Tensor, factor: Tensor) -> "QuantisedLayer":
        work, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.uint8)
        scales, zeros = [], []
        for begin in range(0, weight.shape[1], self.group):
            part = slice(begin, begin + self.group)
            exact = fit(work[:, part], self.bits, there[:, part] & ~loud[:, part])
            scales.append(Level.of(exact.scale[None], self.second_bits))
            zeros.append(Level.of(exact.zero[None], self.second_bits))
            grid = Grid(scales[-1].values()[0], zeros[-1].values()[0], 2**self.bits)
            for j in range(begin, begin + self.group):
                code = grid.code(work[:, j : j + 1])
                codes[:, j] = code[:, 0].to(torch.uint8)
                rounded = torch.where(loud[:, j], work[:, j].half().float(), grid.value(code)[:, 0])
                rounded = torch.where(there[:, j], rounded, torch.zeros_like(rounded))
                error = (work[:, j] - rounded) / factor[j, j]
                work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        return QuantisedLayer(
            codes=codes,
            there=there,
            loud=loud,
            loud_values=work[loud].half(),
            scales=Level.joined(scales),
            zeros=Level.joined(zeros),
            bits=self.bits,
            group=self.group,
        )


class Grid:
    """A scale and a zero per row: code c stands for (c - zero) scale."""

    def __init__(self, scale: Float[Tensor, " rows"], zero: Float[Tensor, " rows"], levels: int) -> None:
        self.scale, self.zero, self._top = scale, zero, levels - 1

    def code(self, values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return the nearest code of each value."""
        return (values / self.scale[:, None] + self.zero[:, None]).round().clamp(0, self._top)

    def value(self, code: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return what codes stand for."""
        return (code - self.zero[:, None]) * self.scale[:, None]


def fit(values: Float[Tensor, "rows n"], bits: int, within: Bool[Tensor, "rows n"] | None = None) -> Grid:
    """Return the min-max grid of each row over the entries ``within`` (and over zero)."""
    seen = values if within is None else torch.where(within, values, torch.zeros_like(values))
    low, high = seen.amin(1).clamp_max(0.0), seen.amax(1).clamp_min(0.0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return Grid(scale, -low / scale, 2**bits)


class Level:
    """Numbers (groups, rows) in ``bits`` bits; :data:`SECOND` rows of a group share a 16-bit scale and low end."""

    def __init__(self, codes: UInt8[Tensor, "g rows"], scale: Tensor, low: Tensor, bits: int) -> None:
        self.codes, self.scale, self.low, self.bits = codes, scale, low, bits

    @staticmethod
    def of(values: Float[Tensor, "g rows"], bits: int) -> "Level":
        """Quantise; the step is at least 1e-7 so that it is no zero in 16 bits."""
        groups, rows = values.shape
        filled = torch.cat([values, values[:, -1:].expand(-1, -rows % SECOND)], 1).view(groups, -1, SECOND)
        low = filled.amin(2).half()
        scale = ((filled.amax(2) - low.float()) / (2**bits - 1)).clamp_min(1e-7).half()
        codes = ((filled - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
        return Level(codes.view(groups, -1)[:, :rows].to(torch.uint8), scale, low, bits)

    @staticmethod
    def joined(parts: list["Level"]) -> "Level":
        """Put groups one after the other."""
        codes, scale, low = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scale", "low"))
        return Level(codes, scale, low, parts[0].bits)

    def values(self) -> Float[Tensor, "g rows"]:
        """Dequantise."""
        rows = self.codes.shape[1]
        scale, low = (part.float().repeat_interleave(SECOND, 1)[:, :rows] for part in (self.scale, self.low))
        return self.codes.float() * scale + low

    def stored_bits(self, there: int) -> int:
        """Bits on disk: the codes of the ``there`` numbers that are used, and 16 for each scale and low end."""
        return there * self.bits + 16 * (self.scale.numel() + self.low.numel())


class QuantisedLayer:
    """A layer as SpQR stores it."""

    def __init__(
        self,
        *,
        codes: Tensor,
        there: Tensor,
        loud: Tensor,
        loud_values: Tensor,
        scales: Level,
        zeros: Level,
        bits: int,
        group: int,
    ) -> None:
        self.codes, self.there, self.loud, self.loud_values = codes, there, loud, loud_values
        self.scales, self.zeros, self.bits, self.group = scales, zeros, bits, group

    def dequantised(self) -> Float[Tensor, "out in"]:
        """Return the weights that a model runs with."""
        scale = self.scales.values().T.repeat_interleave(self.group, 1)
        zero = self.zeros.values().T.repeat_interleave(self.group, 1)
        weight = (self.codes.float() - zero) * scale
        weight[self.loud] = self.loud_values.float()
        return torch.where(self.there, weight, torch.zeros_like(weight))

    def bits_per_weight(self) -> float:
        """True storage per weight: codes of the groups that are there, second level, outliers (value, column) and rows.

        A dropped group costs one bit (whether it is there), counted for all groups when any is dropped, and its part of
        the 16-bit numbers that :data:`SECOND` rows share.
        """
        rows, columns = self.codes.shape
        groups = rows * columns // self.group
        there = int(self.there.sum()) // self.group
        second = self.scales.stored_bits(there) + self.zeros.stored_bits(there)
        flags = groups if there < groups else 0
        outliers = int(self.loud.sum()) * (16 + 16) + 32 * (rows + 1)
        return (there * self.group * self.bits + second + flags + outliers) / self.codes.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored: codes as packed bits, so that a file is as small as :meth:`bits_per_weight` says."""
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), self.loud.sum(1).cumsum(0)])
        rows, columns = self.codes.shape
        groups = self.there[:, :: self.group]
        return {
            "layout": torch.tensor([rows, columns, self.bits, self.scales.bits, self.group]),
            "groups": pack_bits(groups.to(torch.uint8), 1),
            "codes": pack_bits(self.codes[self.there], self.bits),
            "scale_codes": pack_bits(self.scales.codes[groups.T], self.scales.bits),
            "scale_scale": self.scales.scale,
            "scale_low": self.scales.low,
            "zero_codes": pack_bits(self.zeros.codes[groups.T], self.zeros.bits),
            "zero_scale": self.zeros.scale,
            "zero_low": self.zeros.low,
            "outlier_rows": crow.int(),
            "outlier_columns": self.loud.nonzero()[:, 1].to(torch.int16 if columns < 2**15 else torch.int32),
            "outlier_values": self.loud_values,
        }

    @staticmethod
    def from_tensors(stored: Mapping[str, Tensor]) -> "QuantisedLayer":
        """Read back what :meth:`tensors` stored; :meth:`dequantised` then gives the model's weights bit for bit."""
        rows, columns, bits, second, group = stored["layout"].tolist()
        groups = unpack_bits(stored["groups"], 1, (rows, columns // group)).bool()
        there = groups.repeat_interleave(group, 1)
        loud = torch.zeros(rows, columns, dtype=torch.bool)
        counts = stored["outlier_rows"].long().diff()
        loud[torch.arange(rows).repeat_interleave(counts), stored["outlier_columns"].long()] = True
        levels = [
            Level(
                unpack_where(stored[f"{name}_codes"], second, groups.T),
                stored[f"{name}_scale"],
                stored[f"{name}_low"],
                second,
            )
            for name in ("scale", "zero")
        ]
        return QuantisedLayer(
            codes=unpack_where(stored["codes"], bits, there),
            there=there,
            loud=loud,
            loud_values=stored["outlier_values"],
            scales=levels[0],
            zeros=levels[1],
            bits=bits,
            group=group,
        )


def pack_bits(codes: UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, "bits packed"]:
    """Return numbers below ``2**bits`` as ``bits`` planes of one bit a number, eight to a byte."""
    flat = codes.reshape(-1).numpy()
    return torch.from_numpy(np.stack([np.packbits((flat >> plane) & 1) for plane in range(bits)]))


def unpack_bits(planes: UInt8[Tensor, "bits packed"], bits: int, shape: tuple[int, int]) -> UInt8[Tensor, "a b"]:
    """Undo :func:`pack_bits`."""
    count = shape[0] * shape[1]
    flat = np.zeros(count, dtype=np.uint8)
    for plane in range(bits):
        flat |= np.unpackbits(planes[plane].numpy(), count=count) << plane
    return torch.from_numpy(flat).view(shape)


def unpack_where(planes: UInt8[Tensor, "bits packed"], bits: int, where: Bool[Tensor, "a b"]) -> UInt8[Tensor, "a b"]:
    """Undo :func:`pack_bits` of the numbers ``where`` it is true; 0 elsewhere."""
    codes = torch.zeros(where.shape, dtype=torch.uint8)
    codes[where] = unpack_bits(planes, bits, (1, int(where.sum())))[0]
    return codes
