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
# other text need not be the one it was trained for. And the two seeds of TopK show how far apart two points may lie
# for no reason at all:

# %%
spread = abs(evaluations["topk"].fvu - evaluations["seed 1"].fvu)
print(f"FVU of TopK, two seeds: {evaluations['topk'].fvu:.4f}, {evaluations['seed 1'].fvu:.4f} (apart by {spread:.4f})")

# %% [markdown]
# ## Are they the same features?
#
# `compare` matches features one to one, by decoder direction and by activation on the same tokens, beside what chance
# gives. First the control, two seeds of TopK; then TopK and the others.

# %%
text = {"max_tokens": 8_000, "targets": 0}
pairs = {name: saelab.compare(trained["topk"], other, **text) for name, other in
         {"topk, another seed": seed, **{n: t for n, t in trained.items() if n != "topk"}}.items()}  # fmt: skip
pairs["topk, another seed"].plot()

# %%
rows = []
for name, found in pairs.items():
    numbers = found.to_dict()
    rows.append(
        {
            "topk and": name,
            "decoder cosine, matched": numbers["decoders"]["mean_matched"],
            "best by chance": numbers["decoder_baseline"]["mean_best_a_to_b"],
            "correlation, matched": numbers["activations"]["mean_matched"],
        }
    )
pd.DataFrame(rows)

# %% [markdown]
# If another architecture matches TopK about as well as another seed of TopK does, the architecture did not change
# what is found, whatever its name promises. After so short a training most decoder rows have hardly moved from where
# they started, and two SAEs of one seed start alike: a high decoder cosine between architectures of the same seed is
# partly that. The correlation of activations does not have this flaw to the same degree; trained longer, it is the
# number to trust.
#
# ## What this does not show
#
# One model, one site, one width, a few hundred thousand tokens. The ranking of architectures changes with all of
# them; `docs/quality.md` has longer runs.
