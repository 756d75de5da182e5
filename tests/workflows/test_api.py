"""The public functions: one convention, open objects in place of names, and results that can all do the same."""

import dataclasses
import html
import inspect
from typing import Literal

import pandas as pd
import pytest
import torch
from plotly.graph_objects import Figure

import saelab
from saelab.core import plotting
from saelab.core.errors import ConfigError, FormatError, MissingFileError
from saelab.core.result import Result
from saelab.sae import ARCHITECTURES, build_sae
from saelab.sae.registry import Architecture
from saelab.sae.topk import TopKConfig, TopKSAE
from saelab.workflows.train import TrainJob
from tests.made import SITE

SMALL = {"site": SITE, "sae": {"d_sae": 64, "k": 4}, "training": {"tokens": 4096, "batch_size": 512}}


@pytest.fixture(scope="module")
def model():
    return saelab.load_model("embedded")


@pytest.fixture(scope="module")
def grid(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "grid"
    return saelab.train("demo-topk.yaml", store=made / "store", out=out, grid={"training.seed": [0, 1]}, **SMALL)


@pytest.fixture(scope="module")
def results(made, model, grid, tmp_path_factory):
    """One small real result of every public function."""
    out, text = tmp_path_factory.mktemp("results"), made / "code.txt"
    sae = saelab.load_sae(made / "train" / "sae")
    store = saelab.harvest(model, SITE, text=text, max_tokens=3000, out=out / "store", tokens={"context": 64})
    features = saelab.open_features(made / "features")
    tiny = {"max_tokens": 2500, "downstream_tokens": 300, "pursuit_tokens": 100, "synthetic_tokens": 200}
    errors = {"tokens": 1024, "expansion": 1, "batch_size": 256, "k": 8}
    induction = {"n": 8, "n_heldout": 8}
    few = {"explain": 10, "score": 10, "random": 5, "decoder": 0, "coactive": 0, "embedding": 0}
    return {
        "harvest": store,
        "open_store": saelab.open_store(made / "store"),
        "train": grid,
        "evaluate": saelab.evaluate(sae, model=model, text=text, max_tokens=500, out=out / "evaluation"),
        "evaluate full": saelab.evaluate(sae, model=model, text=text, max_tokens=500, full=True, evals="core"),
        "build_features": saelab.build_features(sae, model=model, text=text, max_tokens=2000, out=out / "features"),
        "open_features": features,
        "dark_matter": saelab.dark_matter(sae, store, model=model, out=out / "dm", error_saes=errors, **tiny),
        "compare": saelab.compare(grid[0], grid[1], text=text, max_tokens=1500, targets=8, out=out / "comparison"),
        "explain": saelab.explain(features, sae=sae, model=model, max_features=5, control_features=5, examples=few),
        "sparsify": saelab.sparsify(model, {"method": {"name": "magnitude"}, "sparsity": 0.5}, text=text,
                                    calibration=text, eval_tokens=512, out=out / "sparse"),
        "lazy_neurons": saelab.lazy_neurons(model, sae=sae, text=text, max_tokens=500, curve_tokens=200),
        "core_neurons": saelab.core_neurons(model, text=text, max_tokens=500, prefix=16, alphas=[0.05], betas=[0.5],
                                            rounds=1),
        "circuits.find": saelab.circuits.find("induction", "induction-trained", n_random=3, **induction),
        "circuits.heads": saelab.circuits.heads("induction", "induction-trained", pooling="last", n=8),
        "circuits.compare": saelab.circuits.compare("induction", "induction-trained", pooling="last",
                                                    methods=["eap", "dfa"], **induction),
        "circuits.features": saelab.circuits.features(sae, "bracket", model=model, n=4, n_heldout=4, n_exact=2),
        "show": saelab.show([1, 2], features),
        "open_result": saelab.open_result(out / "dm"),
    }  # fmt: skip


def test_every_result_has_a_frame_figures_a_line_and_a_display(results):
    for name, result in results.items():
        assert isinstance(result, Result), name
        frame = result.to_frame()
        assert isinstance(frame, pd.DataFrame), name
        assert len(frame), name
        line = repr(result)
        assert "\n" not in line, name
        assert 20 < len(line) < 500, (name, line)
        shown = result._repr_html_()
        assert "<script" not in shown.lower(), name
        if name != "show":
            assert html.escape(line) in shown, name
            assert len(shown) < 20_000, name
        with pytest.raises(ConfigError, match="no figure 'nothing'"):
            result.plot("nothing")


def test_every_figure_has_the_template_axis_titles_and_its_frame(results):
    seen = set()
    for name, result in results.items():
        figures = result.figures()
        assert list(figures), name
        for key, (figure, frame) in figures.items():
            where = f"{name}: {key}"
            assert isinstance(figure, Figure), where
            assert figure.layout.template == plotting.template(), where
            assert isinstance(frame, pd.DataFrame), where
            assert len(frame), where
            assert figure.data, where
            axes = [a for a in figure.layout if a.startswith(("xaxis", "yaxis"))]
            assert {"xaxis", "yaxis"} <= set(axes), where
            for axis in axes:
                assert figure.layout[axis].title.text, f"{where}: {axis} has no title"
            seen.add(key)
        assert isinstance(result.plot(), Figure), name
    assert {"fvu", "matching", "loss", "density", "norms", "scores", "comparison", "circuit", "heads"} <= seen


def test_every_public_function_is_walked(results):
    made = {name.split(" ", maxsplit=1)[0] for name in results}
    plain = {"load_model", "open_text", "load_sae", "save_sae", "circuits", "contrast"}  # contrast: test_contrast.py
    functions = {n for n in saelab.__all__ if inspect.isfunction(getattr(saelab, n, None))}
    assert functions - plain <= made
    assert {f"circuits.{n}" for n in saelab.circuits.__all__} - {"circuits.graph", "circuits.attention"} <= made


def test_texts_from_outside_are_escaped():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Evil(Result):
        def to_frame(self):
            return pd.DataFrame({"<b>": ["<script>alert(1)</script>", "x"]})

        def figures(self):
            return {}

        def __repr__(self):
            return "<img onerror=x>"

    shown = Evil()._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert "<b>" not in shown


def test_a_typo_names_the_nearest_key(made, tmp_path):
    with pytest.raises(ConfigError, match=r"saelab.train: unknown key 'storee'; did you mean store"):
        saelab.train("demo-topk.yaml", storee=made / "store", out=tmp_path / "x")
    with pytest.raises(ConfigError, match=r"unknown key 'sae.kk'; did you mean sae.k"):
        saelab.train("demo-topk.yaml", store=made / "store", site=SITE, sae={"kk": 3}, out=tmp_path / "x")
    with pytest.raises(MissingFileError):
        saelab.evaluate("nowhere")


def test_dotted_keys_mappings_and_jobs_say_the_same(made, tmp_path):
    dotted = {"site": SITE, "sae.d_sae": 64, "sae.k": 4, "training.tokens": 4096, "training.batch_size": 512}
    one = saelab.train("demo-topk.yaml", store=made / "store", out=tmp_path / "a", **dotted)
    two = saelab.train("demo-topk.yaml", store=saelab.open_store(made / "store"), out=tmp_path / "b", **SMALL)
    job = TrainJob(store=str(made / "store"), site=SITE, sae=one[0].config["sae"], training=one[0].config["training"])
    three = saelab.train(job, out=tmp_path / "c")
    weights = [t.load().W_dec for t in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_an_open_model_is_used_and_not_loaded_again(made, model, monkeypatch):
    monkeypatch.setattr("saelab.models.subject.load_plain", lambda *a: pytest.fail("the model was loaded again"))
    sae = made / "train" / "sae"
    assert saelab.evaluate(sae, model=model, text=made / "code.txt", max_tokens=200).model == "embedded"


def test_an_sae_in_memory_is_used_as_it_is(made, model):
    kept = {"model": model, "text": made / "code.txt", "max_tokens": 300}
    sae = saelab.load_sae(made / "train" / "sae")
    before = saelab.evaluate(sae, **kept)
    with torch.no_grad():
        sae.W_dec.zero_()
    after = saelab.evaluate(sae, **kept)
    assert after.fvu > before.fvu
    assert saelab.evaluate(made / "train" / "sae", **kept).fvu == pytest.approx(before.fvu)

    config = ARCHITECTURES["topk"].config(architecture="topk", d_in=192, d_sae=64, k=4)
    fresh = build_sae(config)
    with pytest.raises(ConfigError, match="does not record its site"):
        saelab.evaluate(fresh, **kept)
    assert saelab.evaluate(fresh, site=SITE, **kept).d_sae == 64


def test_a_list_of_strings_is_a_text(model, tmp_path):
    texts = [f"def f{i}():\n    return {i}\n" for i in range(200)]
    store = saelab.harvest(model, SITE, text=texts, max_tokens=500, out=tmp_path / "store")
    assert store.n_rows == 500


def test_sparsify_leaves_the_open_model_alone(results, model):
    assert float((next(model.plain.parameters()) == 0).float().mean()) < 0.01
    assert results["sparsify"].sparsity == pytest.approx(0.5, abs=0.01)


def test_an_objective_of_ones_own_trains(made, tmp_path):
    calls = []

    def objective(sae, batch, context):
        found = sae.training_pass(sae.scale_batch(batch), context)
        found.losses["pull"] = 10 * sae.W_dec[:, 0].square().mean()
        calls.append(1)
        return found

    plain = saelab.train("demo-topk.yaml", store=made / "store", out=tmp_path / "plain", **SMALL).load()
    mine = saelab.train("demo-topk.yaml", store=made / "store", out=tmp_path / "own", objective=objective, **SMALL)
    assert len(calls) == 8
    assert mine.load().W_dec[:, 0].square().mean() < plain.W_dec[:, 0].square().mean()


def test_an_architecture_that_is_registered_later_trains(made, tmp_path, monkeypatch):
    class WideConfig(TopKConfig):
        """TopK that keeps one feature more at inference."""

        architecture: Literal["wide"] = "wide"

    class WideSAE(TopKSAE):
        """TopK that keeps one feature more at inference."""

        config: WideConfig

        def encode_scaled(self, x):
            kept = self.config
            object.__setattr__(self, "config", kept.model_copy(update={"k": kept.k + 1}))
            try:
                return super().encode_scaled(x)
            finally:
                object.__setattr__(self, "config", kept)

    monkeypatch.setitem(ARCHITECTURES._items, "wide", Architecture(WideConfig, WideSAE))
    small = {**SMALL, "sae": {"architecture": "wide", "d_sae": 64, "k": 4}}
    trained = saelab.train({}, store=made / "store", out=tmp_path / "wide", **small)
    sae = trained.load()
    assert isinstance(sae, WideSAE)
    assert sae.encode(torch.randn(3, 192)).offsets.diff().tolist() == [5, 5, 5]
    with pytest.raises(ConfigError, match="unknown architecture 'wider'; did you mean wide"):
        saelab.train({}, store=made / "store", out=tmp_path / "x", **{**SMALL, "sae": {"architecture": "wider"}})


def test_a_grid_is_a_sequence_by_number_and_name(grid):
    assert [run.name for run in grid] == grid.names() == ["seed=0", "seed=1"]
    assert grid["seed=1"].path == grid[1].path
    with pytest.raises(ConfigError, match="no run 'seed=2'"):
        grid["seed=2"]
    with pytest.raises(ConfigError, match="holds 2 SAEs; choose one"):
        saelab.evaluate(grid)
    again = saelab.open_result(grid.folder)
    pd.testing.assert_frame_equal(again.to_frame(), grid.to_frame())


def test_open_result_gives_back_what_was_made(made, results, tmp_path):
    assert repr(results["open_result"]) == repr(results["dark_matter"])
    assert isinstance(saelab.open_result(made / "features"), saelab.FeatureStore)
    assert isinstance(saelab.open_result(made / "train" / "sae"), saelab.SAE)
    with pytest.raises(MissingFileError):
        saelab.open_result(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text('{"kind": "sparsity-study", "saelab_version": "0.1.0", "format": 1}')
    with pytest.raises(FormatError, match="sparsity-study"):
        saelab.open_result(tmp_path)


def test_help_lists_every_key():
    shown = inspect.signature(saelab.train).parameters
    assert {"store", "sae", "training", "grid", "live", "objective"} <= set(shown)
    assert "training.lr_warmup" in saelab.train.__doc__
