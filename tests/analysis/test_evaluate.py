import json

import numpy as np
import pytest
import torch

from saelab.analysis import evaluate as module
from saelab.analysis import predictions
from saelab.analysis.evaluate import evaluate, site_mean
from saelab.analysis.evaluation import Evaluation, load_evaluation, save_evaluation
from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ActivationError, ConfigError, FormatError, OutputExistsError, SiteError, TextError
from saelab.sae import ARCHITECTURES, StepContext, build_sae
from tests.features.fakes import SITE, FakeModel, FakeRows, Oracle, constant, identity, random_rows


def kept_activations(model, rows):
    return model.embed[rows.tokens[rows.keep]].double()


def test_identity_dictionary_is_perfect():
    result = evaluate(FakeModel(), identity(), random_rows(), SITE)
    assert result.fvu == 0
    assert result.explained_variance == 1
    assert result.ce_recovered == 1
    assert result.kl_sae == 0
    assert result.kl_score == 1
    assert result.cosine == pytest.approx(1)
    assert result.shrinkage == pytest.approx(1)
    assert result.l0 == 6  # each coordinate or its negative, never both
    assert result.l0_percentiles == dict.fromkeys(["0", "5", "25", "50", "75", "95", "100"], 6)
    assert result.n_tokens == 7 * 8 == result.n_predictions


def test_dictionary_that_says_the_mean_is_mean_ablation():
    model, rows = FakeModel(), random_rows()
    mean = kept_activations(model, rows).mean(0)
    result = evaluate(model, constant(mean.float()), rows, SITE)
    assert result.fvu == pytest.approx(1, abs=1e-9)
    assert result.ce_sae == result.ce_mean
    assert result.kl_sae == result.kl_mean
    assert result.ce_recovered_mean == 0
    assert result.dead_fraction == 1
    assert result.l0 == 0
    assert result.l0_counts == [result.n_tokens]


def test_zero_dictionary_is_zero_ablation():
    result = evaluate(FakeModel(), constant(torch.zeros(6)), random_rows(), SITE)
    assert result.ce_sae == result.ce_zero
    assert result.ce_recovered == 0
    assert result.kl_score == 0
    assert result.nmse == pytest.approx(1)


def test_hand_computed_case():
    """Two tokens, activations (3, 4) and (1, 0); the dictionary halves them; uniform against certain logits."""
    model = FakeModel(d_vocab=3, d_in=2)
    model.embed = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    model.W_U = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    half = Oracle(torch.eye(2), torch.eye(2) / 2)
    result = evaluate(model, half, FakeRows(torch.tensor([[0, 1, 2]])), SITE)
    # errors: 25/4 and 1/4; mean (2, 2); deviations: (1, 4) + (1, 4) = 10
    assert result.mse == pytest.approx((25 / 4 + 1 / 4) / 2)
    assert result.fvu == pytest.approx(6.5 / 10)
    assert result.nmse == pytest.approx(0.25)
    assert result.cosine == pytest.approx(1)
    # centred: x_hat - mean = (-.5, 0), (-1.5, -2): energy 6.5; <x - m, x_hat - m> = (1,2)(-.5,0) + (-1,-2)(-1.5,-2) = 5
    assert result.shrinkage == pytest.approx(6.5 / 5)
    assert result.l0 == pytest.approx(1.5)
    assert result.l0_counts == [0, 1, 1]
    # position 0 (BOS, logits 0) predicts 1: log 3. Position 1 (logit 3 for token 1) predicts 2: log(2 + e^3).
    assert result.ce_clean == pytest.approx((np.log(3) + np.log(2 + np.exp(3))) / 2)
    assert result.ce_sae == pytest.approx((np.log(3) + np.log(2 + np.exp(1.5))) / 2)
    assert result.ce_zero == pytest.approx(np.log(3))
    p = np.exp([0, 3, 0]) / (2 + np.exp(3))
    q = np.exp([0, 1.5, 0]) / (2 + np.exp(1.5))
    assert result.kl_sae == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-5)
    assert result.dense_fraction == 1


