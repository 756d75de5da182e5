import pytest
import torch

from saelab.core.errors import SiteError
from saelab.models.sites import Address, Site, SiteTable, survey
from saelab.models.subject import SubjectModel, load_model
from tests.models.tiny import CONTEXT, HEADS, N_LAYERS, VOCAB, WIDTH, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(str(tiny_gpt2(folder) if request.param == "gpt2" else tiny_llama(folder)))


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def test_every_site_reads_what_the_bridge_caches(model: SubjectModel) -> None:
    _, cache = model.bridge.run_with_cache(tokens())
    assert len(model.sites()) >= N_LAYERS * 14
    for name in model.sites():
        expected = cache[name].flatten(2) if cache[name].dim() == 4 else cache[name].expand(3, -1, -1)
        found = model.read(tokens(), name)[name]
        assert found.shape == (3, CONTEXT, model.width(name))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_all_sites_at_once_give_the_same(model: SubjectModel) -> None:
    together = model.read(tokens(), model.sites())
    assert list(together) == model.sites()
    for name, value in together.items():
        torch.testing.assert_close(value, model.read(tokens(), name)[name], atol=1e-5, rtol=1e-4)


def test_the_residual_stream_is_hugging_faces(model: SubjectModel) -> None:
    states = model.plain(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(model.read(tokens(), "blocks.0.hook_resid_pre")["blocks.0.hook_resid_pre"], states[0])
    for layer in range(N_LAYERS - 1):  # the last entry of hidden_states has the final norm applied
        name = f"blocks.{layer}.hook_resid_post"
        assert torch.equal(model.read(tokens(), name)[name], states[layer + 1])


def test_the_usual_sites_are_read_from_the_plain_model(model: SubjectModel) -> None:
    for suffix in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        assert model.site(f"blocks.1.{suffix}").address is not None
    for suffix in ("attn.hook_z", "mlp.hook_post", "mlp.hook_pre", "ln1.hook_out", "ln2.hook_out"):
        assert model.site(f"blocks.1.{suffix}").address is not None


def test_the_bridges_own_names_are_accepted(model: SubjectModel) -> None:
    own, canonical = "blocks.1.mlp.out.hook_in", "blocks.1.mlp.hook_post"
    assert torch.equal(model.read(tokens(), own)[own], model.read(tokens(), canonical)[canonical])


def test_layers_widths_and_heads(model: SubjectModel) -> None:
    assert model.layer("hook_embed") == -1
    assert model.layer("blocks.2.attn.hook_z") == 2
    assert model.layer("ln_final.hook_out") == N_LAYERS
    assert model.width("blocks.0.attn.hook_z") == WIDTH
    half = WIDTH // HEADS
    assert model.head_slices("blocks.0.attn.hook_z") == [slice(0, half), slice(half, WIDTH)]
    assert model.head_slices("blocks.0.hook_resid_post") == [slice(0, WIDTH)]


def test_logits_patterns_and_scales_are_no_sites(model: SubjectModel) -> None:
    for name in ("hook_unembed", "blocks.0.attn.hook_pattern", "blocks.0.ln1.hook_scale"):
        with pytest.raises(SiteError):
            model.site(name)


def test_unknown_sites_name_near_matches(model: SubjectModel) -> None:
    with pytest.raises(
        SiteError, match=r"no site 'blocks\.1\.hook_resid_pst'; did you mean blocks\.1\.hook_resid_post"
    ):
        model.read(tokens(), "blocks.1.hook_resid_pst")
    with pytest.raises(SiteError, match=r"no site 'blocks\.9\.hook_resid_post'"):
        model.width("blocks.9.hook_resid_post")
    with pytest.raises(SiteError, match=r"for example blocks\.1\.hook_resid_post"):
        model.logits(tokens(), {"xyz": lambda x: x})


def test_a_module_that_disagrees_with_the_bridge_is_not_used(model: SubjectModel) -> None:
    right = model.site("blocks.1.hook_resid_post")
    assert right.address is not None
    wrong_module = model.plain.get_submodule(model.site("blocks.0.hook_resid_post").address.module)  # type: ignore[union-attr]
    swapped = {key: path for key, path in model._paths.items() if path != right.address.module}
    twin = next(key for key, path in model._paths.items() if path == right.address.module)
    name = next(path for path, module in model.plain.named_modules() if module is wrong_module)
    table = survey(model.bridge, model.plain, {**swapped, twin: name})
    assert table["blocks.1.hook_resid_post"].address is None
    assert table["blocks.0.hook_resid_post"].address is not None


def test_table_lists_only_what_is_there() -> None:
    site = Site("blocks.0.hook_resid_post", 0, 4, None, Address("h.0", "out"))
    table = SiteTable({site.name: site, "other": site}, 2)
    assert table.names() == ["blocks.0.hook_resid_post"]
    assert table["other"] is site
