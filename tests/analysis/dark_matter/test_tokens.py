import pytest
import torch

from saelab.analysis.dark_matter.decompose import measure
from saelab.analysis.dark_matter.tokens import tokens_of_arrays
from saelab.core.errors import ActivationError, ConfigError, SiteError, StoreError
from tests.analysis.dark_matter.planted import SITE, contexts, data, scaled


def x_of(n=400, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_too_few_tokens_for_the_width_is_refused_and_few_are_noted():
    with pytest.raises(StoreError, match=r"too few for activations of width 64: give at least 256 each \(1280 in all"):
        data(x_of(200, 64))
    assert "fewer than 20 per dimension" in data(x_of(800, 64)).notes[0]
    assert data(x_of(1000, 8)).notes == ()


def test_one_context_is_refused():
    with pytest.raises(StoreError, match="400 tokens of 1 context"):
        tokens_of_arrays({SITE: x_of()}, torch.zeros(400, dtype=torch.int64))
    assert "only 8 contexts" in data(x_of()).notes[0]


def test_nan_names_rows_and_position():
    x = x_of()
    x[103, 2] = torch.nan
    with pytest.raises(ActivationError, match=r"NaN or infinity in 1 tokens \(rows of text 2, first at position 3\)"):
        measure(data(x), SITE, {"sae": scaled(0.5, 8)})


def test_wrong_width_site_and_share():
    with pytest.raises(ActivationError, match="reads activations of width 4, but site in the store is 8 wide"):
        measure(data(x_of()), SITE, {"sae": scaled(0.5, 4)})
    with pytest.raises(SiteError, match="holds no site 'sites'; did you mean site"):
        measure(data(x_of()), "sites", {"sae": scaled(0.5, 8)})
    with pytest.raises(ConfigError, match="fit_share is 1"):
        data(x_of(), fit_share=1.0)


def test_choices_keep_split_and_order():
    tokens = tokens_of_arrays({SITE: x_of()}, contexts(400, 20), torch.arange(400))
    some = tokens.first(30)
    assert int(some.fit.sum()) == 30
    assert int((~some.fit).sum()) == 30
    assert bool((some.index.diff() > 0).all())
    seen = torch.cat([chunk.x[SITE] for chunk in some.chunks(SITE, size=7)])
    assert torch.equal(seen, x_of()[some.token_id])
    assert tokens.position.tolist()[:22] == [*range(20), 0, 1]
