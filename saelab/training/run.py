"""``Run``: one SAE in training, its optimiser and its counters. One call of :meth:`Run.step` is one optimiser step."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.core.errors import SaelabError
from saelab.sae import SAE, StepContext, TrainingPass
from saelab.training.config import FitConfig
from saelab.training.metrics import BatchSpread, Window
from saelab.training.schedule import k_factor, learning_rate, sparsity_factor
from saelab.training.sparse import sparse_training

FINAL_FRACTION = 0.1
"""Final metrics are those of this last part of the training."""


Objective = Callable[[SAE, Batch, StepContext], TrainingPass]
"""Losses of an SAE on a raw batch."""


def training_pass(sae: SAE, batch: Batch, context: StepContext) -> TrainingPass:
    """Return the SAE's own losses: the objective of ordinary training."""
    return sae.training_pass(sae.scale_batch(batch), context)


class Run:
    """State of one SAE's training."""

    def __init__(self, config: FitConfig, sae: SAE, device: torch.device, objective: Objective = training_pass) -> None:
        self.config, self.objective = config, objective
        self.sae = sae.to(device).train()
        t = config.training
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(), lr=t.peak_lr(sae.d_sae), betas=(t.beta1, t.beta2), eps=t.eps, fused=True
        )
        self.hook = sparse_training(config, self.sae, self.optimizer)
        self.steps = 0
        """Optimiser steps done."""
        self.tokens = 0
        """Tokens trained on."""
        self.unfired: Int[Tensor, " d_sae"] = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """Tokens since each feature fired."""
        self.window = Window(sae.config.d_out, device)
        self.final = Window(sae.config.d_out, device)
        self._device = device

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.steps >= self.config.training.steps

    def step(self, batch: Batch, spread: BatchSpread) -> None:
        """Train on one raw batch; ``spread`` is of its targets."""
        sae, training = self.sae, self.config.training
        lr = learning_rate(training, sae.d_sae, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.hook.before_forward(self.steps)
        passed = self.objective(sae, batch, self._context())
        loss = torch.stack(list(passed.losses.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self.hook.after_backward(self.steps)
        sae.before_step()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.hook.after_step(self.steps)
        sae.after_step()
        self.steps += 1
        self.tokens += batch.x.shape[0]
        active = self._note_fired(passed.code, batch.x.shape[0])
        error = passed.squared_error.double() * (batch.x.shape[0] / sae.input_scale**2)
        terms = {"loss": loss, **passed.losses, "grad_norm": norm, "squared_error": error, "active": active}
        self.window.add(spread, **terms)
        if self.steps > (1 - FINAL_FRACTION) * training.steps:
            self.final.add(spread, **terms)

    def metrics(self, window: Window) -> dict[str, float]:
        """Return the metrics of a window; a loss that is not finite ends the run with :class:`SaelabError`."""
        found = window.read()
        if found and not found["loss"] < float("inf"):
            raise SaelabError(
                f"run '{self.config.name}': the loss is not finite at step {self.steps}; lower training.lr "
                f"(now {self.config.training.peak_lr(self.sae.d_sae):g})"
            )
        dead = (self.unfired >= self.config.training.dead_after).double().mean()
        lr = learning_rate(self.config.training, self.sae.d_sae, max(self.steps - 1, 0))
        return {**found, "dead_fraction": float(dead), "lr": lr}

    def _context(self) -> StepContext:
        t = self.config.training
        dead = None
        if t.aux_coefficient and self.tokens >= t.dead_after:
            dead = (self.unfired >= t.dead_after).nonzero().squeeze(1)
        return StepContext(
            dead=dead,
            aux_k=min(t.aux_k or max(1, self.sae.d_in // 2), self.sae.d_sae),
            aux_coefficient=t.aux_coefficient,
            k_factor=k_factor(t, self.steps),
            sparsity_factor=sparsity_factor(t, self.steps),
            precision=t.precision,
        )

    def _clip(self) -> Float[Tensor, ""]:
        """Clip all gradients to the norm limit without reading the norm from a GPU; return the norm before."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.training.grad_clip is not None:
            factor = (self.config.training.grad_clip * self.sae.d_in / (norm + 1e-6)).clamp(max=1.0)
            if self._device.type != "cpu" or float(factor) < 1:
                torch._foreach_mul_(gradients, factor)
        return norm

    def _note_fired(self, code: SparseCode | None, n: int) -> Float[Tensor, ""]:
        """Count tokens since each feature fired; return the number of active entries."""
        assert code is not None
        fired = torch.zeros(self.sae.d_sae, device=self._device)
        fired.index_add_(0, code.indices, (code.values > 0).to(fired.dtype))
        self.unfired = torch.where(fired > 0, 0, self.unfired + n)
        return fired.sum(dtype=torch.float64)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next steps depend on: tensors, and JSON-able values."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors |= {f"hook.{name}": tensor for name, tensor in self.hook.state().items()}
        tensors["unfired"] = self.unfired
        for name, window in (("window", self.window), ("final", self.final)):
            tensors |= {f"{name}.{key}": tensor for key, tensor in window.state().items()}
        return tensors, {"steps": self.steps, "tokens": self.tokens}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Return to a state of :meth:`state`."""
        self.sae.load_state_dict(_below("sae", tensors))
        adam: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("adam", tensors).items():
            index, key = name.split(".", 1)
            adam.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.hook.load(_below("hook", tensors))
        self.unfired = tensors["unfired"].to(self._device)
        self.window.load(_below("window", tensors))
        self.final.load(_below("final", tensors))
        self.steps, self.tokens = int(values["steps"]), int(values["tokens"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
