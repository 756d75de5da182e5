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
# # 6. Sparsify a model, then interpret it again
#
# Does pruning a model's weights change its features? This notebook removes half of the weights, trains the same SAE
# on the dense and on the pruned model, and matches the features. Two SAEs on the *same* model differ too, so a second
# seed on the dense model is the control.

# %%
import pandas as pd

import saelab

SITE = "blocks.2.hook_resid_post"
model = saelab.load_model("embedded")

# %% [markdown]
# ## Prune
#
# Wanda removes, in each row of each weight matrix, the weights with the smallest |weight| times the norm of their
# input. The report compares the losses on held-out text; the result is a model folder like any other.

# %%
reports = {
    name: saelab.sparsify(
        "embedded", {"method": {"name": method}, "sparsity": 0.5}, eval_tokens=8_000, out=f"runs/{name}", force=True
    )
    for name, method in (("wanda", "wanda"), ("magnitude", "magnitude"))
}
pd.DataFrame({name: report.cost for name, report in reports.items()})

# %%
reports["wanda"].plot()

# %%
sparse = saelab.load_model("runs/wanda")
zeros = [float((p == 0).float().mean()) for n, p in sparse.plain.named_parameters() if p.ndim == 2 and "mlp" in n]
print("share of zeros in the MLPs' matrices:", [round(z, 3) for z in zeros])

# %% [markdown]
# ## The same SAE on both
#
# Equal data and settings, two seeds on each model, trained together.

# %%
keys = {"sae": {"architecture": "topk", "d_sae": 512, "k": 24}}
training = {"tokens": 300_000, "batch_size": 2048, "lr": 1e-3}
dense_store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)
sparse_store = saelab.harvest(sparse, SITE, max_tokens=200_000, out="runs/wanda-store", resume=True)
dense = saelab.train({"site": SITE}, store=dense_store, **keys, training=training,
                     grid={"training.seed": [0, 1]}, out="runs/dense-saes", force=True)  # fmt: skip
pruned = saelab.train({"site": SITE}, store=sparse_store, **keys, training=training,
                      grid={"training.seed": [0, 1]}, out="runs/pruned-saes", force=True)  # fmt: skip

# %%
evaluations = {
    "dense": saelab.evaluate(dense["seed=0"], model=model, max_tokens=5_000),
    "pruned": saelab.evaluate(pruned["seed=0"], model=sparse, max_tokens=5_000),
}
pd.concat([e.to_frame().assign(model=n) for n, e in evaluations.items()])[["model", "fvu", "ce_clean", "ce_recovered"]]

# %% [markdown]
# A lower FVU on the pruned model would not make it more interpretable: pruning changes what there is to reconstruct.
#
# ## Which features are still there?
#
# Activations are compared on the same tokens, each SAE on its own model, and features are paired one to one. The SAE
# on the pruned model that is compared has the *other* seed, like the control: SAEs of one seed start from the same
# random directions, and after short training features that started alike still are. The third column shows how much
# that is worth.

# %%
text = {"max_tokens": 10_000, "targets": 0}
control = saelab.compare(dense["seed=0"], dense["seed=1"], **text)
across = saelab.compare(dense["seed=0"], pruned["seed=1"], **text)
same_start = saelab.compare(dense["seed=0"], pruned["seed=0"], **text)
across

# %%
named = {"dense, other seed": control, "pruned, other seed": across, "pruned, same seed": same_start}
pd.DataFrame(
    {
        name: {
            "correlation, one to one": found.to_dict()["activations"]["mean_matched"],
            "chance": found.to_dict()["activation_baseline"]["mean_best_a_to_b"],
            "share over 0.7": found.to_dict()["activations"]["share_matched_over_0.7"],
            "lost (best below 0.3)": float((found.activations.best_b_value < 0.3).mean()),
        }
        for name, found in named.items()
    }
)

# %%
across.plot()

# %% [markdown]
# Only what lies between the first two columns is the pruning's doing. One draw of seeds says little about a small
# difference: `saelab sparsity-study` repeats this over several, and reports means with their spread.
#
# ## A feature that is gone
#
# Take the dense SAE's feature that finds the worst partner in the pruned model though it finds a good one in the
# control.

# %%
frame = across.to_frame()["activation_best_value"].to_frame("pruned")
frame["control"] = control.to_frame()["activation_best_value"]
frame = frame.dropna()
gone = int((frame["control"] - frame["pruned"]).idxmax())
print(frame.loc[gone])
features = saelab.build_features(dense["seed=0"], model=model, max_tokens=40_000, out="runs/dense-features", force=True)
saelab.show(gone, features)