def test_batches_and_logit_chunks_do_not_matter(monkeypatch):
    model, rows = FakeModel(), random_rows(n_rows=13)
    generator = torch.Generator().manual_seed(3)
    sae = Oracle(torch.randn(6, 20, generator=generator), torch.randn(20, 6, generator=generator) / 9)
    whole = evaluate(model, sae, rows, SITE, rows_per_batch=100).to_dict()
    monkeypatch.setattr(predictions, "CHUNK", 1)
    monkeypatch.setattr(module, "LOGIT_BYTES", 1)
    small = evaluate(model, sae, rows, SITE, rows_per_batch=3).to_dict()
    for name, value in whole.items():
        assert small[name] == (pytest.approx(value, rel=1e-6, nan_ok=True) if isinstance(value, float) else value), name


def test_streaming_equals_one_shot():
    model, rows = FakeModel(), random_rows()
    generator = torch.Generator().manual_seed(3)
    sae = Oracle(torch.randn(6, 20, generator=generator), torch.randn(20, 6, generator=generator) / 9)
    result = evaluate(model, sae, rows, SITE, rows_per_batch=2)
    x = kept_activations(model, rows)
    code = sae.encode(x.float())
    x_hat = sae.decode(code).double()
    assert result.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))
    assert result.nmse == pytest.approx(float(((x - x_hat).square().sum(1) / x.square().sum(1)).mean()))
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()))
    density = (code.to_dense() > 0).double().mean(0)
    assert result.dead_fraction == float((density == 0).double().mean())
    assert result.dense_fraction == float((density > 0.1).double().mean())
    assert result.l0 == pytest.approx(float(density.sum()))


def test_excluded_positions_keep_their_activation():
    model = FakeModel()
    model.embed[0] = 50.0  # a huge BOS
    rows = random_rows()
    kept = evaluate(model, constant(torch.zeros(6)), rows, SITE)
    whole = evaluate(model, constant(torch.zeros(6)), rows, SITE, splice="all")
    assert kept.ce_zero != whole.ce_zero
    assert kept.n_tokens == whole.n_tokens
    assert kept.mse == whole.mse == pytest.approx(float(kept_activations(model, rows).square().sum(1).mean()))
    assert whole.ce_zero == pytest.approx(np.log(11))
    assert (kept.splice, whole.splice) == ("kept", "all")


def test_padding_is_neither_predicted_nor_measured():
    model, rows = FakeModel(), random_rows()
    result = evaluate(model, identity(), rows, SITE)
    padded = FakeRows(
        torch.cat([rows.tokens, torch.zeros(7, 4, dtype=torch.int64)], 1),
        torch.cat([rows.keep, torch.zeros(7, 4, dtype=torch.bool)], 1),
    )
    assert evaluate(model, identity(), padded, SITE) == result


def test_max_tokens_takes_whole_rows_whatever_the_batch():
    rows = random_rows(n_rows=20)
    results = [evaluate(FakeModel(), identity(), rows, SITE, max_tokens=30, rows_per_batch=b) for b in (1, 3, 20)]
    assert [r.n_tokens for r in results] == [32, 32, 32]
    assert [r.n_rows for r in results] == [4, 4, 4]


def test_given_mean_saves_the_first_pass():
    model, rows = FakeModel(), random_rows()
    mean = site_mean(model, rows, SITE)
    assert mean.tolist() == pytest.approx(kept_activations(model, rows).mean(0).tolist())
    own = evaluate(model, identity(), rows, SITE)
    model.read = lambda tokens, sites: pytest.fail("no first pass is needed")
    given = evaluate(model, identity(), rows, SITE, mean=mean)
    assert given.ce_mean == own.ce_mean
    assert (own.mean_source, given.mean_source) == ("tokens", "given")
    far = evaluate(model, identity(), rows, SITE, mean=mean + 1e4)
    assert far.fvu == own.fvu
    assert far.ce_mean != own.ce_mean


def test_fvu_keeps_its_digits_beside_a_massive_offset():
    model, rows = FakeModel(), random_rows()
    sae = constant(model.embed[1:].mean(0))
    model.embed = model.embed.clone()
    model.embed[:, 0] += 4096.0
    sae.b_dec = model.embed[1:].mean(0)
    x = kept_activations(model, rows)
    expected = float((x - sae.b_dec.double()).square().sum() / (x - x.mean(0)).square().sum())
    assert evaluate(model, sae, rows, SITE).fvu == pytest.approx(expected, rel=1e-9)


