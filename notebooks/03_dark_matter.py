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
# # 3. Dark matter: what an SAE misses
#
# Engels, Smith and Tegmark (2024) found that much of an SAE's error can be predicted linearly from its input, and
# that the rest behaves differently. This notebook repeats their decomposition on the embedded model with SAEs of four
# widths. Where the paper's findings hold here and where they do not is printed, not assumed: these are small SAEs of
# a small model.

# %%
import saelab
from saelab.analysis.dark_matter.prompt import error_of_prompt

SITE = "blocks.2.hook_resid_post"
model = saelab.load_model("embedded")
store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)

# %% [markdown]
# ## A ladder of SAEs
#
# Four widths with the same k, trained together on one pass over the data.

# %%
ladder = saelab.train(
    {"site": SITE},
    store=store,
    sae={"architecture": "topk", "d_sae": 128, "k": 16},
    training={"tokens": 300_000, "batch_size": 2048, "lr": 1e-3},
    grid={"sae.d_sae": [128, 256, 512, 1024]},
    out="runs/ladder",
    force=True,
)
ladder.to_frame()[["name", "fvu", "l0", "dead_fraction"]]

# %% [markdown]
# ## Error on other text
#
# An SAE's error is smaller on what it was trained on, so the activations come from the held-out files. Half of the
# contexts fit the linear maps, the other half is what everything is measured on.

# %%
heldout = saelab.harvest(model, SITE, text="stdlib:heldout", max_tokens=40_000, out="runs/heldout-store", resume=True)
result = saelab.dark_matter(
    ladder["d_sae=512"],
    heldout,
    model=model,
    ladder=[run.path for run in ladder],
    max_tokens=40_000,
    downstream_tokens=3_000,
    pursuit_tokens=1_000,
    synthetic_tokens=4_000,
    error_saes={"tokens": 0},
    out="runs/dark-matter",
    force=True,
)
result

# %%
result.to_frame()[["name", "l0", "fvu", "fvu_linear", "fvu_nonlinear", "r2", "r2_shuffled"]]

# %% [markdown]
# The error `e = x - x_hat` is split into `l`, what a linear map of x predicts of it, and `eta`, the rest. `r2` is the
# share that is predicted; `r2_shuffled` is the same fit to the errors of other tokens, which should give nothing.

# %%
result.plot("fvu")

# %%
result.plot("scaling") if "scaling" in result.figures() else print("too few widths for a scaling law")

# %% [markdown]
# ## The paper's findings, held against this run

# %%
result.frames()["findings"]

# %% [markdown]
# Each row gives what was measured here, the control, and whether the rule written down for it is met. A "no" on a
# model with 192 dimensions does not refute anything about one with 3,584: an L0 of 16 is a far larger share of the
# width here.
#
# ## Token by token

# %%
sae = ladder.load("d_sae=512")
prompt = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"
error = error_of_prompt(model, sae, prompt, site=SITE, linear=result.maps["d_sae=512"])
error.plot()

# %% [markdown]
# ## What dictionary and encoder have to do with it
#
# Gradient pursuit searches for the best code for every token with the same decoder and the same number of features.
# What it gains over the encoder is not missing from the dictionary: the encoder just does not find it.

# %%
result.frames()["pursuit"]
