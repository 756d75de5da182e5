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
# # 5. Auto-interpretation, and what it is worth
#
# An explanation of a feature is only as good as the test it passes. This notebook explains features without any
# language model (a *token set*: the tokens a feature fires on, with weights), scores the explanations, and puts every
# score beside the same score on things that have nothing to explain. With a language model behind an
# OpenAI-compatible endpoint the call is the same with `judge={"model": ..., "endpoint": ...}`.

# %%
import saelab

SITE = "blocks.2.hook_resid_post"
model = saelab.load_model("embedded")
store = saelab.harvest(model, SITE, max_tokens=200_000, out="runs/store", resume=True)
small = {"sae": {"d_sae": 1024}, "training": {"tokens": 400_000}}
trained = saelab.train("demo-topk.yaml", store=store, **small, out="runs/explained-sae", force=True)
features = saelab.build_features(trained, model=model, max_tokens=60_000, out="runs/explained-features", force=True)

# %% [markdown]
# ## Explain and score
#
# Windows of text are split in two halves: explanations are made from one and scored on the other. The controls are
# built on the same text: directions drawn at random, an untrained SAE, the model's own neurons, and the explanations
# of other features (`shuffled`).

# %%
result = saelab.explain(features, sae=trained, model=model, max_features=60, control_features=40)
result

# %%
result.to_frame()

# %%
result.plot()

# %% [markdown]
# How to read it:
#
# * **detection** asks whether the explanation tells windows where the feature fires from others. Compare with
#   `shuffled`: that is what a wrong explanation gets.
# * **untrained** and **random-directions** have token sets too, and these often score well: a direction in the
#   residual stream reacts to the current token, trained or not. A score that an untrained SAE reaches says little
#   about training.
# * **surface**, **intruder** and the embedding scores need no explanation; they say how alike the contexts of a
#   feature are.
# * **intervention** measures what taking the feature out does to the model.
#
# So the question is never "how high" but "how much higher than its controls":

# %%
rows = result.report.to_frame()
wide = rows.pivot_table(index=["author", "scorer"], columns=rows["control"].replace("", "SAE"), values="mean")
controls = [name for name in ("shuffled", "untrained", "random-directions", "neurons") if name in wide]
wide.sub(wide["SAE"], axis=0)[controls].mul(-1).round(3).add_prefix("SAE minus ")

# %% [markdown]
# ## The explanations themselves
#
# They are kept beside the store (in SQLite), and become columns of it.

# %%
from saelab.features.explanations import Explanations, attach_explanations

book = Explanations(features)
attach_explanations(features)
scored = book.to_frame()
scored.head()

# %%
columns = [name for name in features.columns if "detection" in name]
table = features.summary([*columns, "density", "top_token"]).dropna(subset=columns[:1])
table = table.sort_values(columns[0], ascending=False)
table.head(5)

# %%
table.tail(5)

# %% [markdown]
# Look at the best and at the worst, at what the words say and at where the feature fires. In the run that this was
# written from, detection was hardly above its shuffled control while fuzzing was far above: nearly every window of 32
# tokens holds some token of a long list, but which token of a window is marked, a list of tokens can tell. And an
# untrained SAE came close on most scores. So these token sets say which tokens set a feature off, and that is all
# they are evidence for.

# %%
best, worst = int(table.index[0]), int(table.index[-1])
print("best: ", features.texts.get(best))
print("worst:", features.texts.get(worst))
saelab.show([best, worst], features)

# %% [markdown]
# ## Limits
#
# Sixty features of a thousand, a text of sixty thousand tokens: the intervals in the figure are over features and are
# wide. A token set cannot express "the second argument of a call"; where scores are low the explainer may be at
# fault, not the feature.
