"""The store and the live stream on a real (tiny) transformer and real token rows."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.activations.live import LiveStream
from saelab.core.errors import SiteError
from saelab.models.subject import SubjectModel, load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig
from tests.models.tiny import CONTEXT, tiny_gpt2, tokenizer_for

SITES = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    folder = tiny_gpt2(tmp_path_factory.mktemp("gpt2"))
    tokenizer_for(folder)
    return load_model(str(folder))


@pytest.fixture(scope="module")
def rows(model: SubjectModel) -> TokenRows:
    letters = "abcdefghijklmnopqrstuv"
    ids = torch.randint(0, 22, (40, 30), generator=torch.Generator().manual_seed(0))
    documents = [" ".join(letters[i] for i in document) for document in ids.tolist()]
    return TokenRows(model.tokenizer, open_text(documents), TokensConfig(), model.n_ctx)


def test_a_store_holds_what_the_model_computes(model: SubjectModel, rows: TokenRows, tmp_path: Path) -> None:
    config = HarvestConfig(rows_per_batch=5, gradients=True, shard_bytes=20_000)
    store = harvest(model, rows, SITES, tmp_path / "s", config)
    store.verify()
    store.check_model(model)
    row, position = (
        store.read_rows("row", torch.arange(store.n_rows)),
        store.read_rows("position", torch.arange(store.n_rows)),
    )
    assert int(position.min()) == 1
    assert int(position.max()) == CONTEXT - 2
    for number, batch in enumerate(rows.batches(5)):
        here = (row // 5 == number).nonzero()[:, 0]
        values, gradients = model.read_with_gradient(batch.tokens, batch.keep, SITES)
        for site in SITES:
            local, at = row[here] - 5 * number, position[here].long()
            assert torch.equal(store.read_rows(site, here), values[site][local, at])
            assert torch.equal(store.read_rows(f"{site}.grad", here), gradients[site][local, at])
            assert torch.equal(store.read_rows("token_id", here).long(), batch.tokens[local, at])


def test_an_unknown_site_is_refused_before_anything_is_written(
    model: SubjectModel, rows: TokenRows, tmp_path: Path
) -> None:
    with pytest.raises(SiteError, match=r"did you mean blocks\.1\.hook_resid_post"):
        harvest(model, rows, ["blocks.1.hook_resid_pos"], tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_live_stream_hands_out_the_rows_of_the_store(model: SubjectModel, rows: TokenRows, tmp_path: Path) -> None:
    store = harvest(model, rows, SITES, tmp_path / "s", HarvestConfig(rows_per_batch=4))
    stored = store.read_rows(SITES[0], torch.arange(store.n_rows))
    live = LiveStream(model, rows, SITES[0], store.n_rows // 4, buffer_rows=store.n_rows // 4, rows_per_batch=4)
    seen = torch.cat([batch.x for batch in islice(live, 4)])
    # One epoch holds every row once, but in batches of another composition, so equal up to rounding only.
    torch.testing.assert_close(seen.sort(dim=0).values, stored.sort(dim=0).values, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen, stored, atol=1e-2)
