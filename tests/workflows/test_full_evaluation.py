"""``saelab eval --full`` on the embedded model, and the labels it makes."""

import json

import numpy as np
import pytest

from saelab.analysis.saebench import EVALS, load_full_evaluation
from saelab.analysis.saebench.examples import collect
from saelab.analysis.saebench.local_sets import python_windows, read_labelled_texts, text_set, token_sets
from saelab.analysis.saebench.python_labels import ATTRIBUTES
from saelab.analysis.saebench.spelling import spelling_set, words_of
from saelab.core.errors import TextError
from saelab.models.subject import load_model
from saelab.models.text import open_text
from saelab.sae.folder import load_sae
from tests.made import SITE, saelab


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


@pytest.fixture(scope="module")
def sae(made):
    return load_sae(made / "train" / "sae")


CODE = ['"""Doc."""\nclass A:\n    def f(self, x):\n        return [len(x), "abc def"]  # note\n']


def test_tokens_carry_the_labels_of_their_characters(model):
    windows = python_windows(open_text(CODE * 3), model.tokenizer, context=16, max_tokens=1000)
    head = windows.tokens[0, 0].item() == model.tokenizer.bos_token_id
    texts = {
        (row, column): model.tokenizer.decode([int(windows.tokens[row, column])])
        for row, column in np.argwhere(windows.real)
    }
    assert head or model.tokenizer.bos_token_id is None
    assert not windows.real[0, 0] or not head
    seen = {
        (text.strip(), ATTRIBUTES[name][values[place]])
        for place, text in texts.items()
        for name, values in windows.labels.items()
        if values[place] >= 0
    }
    for pair in (("class", "keyword"), ("return", "keyword"), ("len", "builtin"), ("def", "class body")):
        assert pair in seen or pair == ("def", "class body"), pair
    assert ("return", "method") in seen
    assert ("return", "level 2") in seen
    assert set(windows.document.tolist()) == {0, 1, 2}


def test_what_is_no_python_is_left_out(model):
    windows = python_windows(open_text(["Once upon a time. " * 9, *CODE]), model.tokenizer, context=32, max_tokens=999)
    assert set(windows.document.tolist()) == {1}
    with pytest.raises(TextError, match=r"no document of .* is valid Python"):
        python_windows(open_text(["Once upon a time."]), model.tokenizer, context=32, max_tokens=99)


def test_pooling_is_the_mean_over_positions(model, sae):
    import torch

    tokens = torch.randint(10, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    example = np.array([[-1, 0, 0, 0, -1, -1], [-1] * 6, [-1, 1, 2, 1, -1, 2]])
    found = collect(model, SITE, {"sae": sae}, tokens, example)
    x = next(iter(model.read(tokens, [SITE]).values()))
    for number in range(3):
        at = torch.from_numpy(example == number)
        np.testing.assert_allclose(found.x[number], x[at].mean(0), rtol=1e-4, atol=1e-5)
        dense = sae.encode(x[at]).to_dense().mean(0)
        np.testing.assert_allclose(found.codes["sae"][[number]].toarray()[0], dense, rtol=1e-4, atol=1e-5)


def test_token_sets_split_by_document(model, sae):
    windows = python_windows(open_text("stdlib:heldout"), model.tokenizer, context=64, max_tokens=12_000)
    sets, labels = token_sets(model, SITE, {"sae": sae}, windows, per_class=150, seed=0)
    assert {data.name for data in sets} >= {"token_class", "text"}
    assert len(labels["train"]) == len(labels["pooled"].x)
    for data in sets:
        for k in range(len(data.classes)):
            assert min((data.y[data.train] == k).sum(), (data.y[~data.train] == k).sum()) >= 40
    again, _ = token_sets(model, SITE, {"sae": sae}, windows, per_class=150, seed=0)
    np.testing.assert_array_equal(again[0].y, sets[0].y)
    np.testing.assert_array_equal(again[0].train, sets[0].train)


def labelled(path, n=60):
    rows = [{"text": f"import module{i}\n", "label": "import"} for i in range(n)]
    rows += [{"text": f"return value{i}\n", "label": 7} for i in range(n)] + [{"text": "x", "label": "rare"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_of_the_user(model, sae, tmp_path):
    path = labelled(tmp_path / "mine.jsonl")
    data = text_set(model, SITE, {"sae": sae}, model.tokenizer, path, context=16, per_class=50, seed=0)
    assert (data.name, data.classes) == ("mine", ("7", "import"))
    assert len(data.y) == 100
    assert 10 < (~data.train).sum() < 45


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{nope\n", "line 1 is not JSON"),
        ('{"text": "a", "label": "b"}\n{"text": 3, "label": "b"}\n', "line 2 needs a string 'text'"),
        ('{"text": "a"}\n', "line 1 needs a string 'text' and a 'label'"),
        ('{"text": "a", "label": "b"}\n' * 50, "has 1 labels with at least 40 texts"),
    ],
)
def test_bad_labels(tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(TextError, match=says) as caught:
        read_labelled_texts(tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)


def test_words_are_single_tokens(model, sae):
    ids, words = words_of(model.tokenizer)
    assert len(words) > 100
    assert all(model.tokenizer.decode([i]) == " " + model.tokenizer.decode([i])[1:] for i in ids[:50])
    data = spelling_set(model, SITE, {"sae": sae}, model.tokenizer)
    assert len(data.y) == len(words)
    assert [data.classes[k] for k in data.y[:20]] == [word[0] for word in words[:20]]
    sides = {}
    for word, train in zip(words, data.train, strict=True):
        assert sides.setdefault(word, train) == train


def test_command(capsys, made, tmp_path):
    labels = labelled(tmp_path / "mine.jsonl")
    small = ["--full", "--evals", "core,sparse_probing,absorption_first_letter,mdl", "--max_tokens", 700]
    common = [made / "train" / "sae", "--text", made / "code.txt", "--labels", labels]
    capsys.readouterr()
    assert saelab("eval", *common, *small, "--json", "--out", tmp_path / "full") == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["evals"]) == ["core", "sparse_probing", "absorption_first_letter", "mdl"]
    core = data["evals"]["core"]
    assert core["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(8, abs=2)
    ours = core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    for control in ("untrained", "shuffled"):
        assert core["controls"][control]["reconstruction_quality"]["explained_variance"] < ours
    probing = data["evals"]["sparse_probing"]
    assert probing["eval_result_details"][0]["dataset_name"] == "mine"
    assert probing["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] > 0.9
    saved = load_full_evaluation(tmp_path / "full")
    assert saved["evals"]["core"]["eval_result_metrics"] == core["eval_result_metrics"]
    assert [row["eval"] for row in saved["headline"]].count("core") == 4
    assert saelab("show", tmp_path / "full") == 0


def test_bad_input_is_one_line(capsys, made, tmp_path):
    sae = made / "train" / "sae"
    probing = [sae, "--full", "--evals", "sparse_probing"]
    cases = [
        ([sae, "--full", "--evals", "cor"], 1, "unknown evaluation 'cor'; did you mean core"),
        ([sae, "--evals", "core"], 2, "add --full"),
        ([*probing, "--labels", tmp_path / "no.jsonl", "--max_tokens", 600], 1, "no.jsonl does not exist"),
        ([sae, "--full", "--evals", "mdl", "--max_tokens", 100], 1, "too few to evaluate on, at least 500"),
    ]
    for args, code, text in cases:
        capsys.readouterr()
        assert saelab("eval", *args) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saelab: ")]
        assert len(lines) == 1
        assert text in lines[0]
    assert len(EVALS) == 8
