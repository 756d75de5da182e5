import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.core.errors import ModelError
from saelab.models.subject import SubjectModel, load_model
from tests.models.tiny import CONTEXT, N_LAYERS, VOCAB, WIDTH, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(str(tiny_gpt2(folder) if request.param == "gpt2" else tiny_llama(folder)))


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def test_sizes(model: SubjectModel) -> None:
    assert (model.n_layers, model.d_model, model.d_vocab, model.n_ctx) == (N_LAYERS, WIDTH, VOCAB, CONTEXT)


def test_logits_are_hugging_faces_and_the_bridges(model: SubjectModel) -> None:
    logits = model.logits(tokens())
    assert torch.equal(logits, model.plain(tokens()).logits)
    torch.testing.assert_close(logits, model.bridge(tokens()), atol=1e-5, rtol=1e-4)
    assert not logits.requires_grad


def calls(model: SubjectModel, run: object) -> int:
    """Number of transformer blocks, final norms and unembeddings that run."""
    counted = [0]

    def count(*_: object) -> None:
        counted[0] += 1

    watched = [module for path, module in model.plain.named_modules() if path.split(".")[-1].isdigit()]
    watched.append(model.plain.get_submodule("lm_head"))
    handles = [module.register_forward_pre_hook(count) for module in watched]
    run()  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return counted[0]


def test_only_the_layers_up_to_the_last_site_run(model: SubjectModel) -> None:
    def blocks(*sites: str) -> int:
        return calls(model, lambda: model.read(tokens(), sites))

    model.sites()  # the survey of sites runs the model once
    assert calls(model, lambda: model.logits(tokens())) == N_LAYERS + 1
    assert blocks("hook_embed") == 0
    assert blocks("blocks.0.hook_resid_post") == 1
    assert blocks("blocks.1.attn.hook_z") == 2
    assert blocks("blocks.1.hook_resid_post", "blocks.0.hook_mlp_out") == 2
    assert blocks(f"blocks.{N_LAYERS - 1}.hook_resid_post") == N_LAYERS  # and no unembedding


