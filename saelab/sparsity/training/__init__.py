"""Sparse training: a recipe is a choice along five axes, and one engine carries any recipe out.

The axes are keys of :class:`TrainingRecipe`, each in a file of pure functions of (out, in) tensors:

* ``score`` (:mod:`.scores`): which weights matter;
* ``pattern`` and ``sparsity`` (:mod:`saelab.sparsity.pattern`): which sets may stay;
* ``allocation`` (:mod:`saelab.sparsity.allocation`): how much each layer keeps;
* ``schedule`` (:mod:`.schedules`): when masks are made, and how sparse; drop-and-grow (:mod:`.grow`, :mod:`.swaps`);
* ``gradient`` (:mod:`.gradients`): what the forward pass sees of masked weights, and what gradient they receive.

:class:`SparseTraining` (:mod:`.engine`) takes the weights (:class:`Target`), a recipe, the optimiser and the number of
steps, and is called around each step of a loop (:class:`saelab.core.step_hook.StepHook`)::

    sparse = SparseTraining(targets_of_model(model), recipe, optimizer, steps)
    for step in range(steps):
        sparse.before_forward(step)      # masks that are due; effective weights in
        loss(model).backward()
        sparse.after_backward(step)      # stored weights back; gradients as the recipe wants them
        optimizer.step(); optimizer.zero_grad()
        sparse.after_step(step)
    sparse.finish()                      # effective weights for good
    sparse.write(folder)                 # masks.safetensors (bit-packed) and sparsity.json (counts)

To add a method: a ``Gradient`` (``forward``, ``backward`` on a ``View`` with a memory that checkpoints keep), a
``Schedule``, or a score, in the union of its file; it is then in every recipe, command and loop.
"""

from saelab.sparsity.training.engine import SparseTraining
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.sparsity.training.report import LayerCount, TrainingReport
from saelab.sparsity.training.target import Target, targets_of_matrices, targets_of_model

__all__ = [
    "LayerCount",
    "SparseTraining",
    "Target",
    "TrainingRecipe",
    "TrainingReport",
    "targets_of_matrices",
    "targets_of_model",
]
