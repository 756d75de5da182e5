"""Training metrics summed over a window of steps, on the device and in float64; read only when a line is logged."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class BatchSpread:
    """Mean and summed squared deviation of one batch's targets, shared by all runs that see the batch."""

    def __init__(self, target: Float[Tensor, "n d"]) -> None:
        self.n = target.shape[0]
        self.mean = target.mean(0).double()
        self.deviation = (target - self.mean.to(target.dtype)).square().sum().double()


class Window:
    """Sums since the last reset. Everything is in raw units; a run divides its scaled errors by s^2."""

    def __init__(self, d: int, device: torch.device) -> None:
        self._d, self._device = d, device
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.n = 0
        self.steps = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(self._d, dtype=torch.float64, device=self._device)
        self.sums: dict[str, Float64[Tensor, ""]] = {}

    def add(self, spread: BatchSpread, **terms: Tensor) -> None:
        """Take in one step: the spread of its targets and further terms to be summed."""
        total = self.n + spread.n
        gap = spread.mean - self.mean
        between = gap.square().sum() * (self.n * spread.n / total)
        self.mean = self.mean + gap * (spread.n / total)
        self.n, self.steps = total, self.steps + 1
        for name, value in {**terms, "deviation": spread.deviation + between}.items():
            detached = value.detach().double()
            self.sums[name] = self.sums[name] + detached if name in self.sums else detached

    def read(self) -> dict[str, float]:
        """Return means: ``fvu`` pooled over the window, ``l0`` per token, every other term per step."""
        if not self.n:
            return {}
        sums = {name: float(self.sums[name]) for name in sorted(self.sums)}  # a resumed run has them in another order
        error, active, deviation = sums.pop("squared_error"), sums.pop("active"), sums.pop("deviation")
        return {
            **{name: value / self.steps for name, value in sums.items()},
            "fvu": error / deviation if deviation > 0 else float("nan"),
            "l0": active / self.n,
        }

    def state(self) -> dict[str, Tensor]:
        """Return the sums as tensors for a checkpoint."""
        counts = torch.tensor([self.n, self.steps])
        return {"counts": counts, "mean": self.mean, **{f"sum.{name}": value for name, value in self.sums.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Return to the sums of :meth:`state`."""
        self.n, self.steps = (int(v) for v in state["counts"])
        self.mean = state["mean"].to(self._device)
        self.sums = {
            name.removeprefix("sum."): value.to(self._device)
            for name, value in state.items()
            if name.startswith("sum.")
        }
