"""Gather SAEDashboard's data for all features of an SAE on given tokens, with its own runner; one JSON answer.

    .venv-peers/sae_dashboard/bin/python benchmarks/peers/dashboard_build.py --model data/pylm --sae out/saelens \
        --tokens tokens.safetensors --site blocks.2.hook_resid_post --features 2048

Called by benchmarks/dashboards.py. The model is a folder of a GPT-2; the SAE is in SAELens' format.
"""

import argparse
import time
from typing import Any

from common import answers, say


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--tokens", required=True, help="safetensors file with a tensor tokens (rows, length)")
    parser.add_argument("--site", required=True)
    parser.add_argument("--features", type=int, required=True, help="the first so many")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", help="JSON file for the data, in the peer's own format")
    options = parser.parse_args()
    stream = answers()

    import torch
    from safetensors.torch import load_file

    if options.threads:
        torch.set_num_threads(options.threads)
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    model, tokenizer = hooked(options.model)
    sae = SAE.load_from_disk(options.sae, device="cpu")
    # The runner always folds decoder norms, which SAELens refuses for a TopK SAE; norms are no matter here.
    sae.fold_W_dec_norm = lambda: None
    tokens = load_file(options.tokens)["tokens"]
    config = SaeVisConfig(
        hook_point=options.site, features=list(range(options.features)), ignore_tokens={tokenizer.bos_token_id}
    )
    wall, cpu = time.perf_counter(), time.process_time()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    seconds, processor = time.perf_counter() - wall, time.process_time() - cpu
    answer: dict[str, Any] = {"seconds": seconds, "cpu": processor, "features": len(data.feature_data_dict)}
    if options.out:
        started = time.perf_counter()
        data.save_json(options.out)
        answer["save_seconds"] = time.perf_counter() - started
    say(stream, answer)


def hooked(folder: str) -> tuple[Any, Any]:
    """Load a GPT-2 folder as the HookedTransformer that the peer works on."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoTokenizer, GPT2LMHeadModel

    source, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    about = source.config
    config = HookedTransformerConfig(
        n_layers=about.n_layer,
        d_model=about.n_embd,
        d_head=about.n_embd // about.n_head,
        n_heads=about.n_head,
        d_mlp=4 * about.n_embd,
        d_vocab=about.vocab_size,
        n_ctx=about.n_positions,
        act_fn="gelu_new",
        eps=about.layer_norm_epsilon,
        normalization_type="LN",
        model_name="gpt2",
        device="cpu",
    )
    model = HookedSAETransformer(config, tokenizer=tokenizer)
    model.load_state_dict(convert_gpt2_weights(source, config), strict=False)
    return model.eval(), tokenizer


if __name__ == "__main__":
    main()
