import pytest
import torch

from saelab.analysis.dark_matter.decompose import measure
from saelab.analysis.dark_matter.downstream import downstream
from saelab.analysis.dark_matter.losses import token_losses
from saelab.analysis.dark_matter.prompt import error_of_prompt
from saelab.analysis.dark_matter.tokens import tokens_of_arrays
from saelab.core.errors import ActivationError, StoreError
from saelab.core.progress import set_progress
from saelab.core.regression import LinearMap
from tests.features.fakes import SITE, FakeModel, FakeRows, constant, identity, random_rows


@pytest.fixture(autouse=True)
def _quiet():
    set_progress(False)
    yield
    set_progress(True)


@pytest.fixture
def world():
    """The fake model, its rows, and the tokens of a store harvested from them (BOS left out)."""
    model, rows = FakeModel(), random_rows(n_rows=40, length=12)
    context, position = rows.keep.nonzero().T
    ids = rows.tokens[rows.keep]
    tokens = tokens_of_arrays({SITE: model.embed[ids]}, context, ids)
    tokens = type(tokens)(tokens.gather, tokens.widths, tokens.index, context, position, ids, tokens.fit, tokens.notes)
    return model, rows, tokens


def test_losses_by_hand(world):
    model, rows, tokens = world
    found = token_losses(model, rows, tokens, 7)
    log_p = model.logits(rows.tokens).log_softmax(-1)
    for k in (0, 5, 200, tokens.n - 1):
        row, at = int(tokens.context[k]), int(tokens.position[k])
        assert found["surprisal"][k] == pytest.approx(-float(log_p[row, at - 1, rows.tokens[row, at]]), abs=1e-5)
        if at < 11:
            assert found["loss"][k] == pytest.approx(-float(log_p[row, at, rows.tokens[row, at + 1]]), abs=1e-5)
        else:
            assert found["loss"][k] != found["loss"][k]  # nan: nothing follows


def test_another_text_is_refused(world):
    model, rows, tokens = world
    other = FakeRows(torch.where(rows.tokens > 0, (rows.tokens % 10) + 1, 0))
    with pytest.raises(StoreError, match="not the one the store was harvested from"):
        token_losses(model, other, tokens, 7)
    short = FakeRows(rows.tokens[:20])
    with pytest.raises(StoreError, match="not the one"):
        token_losses(model, short, tokens, 7)


def test_harm_is_that_of_the_missing_part(world):
    model, rows, tokens = world
    sae = identity()
    sae.W_dec = sae.W_dec * 0.5  # e = x / 2, all of it linear
    linear = measure(tokens, SITE, {"sae": sae}).saes["sae"].linear
    found = downstream(model, rows, SITE, sae, linear, tokens, rows_per_batch=6)
    assert found.recovered["linear"] == pytest.approx(1, abs=1e-3)
    assert found.recovered["nonlinear"] == pytest.approx(0, abs=1e-3)
    assert found.harm_share_nonlinear == pytest.approx(0, abs=1e-3)
    assert found.norm_share_nonlinear == pytest.approx(0, abs=1e-6)
    assert found.n_contexts == tokens.n_contexts(False)
    assert found.n_predictions == found.n_tokens - found.n_contexts  # the last token of a row predicts nothing
    assert list(found.to_frame()["variant"])[:2] == ["clean", "sae"]
    nothing = LinearMap(linear.weight * 0, linear.bias * 0, 0, 1)
    other = downstream(model, rows, SITE, sae, nothing, tokens, rows_per_batch=40)
    assert other.harm_share_nonlinear == pytest.approx(1, abs=1e-3)
    assert other.ce["clean"] == pytest.approx(found.ce["clean"], abs=1e-6)


def test_clean_cross_entropy_by_hand_and_max_tokens(world):
    model, rows, tokens = world
    linear = LinearMap(torch.zeros(6, 6).double(), torch.zeros(6).double(), 0, 1)
    found = downstream(model, rows, SITE, constant(torch.zeros(6)), linear, tokens, max_tokens=25)
    chosen = tokens.context[~tokens.fit].unique()[:3]  # 11 kept tokens in each
    assert found.n_contexts == 3
    log_p = model.logits(rows.tokens[chosen]).log_softmax(-1)
    losses = -log_p[:, 1:-1].gather(-1, rows.tokens[chosen][:, 2:, None])
    assert found.ce["clean"] == pytest.approx(float(losses.mean()), abs=1e-5)


class Words:
    """A tokenizer of letters: a = 1, b = 2 ..."""

    bos_token_id = 0
    all_special_ids = (0,)

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) - 96 for c in text]}

    def decode(self, ids):
        return "".join(chr(96 + i) if i else "^" for i in ids)


def test_prompt_error_is_that_of_its_tokens():
    model = FakeModel(tokenizer=Words())
    model.n_ctx = 20
    sae = identity()
    sae.W_dec = sae.W_dec * 0.5
    linear = LinearMap(0.25 * torch.eye(6).double(), torch.zeros(6).double(), 6, 1)
    found = error_of_prompt(model, sae, "cab", site=SITE, linear=linear)
    assert found.texts == ["^", "c", "a", "b"]
    assert found.keep.tolist() == [False, True, True, True]
    squares = model.embed[torch.tensor([3, 1, 2])].square().sum(1)
    torch.testing.assert_close(torch.from_numpy(found.total[1:]), squares / 4)
    torch.testing.assert_close(torch.from_numpy(found.linear[1:]), squares / 16)
    torch.testing.assert_close(torch.from_numpy(found.nonlinear[1:]), squares / 16)
    assert found.total[0] != found.total[0]
    assert list(found.to_frame()["text"]) == found.texts
    narrow = LinearMap(torch.eye(5).double(), torch.zeros(5).double(), 5, 1)
    with pytest.raises(ActivationError, match="width 5, but"):
        error_of_prompt(model, sae, "cab", site=SITE, linear=narrow)