def test_bad_input_is_one_line():
    model, rows = FakeModel(), random_rows()
    with pytest.raises(ActivationError, match=r"width 5, but .* has width 6") as error:
        evaluate(model, identity(5), rows, SITE)
    assert "\n" not in str(error.value)
    with pytest.raises(SiteError):
        evaluate(model, identity(), rows, "blocks.9.hook_resid_post")
    with pytest.raises(TextError, match="no tokens"):
        evaluate(model, identity(), FakeRows(torch.zeros(2, 3, dtype=torch.int64)), SITE)
    with pytest.raises(ConfigError, match="max_tokens"):
        evaluate(model, identity(), rows, SITE, max_tokens=0)
    with pytest.raises(ActivationError, match="shape"):
        evaluate(model, identity(), rows, SITE, mean=torch.zeros(2))


@pytest.mark.parametrize("given_mean", [True, False])
def test_nan_activations_are_named_by_row(given_mean):
    model, rows = FakeModel(d_vocab=12), random_rows(n_rows=9)
    rows.tokens[5, 3] = 11
    model.embed[11, 2] = float("nan")
    mean = torch.zeros(6) if given_mean else None
    with pytest.raises(ActivationError, match=r"1 tokens \(rows 5; first at row 5, position 3\)"):
        evaluate(model, identity(), rows, SITE, rows_per_batch=2, mean=mean)
    rows.keep[5, 3] = False  # an excluded position may hold anything
    assert evaluate(FakeModel(d_vocab=12), identity(), rows, SITE, mean=mean).fvu == 0


def test_save_and_load(tmp_path):
    result = evaluate(FakeModel(), identity(), random_rows(), SITE)
    folder = save_evaluation(result, tmp_path / "eval")
    assert load_evaluation(folder) == result
    assert json.loads((folder / "evaluation.json").read_text())["ce_recovered"] == 1
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "evaluation"
    with pytest.raises(OutputExistsError):
        save_evaluation(result, folder)
    save_evaluation(result, folder, force=True)
    with pytest.raises(FormatError):
        load_evaluation(tmp_path)


def test_frame_and_repr():
    result = evaluate(FakeModel(), identity(), random_rows(), SITE)
    frame = result.to_frame()
    assert len(frame) == 1
    assert frame["l0_p50"][0] == 6
    assert frame["source"][0] == "fake-text"
    assert "\n" not in repr(result)
    assert len(repr(result)) < 250
    assert isinstance(result, Evaluation)