def test_a_read_leaves_no_hook_behind(model: SubjectModel) -> None:
    before = model.logits(tokens())
    model.read(tokens(), ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"])
    with pytest.raises(RuntimeError, match="on purpose"):
        model.logits(tokens(), {"blocks.0.hook_resid_post": _fails})
    assert torch.equal(model.logits(tokens()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.plain.modules())


def _fails(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("on purpose")


def test_replacing_a_site_by_itself_changes_nothing(model: SubjectModel) -> None:
    clean = model.logits(tokens())
    for name in model.sites():
        seen = []

        def same(x: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(x)
            return x.clone()

        torch.testing.assert_close(model.logits(tokens(), {name: same}), clean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[0], model.read(tokens(), name)[name], atol=1e-5, rtol=1e-4)


def test_a_replacement_is_the_bridges_intervention(model: SubjectModel) -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x

    for name in model.sites():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_bridge = model.bridge.run_with_hooks(tokens(), fwd_hooks=[(name, lambda value, hook: 0.5 * value)])
        torch.testing.assert_close(model.logits(tokens(), {name: half}), by_bridge, atol=1e-4, rtol=1e-4)


def test_several_replacements_in_one_pass(model: SubjectModel) -> None:
    def zero(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    both = model.logits(tokens(), {"blocks.0.hook_mlp_out": zero, last: zero})
    assert torch.equal(both, model.logits(tokens(), {last: zero}))
    assert torch.equal(both[0], both[1])


def test_a_replacement_in_float32_is_taken_back_to_the_models_dtype(tmp_path: Path) -> None:
    model = load_model(str(tiny_gpt2(tmp_path)), dtype="bfloat16")
    logits = model.logits(tokens(), {"blocks.1.hook_resid_post": lambda x: x.float()})
    assert torch.equal(logits, model.logits(tokens()))


def test_gradients_flow_when_asked_for(model: SubjectModel) -> None:
    direction = torch.zeros(WIDTH, requires_grad=True)
    for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_q"):
        if model.width(name) == WIDTH:
            logits = model.logits(tokens(), {name: lambda x: x + direction}, grad=True)
            (gradient,) = torch.autograd.grad(logits.square().sum(), direction)
            assert gradient.abs().max() > 0
            assert not model.logits(tokens(), {name: lambda x: x + direction}).requires_grad


def test_read_values_can_be_trained_on(model: SubjectModel) -> None:
    x = model.read(tokens(), "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    weight = torch.ones(WIDTH, requires_grad=True)
    (x * weight).sum().backward()
    assert weight.grad is not None


def loss(model: SubjectModel, ids: torch.Tensor, keep: torch.Tensor, site: str, change: torch.Tensor) -> torch.Tensor:
    logits = model.logits(ids, {site: lambda x: x + change}).double()
    surprise = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return surprise[keep[:, 1:]].sum()


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"])
def test_the_gradient_is_that_of_the_summed_loss(model: SubjectModel, site: str) -> None:
    ids = tokens()
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = keep[1, -2:] = False
    values, gradients = model.read_with_gradient(ids, keep, ["blocks.0.hook_resid_pre", site])
    torch.testing.assert_close(values[site], model.read(ids, site)[site], atol=1e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step = torch.randn(gradients[site].shape, generator=generator)
        numeric = (loss(model, ids, keep, site, 1e-2 * step) - loss(model, ids, keep, site, -1e-2 * step)) / 2e-2
        torch.testing.assert_close((gradients[site] * step).sum().double(), numeric, rtol=2e-2, atol=2e-2)
    # Rows are independent and losses are summed: a row alone has the same gradient, it does not shrink with the batch.
    _, alone = model.read_with_gradient(ids[:1], keep[:1], [site])
    torch.testing.assert_close(alone[site][0], gradients[site][0], atol=1e-4, rtol=1e-3)
    assert gradients[site].dtype == torch.float32


def test_losses_after_a_head_are_those_of_the_whole_text(model: SubjectModel) -> None:
    head, tails = tokens(1, 5)[0], tokens(4, CONTEXT - 5).flip(1)
    whole = torch.cat([head.expand(4, -1), tails], 1)
    expected = torch.nn.functional.cross_entropy(
        model.logits(whole)[:, 4:-1].transpose(1, 2), whole[:, 5:], reduction="none"
    )
    found = model.losses_after(head, tails)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.losses_after(head, tails[:, :1]), found[:, :1])
    assert not found.requires_grad
    blocks = calls(model, lambda: model.losses_after(head, tails))
    assert blocks == 2 * (N_LAYERS + 1)  # the head, and all texts at once
    with pytest.raises(ModelError, match="do not fit the context"):
        model.losses_after(head, tokens(2, CONTEXT - 4))


def test_losses_after_a_head_without_a_cache(model: SubjectModel, monkeypatch: pytest.MonkeyPatch) -> None:
    head, tails = tokens(1, 3)[0], tokens(2, 6)
    expected = model.losses_after(head, tails)
    plain = model.plain.forward

    def forgetful(*args: object, **options: object) -> object:
        out = plain(*args, **options)
        out.past_key_values = None
        return out

    monkeypatch.setattr(model.plain, "forward", forgetful)
    torch.testing.assert_close(model.losses_after(head, tails), expected, atol=1e-5, rtol=1e-4)


def test_bad_tokens_are_one_line(model: SubjectModel) -> None:
    with pytest.raises(ModelError, match="13 tokens do not fit the context"):
        model.logits(tokens(1, CONTEXT + 1))
    with pytest.raises(ModelError, match=f"token id {VOCAB} is outside the vocabulary"):
        model.read(torch.tensor([[0, VOCAB]]), "hook_embed")
    with pytest.raises(ModelError, match="token id -1 is outside"):
        model.logits(torch.tensor([[-1]]))


# --- real models -----------------------------------------------------------------------------------------------------


def test_stories260k_tells_its_story(shared: Path) -> None:
    model = load_model(str(shared / "stories260K"))
    expected = (shared / "stories260K" / "expected_greedy.txt").read_text()
    ids = [model.tokenizer.bos_token_id]
    for _ in range(205):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    told = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(expected) > 400
    assert told.strip()[: len(expected.strip())] == expected.strip()


GOLDEN = {
    "ln1": "blocks.0.ln1.hook_out",
    "attnResid": "blocks.0.hook_resid_mid",
    "yProj": "blocks.0.hook_attn_out",
    "y": "blocks.0.attn.hook_z",
    "ln2": "blocks.0.ln2.hook_out",
    "fc": "blocks.0.mlp.hook_pre",
    "gelu": "blocks.0.mlp.hook_post",
    "mlp": "blocks.0.hook_mlp_out",
    "mlpResid": "blocks.0.hook_resid_post",
    "block0": "blocks.0.hook_resid_post",
    "block1": "blocks.1.hook_resid_post",
    "block2": "blocks.2.hook_resid_post",
    "x": "blocks.0.hook_resid_pre",
    "tok_emb": "hook_embed",
    "pos_emb": "hook_pos_embed",
    "ln_f": "ln_final.hook_out",
}


def test_nano_gpt_sort_matches_its_recorded_activations(shared: Path) -> None:
    model = load_model(str(shared / "nano-gpt-sort"))
    golden = load_file(shared / "nano-gpt-sort" / "golden_activations_t0.safetensors")
    ids = golden["idx"].long()
    found = model.read(ids, list(GOLDEN.values()))
    for key, site in GOLDEN.items():
        expected = golden[key].expand_as(found[site])
        torch.testing.assert_close(found[site], expected, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for name in "qkv":
        site = f"blocks.0.attn.hook_{name}"
        per_head = model.read(ids, site)[site].unflatten(2, (3, 16)).transpose(1, 2)
        torch.testing.assert_close(per_head, golden[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(ids), golden["lm_head"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_early_stop_saves_the_time(shared: Path) -> None:
    model = load_model(str(shared / "stories260K"))
    ids = torch.randint(1, 512, (8, 256), generator=torch.Generator().manual_seed(0))

    def seconds(site: str) -> float:
        times = []
        for _ in range(7):
            began = time.process_time()
            model.read(ids, site)
            times.append(time.process_time() - began)
        return min(times)

    whole = seconds("blocks.4.hook_resid_post")
    assert seconds("blocks.0.hook_resid_pre") < 0.1 * whole
    assert seconds("blocks.0.hook_resid_post") < 0.35 * whole
    assert seconds("blocks.2.hook_resid_post") < 0.75 * whole
