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
# # 1. Quickstart: from a model to its features
#
# A sparse autoencoder (SAE) writes an activation of a language model as a sum of a few directions out of many. This
# notebook makes one for the small model that ships with saelab, measures what it keeps, and looks at what its
# features respond to. Everything it writes is below `runs/`; run a cell again and it replaces its own folder.

# %%
import saelab

SITE = "blocks.2.hook_resid_post"
model = saelab.load_model("embedded")
model

# %% [markdown]
# The model has four layers and was trained on Python's standard library, so its features are about Python code. A
# *site* is a place whose activation can be read; names are TransformerLens's. `blocks.2.hook_resid_post` is the
# residual stream after block 2.

# %%
model.sites()[:12], model.width(SITE)

# %% [markdown]
# ## Harvest
#
# Run the model over text once and keep the activations at the site: one row per token. With `resume`, a store that is
# finished is simply opened.

# %%
store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)
store

# %% [markdown]
# Look at the data first. A few activations with a huge norm would dominate the squared error that an SAE is trained
# on; here there are none.

# %%
store.plot()

# %% [markdown]
# ## Train
#
# A TopK SAE keeps the `k` largest of `d_sae` features at every token. The YAML file is the one `saelab demo` uses;
# keys override it. Two passes over so few tokens make a rough SAE, in seconds.

# %%
trained = saelab.train(
    "demo-topk.yaml",
    store=store,
    sae={"d_sae": 1024, "k": 32},
    training={"tokens": 400_000},
    out="runs/quickstart",
    force=True,
)
trained

# %%
trained.plot("fvu")

# %% [markdown]
# The FVU is the fraction of variance unexplained: 0 is perfect, 1 is no better than the mean.
#
# ## Measure
#
# What matters more is what the model makes of the reconstruction, on text that neither has seen: its loss with the
# SAE in place, beside the loss when the site is replaced by its mean or by zero.

# %%
evaluation = saelab.evaluate(trained, model=model, max_tokens=10_000)
evaluation

# %%
evaluation.plot()

# %% [markdown]
# *CE recovered* puts the SAE's loss on the scale from zero ablation (0) to the untouched model (1). Zero ablation is
# so bad that nearly everything looks good on this scale: read the difference in nats too.

# %%
print(f"CE recovered {evaluation.ce_recovered:.3f}; the SAE costs {evaluation.ce_sae - evaluation.ce_clean:.3f} nats")

# %% [markdown]
# ## Look at features
#
# The feature store holds every activation of every feature on a held-out text. Nothing is computed twice: contexts,
# histograms and co-activation are slices of it.

# %%
features = saelab.build_features(trained, model=model, max_tokens=60_000, out="runs/quickstart-features", force=True)
features.plot()

# %%
table = features.summary().sort_values("density", ascending=False)
table[["density", "max", "top_token_text", "token_entropy"]].head(8)

# %% [markdown]
# Take features that fire neither all the time nor on one token alone, and look at where they fire most. In a notebook
# `show` draws the same dashboard as the app.

# %%
from saelab.workflows.show import example_features

chosen = example_features(features, 3)
saelab.show(chosen, features)

# %% [markdown]
# ## A feature in the running model
#
# `splice` puts the SAE into the model for the length of a `with` block. With `keep_error` the model computes exactly
# what it did, but gradients go through the features: here, what each active feature adds to the logit of the
# likeliest next token, to first order.

# %%
import torch

prompt = "def area(self):\n    return self.width * self."
tokens = model.tokenizer(prompt, return_tensors="pt").input_ids
sae = trained.load().requires_grad_()  # so that there is something to differentiate with respect to
with model.splice(sae, keep_error=True) as seen:
    spliced = model.logits(tokens, grad=True)
untouched = model.logits(tokens)
print("largest change of a logit:", float((spliced - untouched).detach().abs().max()))
best = untouched[0, -1].topk(3)
print([model.tokenizer.decode(int(i)) for i in best.indices], best.values.softmax(0).tolist())

# %%
code = sae.encode(seen.x[SITE][0])
last = code.rows() == tokens.shape[1] - 1
ids, values = code.indices[last], code.values[last]
x_hat = seen.x_hat[SITE]
(gradient,) = torch.autograd.grad(spliced[0, -1, best.indices[0]], x_hat)
effect = values * (sae.W_dec[ids] @ gradient[0, -1]) / sae.input_scale
order = effect.abs().argsort(descending=True)[:5]
[(int(ids[i]), float(values[i]), float(effect[i])) for i in order]

# %% [markdown]
# ## Where to go
#
# * `saelab app runs` opens all this in the browser.
# * `02_comparing_architectures` asks which SAE to train, `03_dark_matter` what it misses, `04_circuits` what its
#   features do, `05_autointerp` what they mean.
# * `07_own_model_and_sae` does the same with a model of your own.
