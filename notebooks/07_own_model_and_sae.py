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
# # 7. Your own model, your own SAE
#
# Any causal language model that transformers can open works: a hub id or a folder. So that this notebook runs
# anywhere, it makes its own folder, a Llama with two layers, trained for a minute on Python's standard library. If
# the environment variable `SAELAB_DATA` names a folder with `stories260K` in it (Karpathy's tiny Llama in Hugging
# Face format) and `text/tinystories-600.jsonl`, those are used.

# %%
import os
from pathlib import Path

import torch

import saelab

data = Path(os.environ.get("SAELAB_DATA", "nowhere"))
folder, text, heldout = "runs/own-model", "stdlib:train", "stdlib:heldout"
if (data / "stories260K").is_dir():
    folder, text, heldout = str(data / "stories260K"), "runs/train.jsonl", "runs/heldout.jsonl"
    stories = (data / "text" / "tinystories-600.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("runs").mkdir(exist_ok=True)
    Path(text).write_text("".join(stories[:-100]), encoding="utf-8")
    Path(heldout).write_text("".join(stories[-100:]), encoding="utf-8")
folder, text, heldout

# %% [markdown]
# ## Make a model folder
#
# Nothing here is saelab's: a tokenizer, a config and `save_pretrained`.

# %%
if folder == "runs/own-model":
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = saelab.load_model("embedded").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    ids = []
    for document in saelab.open_text("stdlib:train"):
        ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]
        if len(ids) > 400_000:
            break
    rows = torch.tensor(ids)[: len(ids) // 128 * 128].view(-1, 128)
    optimiser = torch.optim.AdamW(llama.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(250):
        some = rows[torch.randint(len(rows), (16,))]
        loss = llama(some, labels=some).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} nats")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

# %% [markdown]
# ## Open it
#
# From here on everything is as in the quickstart. `model.sites()` (or `saelab sites FOLDER`) lists where one can
# read.

# %%
model = saelab.load_model(folder)
print(model)
site = f"blocks.{model.n_layers - 1}.hook_mlp_out"
model.sites()[:8]

# %% [markdown]
# A model whose architecture saelab does not know, or that has no tokenizer, says so in one line. A trap that no
# program can see: if a checkpoint needs changes to the forward pass (a scaled embedding, a shifted norm), it loads
# and runs and prints garbage. Look at some text first.

# %%
prompt = "def __init__(self" if text == "stdlib:train" else "Once upon a time"
tokens = model.tokenizer(prompt, return_tensors="pt").input_ids
print(model.tokenizer.decode(model.plain.generate(tokens, max_new_tokens=24, do_sample=False)[0]))

# %% [markdown]
# ## Your own SAE

# %%
store = saelab.harvest(model, site, text=text, max_tokens=120_000, out="runs/own-store", force=True)
trained = saelab.train(
    {"site": site},
    store=store,
    sae={"architecture": "topk", "d_sae": 512, "k": 16},
    training={"tokens": 300_000, "batch_size": 2048, "lr": 1e-3},
    out="runs/own-sae",
    force=True,
)
saelab.evaluate(trained, model=model, text=heldout, max_tokens=5_000)

# %% [markdown]
# ## To SAELens, and back
#
# `saelab export` writes the checkpoint formats of other libraries, `load_sae` reads them: a SAELens folder is an SAE
# like any other. Scales are folded on the way, so both take raw activations.

# %%
from saelab.sae.formats import export_sae

sae = trained.load()
Path("runs/for-saelens").mkdir(exist_ok=True)
export_sae(sae, "runs/for-saelens", "saelens")
print(sorted(path.name for path in Path("runs/for-saelens").iterdir()))
again = saelab.load_sae("runs/for-saelens")
again

# %%
x = model.read(tokens, site)[site][0]
difference = float((again(x) - sae(x)).abs().max())
print(f"largest difference of a reconstruction: {difference:.1e}, of values up to {float(x.abs().max()):.1f}")
assert difference < 1e-4 * float(x.abs().max())

# %% [markdown]
# What comes from elsewhere does not know what it was trained on, so say it:

# %%
theirs = saelab.evaluate(again, model=model, site=site, text=heldout, max_tokens=5_000)
theirs

# %%
features = saelab.build_features(again, model=model, site=site, text=text, max_tokens=40_000, out="runs/own-features",
                                 force=True)  # fmt: skip
features.summary()[["density", "max", "top_token_text"]].sort_values("density", ascending=False).head()
