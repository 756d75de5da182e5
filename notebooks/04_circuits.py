# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Finding a circuit, and checking it by ablation
#
# The embedded model recalls names: after `def __init__(self, A, B):` it continues `self.A =` with `A`. Which heads do
# that? The notebook finds a circuit of edges with an attribution method, and then does what attribution only
# predicts: it takes heads out of the running model and looks.

# %%
import numpy as np
import pandas as pd
import torch

import saelab
from saelab.analysis.circuits.tasks import task_batch

TASK = "recall"
model = saelab.load_model("embedded")
batch = task_batch(TASK, model, 64, seed=1, split="heldout")
print(batch.texts[0])

# %% [markdown]
# Can the model do the task at all? Without this, a circuit explains nothing.


# %%
def scores(replace=None):
    """Logit of the right answer minus that of the wrong one, and whether the right one is the larger."""
    logits = model.logits(batch.clean, replace=replace)[torch.arange(len(batch)), batch.readout]
    right, wrong = (logits.gather(1, side[:, :1])[:, 0] for side in (batch.right, batch.wrong))
    return float((right - wrong).mean()), float((right > wrong).float().mean())


clean = scores()
print(f"logit difference {clean[0]:.2f}, right before wrong on {clean[1]:.0%} of held-out prompts")
assert clean[1] > 0.9

# %% [markdown]
# ## Find
#
# Edge attribution patching with integrated gradients scores every edge between heads and MLPs; the circuit is the
# smallest set of best edges that keeps 80 % of the logit difference on the prompts it was found on. It is judged on
# others, beside random circuits of the same size.

# %%
circuit = saelab.circuits.find(TASK, model, n=64, n_heldout=64, out="runs/circuit", force=True)
circuit

# %%
circuit.plot()

# %%
circuit.to_frame().head(10)

# %% [markdown]
# Random circuits are a weak control, since a random set of edges seldom connects input to output. The number to look
# at is the faithfulness on held-out prompts, and that of everything *but* the circuit:

# %%
print(f"circuit {circuit.faithfulness:.2f}, all other edges {circuit.completeness:.2f}")
print("heads:", circuit.heads, " MLPs:", circuit.mlps)

# %% [markdown]
# ## Check: take heads out
#
# A head's output at `attn.hook_z` is a slice of a vector. Replace it by its mean over the batch (not by zero: a zero
# is something the model never sees), and measure the task again, a head at a time.


# %%
def without(heads):
    """Functions that put the mean over prompts and positions in the place of some heads' outputs."""
    by_layer = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def replace(layer):
        site = f"blocks.{layer}.attn.hook_z"
        slices = [model.head_slices(site)[head] for head in by_layer[layer]]

        def visit(z):
            z = z.clone()
            for part in slices:
                z[..., part] = z[..., part].mean((0, 1))
            return z

        return site, visit

    return dict(replace(layer) for layer in by_layer)


def parse(name):
    """Turn ``a1.h0`` into (1, 0)."""
    layer, head = name[1:].split(".h")
    return int(layer), int(head)


n_heads = len(model.head_slices("blocks.0.attn.hook_z"))
every = [(layer, head) for layer in range(model.n_layers) for head in range(n_heads)]
inside = {parse(name) for name in circuit.heads}
rows = []
for layer, head in every:
    difference, right = scores(without([(layer, head)]))
    rows.append({"head": f"{layer}.{head}", "in circuit": (layer, head) in inside, "logit difference": difference,
                 "right": right})  # fmt: skip
alone = pd.DataFrame(rows).sort_values("logit difference").reset_index(drop=True)
alone.head(10)

# %% [markdown]
# And together: all heads of the circuit, against as many heads drawn from the others, twenty times.

# %%
rng = np.random.default_rng(0)
outside = [pair for pair in every if pair not in inside]
size = min(len(inside), len(outside))
together = scores(without(inside))
drawn = [scores(without([outside[i] for i in rng.choice(len(outside), size, replace=False)])) for _ in range(20)]
print(f"untouched                    {clean[0]:6.2f} {clean[1]:6.0%}")
print(f"without the circuit's {len(inside):2d}     {together[0]:6.2f} {together[1]:6.0%}")
print(
    f"without {size:2d} others, mean of 20 {np.mean([d for d, _ in drawn]):6.2f} {np.mean([r for _, r in drawn]):6.0%}"
)
print(f"worst of these               {min(d for d, _ in drawn):6.2f}")
assert together[0] < min(d for d, _ in drawn)

# %% [markdown]
# The heads of the circuit matter more than any drawn set of others. That the single-head table does not rank exactly
# as the attribution does is no error: heads back each other up, and an attribution is a first-order statement.
#
# ## Features instead of heads
#
# The same question with SAE features as nodes. The SAE's own error is a node too; when it carries much of the effect,
# the features do not explain the task.

# %%
SITE = "blocks.2.hook_resid_post"
store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)
trained = saelab.train(
    "demo-topk.yaml", store=store, sae={"d_sae": 1024}, training={"tokens": 400_000}, out="runs/circuit-sae", force=True
)
found = saelab.circuits.features(trained, TASK, model=model, n=16, n_heldout=16, n_exact=10)
found

# %%
found.to_frame()[["node", "effect", "exact"]].head(10)

# %% [markdown]
# `effect` is predicted, `exact` measured by running the model with that one node replaced: the check comes with the
# result. The curve shows what the model still does with only the nodes above a threshold, beside random nodes.

# %%
found.curve_frame()

# %%
nodes = found.to_frame()
share = nodes.loc[nodes["index"] == "error", "effect"].abs().sum() / nodes["effect"].abs().sum()
print(f"{share:.0%} of the shown effect is the SAE's error")