def test_real_model_agrees_with_hugging_face(shared):
    """Clean, zero- and mean-ablated cross-entropy of stories260K, recomputed with plain transformers hooks."""
    from transformers import AutoModelForCausalLM

    from saelab.models.subject import load_model
    from saelab.models.text import open_text
    from saelab.models.tokens import TokenRows, TokensConfig

    model = load_model(str(shared / "stories260K"))
    source = open_text(str(shared / "text" / "tinystories-600.jsonl"))
    rows = TokenRows(model.tokenizer, source, TokensConfig(context=48), model.n_ctx)
    site = "blocks.2.hook_resid_post"
    result = evaluate(model, identity(64), rows, site, max_tokens=500, rows_per_batch=4)
    assert result.n_tokens >= 500
    assert result.rows["context"] == 48
    assert (result.fvu, result.ce_recovered, result.kl_sae) == (0, 1, 0)

    batch = next(rows.batches(result.n_rows))
    plain = AutoModelForCausalLM.from_pretrained(shared / "stories260K", dtype=torch.float32).eval()
    layer = plain.model.layers[2]

    def cross_entropy(change):
        def hook(module, inputs, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x = change(x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = layer.register_forward_hook(hook)
        with torch.no_grad():
            logits = plain(batch.tokens).logits[:, :-1]
        handle.remove()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        return float(losses[batch.keep[:, 1:]].double().mean())

    seen = []
    clean = cross_entropy(lambda x: seen.append(x) or x)
    mean = seen[0][batch.keep].mean(0)
    assert result.ce_clean == pytest.approx(clean, rel=1e-5)
    assert result.ce_zero == pytest.approx(cross_entropy(lambda x: x * ~batch.keep[..., None]), rel=1e-5)
    assert result.ce_mean == pytest.approx(
        cross_entropy(lambda x: torch.where(batch.keep[..., None], mean, x)), rel=1e-5
    )
    assert result.ce_clean < result.ce_mean < result.ce_zero


# Other modes, other sites ---------------------------------------------------------------------------------------------


def trained_mutual_choice(model, rows, k=1.5):
    """A Mutual-Choice SAE with a threshold learned on batches of the very tokens it is evaluated on."""
    sae = build_sae(parse_config(ARCHITECTURES["mutual_choice"].config, {"d_in": 6, "d_sae": 24, "k": k}), seed=0)
    sae.train()
    for _ in range(3):
        sae.encode_training(Batch(kept_activations(model, rows).float()), StepContext())
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize("rows_per_batch", [1, 4, 50])
def test_mode_of_training_stands_beside_thresholds(rows_per_batch):
    model, rows = FakeModel(), random_rows(n_rows=50)
    sae = trained_mutual_choice(model, rows)
    result = evaluate(model, sae, rows, SITE, trained_batch=400, rows_per_batch=rows_per_batch)
    x = kept_activations(model, rows)
    code = sae.encode_as_trained(Batch(x.float()))
    error = (x - sae.decode(code)).square().sum()
    assert (result.trained_batch, result.trained_tokens) == (400, 400)
    assert result.l0_trained == pytest.approx(float((code.values > 0).sum()) / 400)
    assert result.fvu_trained == pytest.approx(float(error / (x - x.mean(0)).square().sum()))
    assert result.l0 != result.l0_trained  # ties and the last few tokens
    assert np.isnan(result.ce_recovered_trained)


def test_trained_batches_are_whole_and_shuffled_over_the_text():
    """Sorted text: batches in its order would give each half of the tokens the same budget."""
    model = FakeModel()
    model.embed[1:6] *= 0.1
    rows = FakeRows(torch.cat([torch.randint(1, 6, (25, 9)), torch.randint(6, 11, (25, 9))]))
    rows.keep[:, 0] = False
    sae = trained_mutual_choice(model, rows)
    shuffled = evaluate(model, sae, rows, SITE, trained_batch=100)
    whole = evaluate(model, sae, rows, SITE, trained_batch=400)
    assert shuffled.trained_tokens == 400
    assert shuffled.fvu_trained == pytest.approx(whole.fvu_trained, rel=0.05)
    assert evaluate(model, sae, rows, SITE, trained_batch=150).trained_tokens == 300
    assert evaluate(model, sae, rows, SITE, trained_batch=4096).trained_tokens == 400


class GradientFake(FakeModel):
    """Says that the loss depends on the first coordinate alone, or that the gradient is the activation."""

    def read_with_gradient(self, tokens, keep, sites):
        assert torch.is_grad_enabled()
        x = self.embed[tokens]
        return dict.fromkeys(sites, x), {site: self.gradient(x) for site in sites}


def test_both_modes_of_a_gradient_sae():
    model, rows = GradientFake(), random_rows(n_rows=30)
    config = {"d_in": 6, "d_sae": 24, "k": 2, "beta": 100.0}
    sae = build_sae(parse_config(ARCHITECTURES["gradient"].config, config), seed=0).eval().requires_grad_(False)
    eye = torch.cat([torch.eye(6), -torch.eye(6), torch.zeros(12, 6)])
    sae.W_dec.copy_(eye)
    sae.w_enc_t.copy_(eye)
    model.gradient = torch.zeros_like
    same = evaluate(model, sae, rows, SITE)
    assert same.ce_trained == same.ce_sae
    assert same.fvu_trained == pytest.approx(same.fvu)
    model.gradient = lambda x: torch.tensor([0, 0, 0, 0, 0, 1.0]).expand_as(x)
    other = evaluate(model, sae, rows, SITE, trained_batch=64)
    x = kept_activations(model, rows)
    code = sae.encode_as_trained(Batch(x.float(), None, model.gradient(x.float())))
    assert other.fvu_trained == pytest.approx(
        float((x - sae.decode(code)).square().sum() / (x - x.mean(0)).square().sum()),
        rel=0.15,  # incomplete batch out
    )
    assert other.fvu == same.fvu
    assert other.fvu_trained > other.fvu  # magnitude is the best choice for reconstruction
    assert other.ce_trained != other.ce_sae
    assert other.ce_recovered_trained == pytest.approx(
        (other.ce_zero - other.ce_trained) / (other.ce_zero - other.ce_clean)
    )
    plain = evaluate(FakeModel(), sae, rows, SITE)  # a model without gradients
    assert plain.trained_tokens == 0
    assert np.isnan(plain.l0_trained)


class TwoSites(FakeModel):
    """A second site, y = x M, from which the logits are made."""

    target = "blocks.0.hook_mlp_out"

    def __init__(self):
        super().__init__()
        self.M = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
        self.W_U = self.W_U[:4]

    def width(self, site):
        return 4 if site == self.target else super().width(site)

    def read(self, tokens, sites):
        x = self.embed[tokens]
        return {site: x @ self.M if site == self.target else x for site in sites}

    def logits(self, tokens, replace=None):
        replace = replace or {}
        x = replace.get(SITE, lambda a: a)(self.embed[tokens])
        return replace.get(self.target, lambda a: a)(x @ self.M) @ self.W_U


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_replaces_its_target_by_what_it_makes_of_its_input(skip):
    model, rows = TwoSites(), random_rows(n_rows=12)
    config = {"d_in": 6, "d_sae": 24, "k": 2, "d_target": 4, "skip": skip}
    sae = build_sae(parse_config(ARCHITECTURES["transcoder"].config, config), seed=0).eval().requires_grad_(False)
    if skip:  # the skip path is the whole truth, the features add nothing
        sae.W_skip.copy_(model.M)
        sae.W_dec.zero_()
    result = evaluate(model, sae, rows, SITE, target_site=model.target)
    assert (result.site, result.target_site) == (SITE, model.target)
    x = kept_activations(model, rows)
    y = x @ model.M.double()
    y_hat = sae(x.float()).double()
    assert result.fvu == pytest.approx(
        float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-6, abs=1e-9
    )
    assert result.fvu_trained == pytest.approx(result.fvu, rel=1e-6, abs=1e-9)
    if skip:
        assert result.ce_recovered == pytest.approx(1)
    else:
        logits = torch.zeros(12, 9, 4).index_put((rows.keep.nonzero(as_tuple=True)), y_hat.float()) @ model.W_U
        bos = (model.embed[0] @ model.M) @ model.W_U
        logits[:, 0] = bos
        log_p = logits[:, :-1].log_softmax(-1)
        expected = -log_p.gather(2, rows.tokens[:, 1:, None]).double().mean()
        assert result.ce_sae == pytest.approx(float(expected), rel=1e-5)
    assert result.l0 == 2


def test_target_of_another_width_is_refused():
    config = {"d_in": 6, "d_sae": 24, "k": 2, "d_target": 5}
    sae = build_sae(parse_config(ARCHITECTURES["transcoder"].config, config), seed=0).eval()
    with pytest.raises(ActivationError, match=r"makes activations of width 5, but blocks\.0\.hook_mlp_out .* width 4"):
        evaluate(TwoSites(), sae, random_rows(), SITE, target_site=TwoSites.target)


def test_evaluations_of_before_the_modes_can_be_read(tmp_path):
    evaluation = evaluate(FakeModel(), identity(), random_rows(), SITE)
    save_evaluation(evaluation, tmp_path / "e")
    data = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    new = ("target_site", "fvu_trained", "l0_trained", "trained_batch", "trained_tokens")
    old = {key: value for key, value in data.items() if key not in new}
    (tmp_path / "e" / "evaluation.json").write_text(json.dumps(old))
    assert load_evaluation(tmp_path / "e").fvu == evaluation.fvu
