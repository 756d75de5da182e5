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
# # 2. Comparing architectures
#
# Which SAE should one train? This notebook trains four on the same activations, puts them on one plot, and then asks
# whether they find the same features, beside two runs of one architecture that differ by their seed alone. Without
# that control, a difference between architectures says nothing.

# %%
import pandas as pd

import saelab
from saelab.analysis.figures import pareto

SITE = "blocks.2.hook_resid_post"
model = saelab.load_model("embedded")
store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)

# %% [markdown]
# ## Train
#
# All have 512 features and see the same tokens in the same order. TopK keeps k features at every token; BatchTopK
# (`mutual_choice`) shares `k` per token out over a batch; Matryoshka also makes some prefixes of the features
# reconstruct by themselves; JumpReLU learns a threshold per feature, under a penalty that aims at a number of active
# features.

# %%
training = {"tokens": 300_000, "batch_size": 2048, "lr": 1e-3}
choices = {
    "topk": {"architecture": "topk", "k": 24},
    "batchtopk": {"architecture": "mutual_choice", "k": 24},
    "matryoshka": {"architecture": "matryoshka", "k": 24, "prefixes": [0.125, 0.375, 1]},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 24},
}
trained = {}
for name, sae in choices.items():
    trained[name] = saelab.train(
        {"site": SITE}, store=store, sae={"d_sae": 512, **sae}, training=training, out=f"runs/{name}", force=True
    )

# %% [markdown]
# TopK twice more: at other sparsities, as a grid on one pass over the data, and with another seed.

# %%
topk = {"architecture": "topk", "d_sae": 512}
grid = saelab.train(
    {"site": SITE},
    store=store,
    sae=topk,
    training=training,
    grid={"sae.k": [8, 16, 48]},
    out="runs/topk-grid",
    force=True,
)
seed = saelab.train(
    {"site": SITE},
    store=store,
    sae={**topk, "k": 24},
    training={**training, "seed": 1},
    out="runs/topk-seed1",
    force=True,
)
grid

# %% [markdown]
# ## Measure on held-out text

# %%
runs = {name: run[0] for name, run in trained.items()} | {f"topk {run.name}": run for run in grid} | {"seed 1": seed[0]}
evaluations = {name: saelab.evaluate(run, model=model, max_tokens=5_000) for name, run in runs.items()}
frame = pd.concat([e.to_frame().assign(name=name) for name, e in evaluations.items()], ignore_index=True)
frame = frame.rename(columns={"sae": "architecture"})
frame[["name", "architecture", "l0", "fvu", "ce_recovered", "dead_fraction"]].sort_values("l0")

# %%
figure, drawn = pareto(frame, "fvu", "FVU on held-out text")
figure

# %% [markdown]
# Read this with care. The points differ in L0, and more active features always reconstruct better: only points at one
# L0 can be compared, or curves. `batchtopk` uses at inference a threshold that it learned in training, so its L0 on
# other text need not be the one it was trained for; a JumpReLU SAE is still on the way to its target. And the two
# seeds of TopK show how far apart two points may lie for no reason at all:

# %%
spread = abs(evaluations["topk"].fvu - evaluations["seed 1"].fvu)
print(f"FVU of TopK, two seeds: {evaluations['topk'].fvu:.4f}, {evaluations['seed 1'].fvu:.4f} (apart by {spread:.4f})")

# %% [markdown]
# ## Are they the same features?
#
# `compare` matches features one to one, by decoder direction and by activation on the same tokens, beside what chance
# gives. One trap first: SAEs of one seed start from the same random directions, and after short training features
# that started alike still are. So everything is compared with the TopK of seed 1: the TopK of seed 0 (the control),
# and the others of seed 0. The last row shows what the trap would have looked like.

# %%
text = {"max_tokens": 8_000, "targets": 0}
pairs = {f"topk (seed 1), {name} (seed 0)": saelab.compare(seed, other, **text) for name, other in trained.items()}
pairs["topk, batchtopk, same seed"] = saelab.compare(trained["topk"], trained["batchtopk"], **text)
pairs["topk (seed 1), topk (seed 0)"].plot()

# %%
rows = []
for name, found in pairs.items():
    numbers = found.to_dict()
    rows.append(
        {
            "pair": name,
            "decoder cosine, matched": numbers["decoders"]["mean_matched"],
            "best by chance": numbers["decoder_baseline"]["mean_best_a_to_b"],
            "correlation, matched": numbers["activations"]["mean_matched"],
        }
    )
pd.DataFrame(rows)

# %% [markdown]
# If another architecture matches TopK about as well as another seed of TopK does, the architecture did not change
# what is found, whatever its name promises. And if even the control is low, as after so short a training, two SAEs
# agree on little at all: a feature of one of them is not yet a fact about the model.
#
# ## What this does not show
#
# One model, one site, one width, a few hundred thousand tokens. The ranking of architectures changes with all of
# them; `docs/quality.md` has longer runs.
