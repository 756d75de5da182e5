"""Tasks: every shipped file draws sound prompts; splits are apart; other projects' files are read."""

import json

import pytest

from saelab.analysis.circuits.generators import draw
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.prompt_files import read_prompts
from saelab.analysis.circuits.tasks import load_task, split_of, task_batch, task_names
from saelab.analysis.circuits.truth import truth_for, truth_names, truth_spec
from saelab.core.errors import ConfigError, FormatError, MissingFileError
from saelab.models.subject import load_model


class Bare:
    """A model without a tokenizer."""

    name, d_vocab, n_ctx, device = "bare", 40, 64, "cpu"

    @property
    def tokenizer(self):
        from saelab.core.errors import ModelError

        raise ModelError("none")


@pytest.mark.parametrize("name", task_names())
def test_every_task_draws_different_prompts_of_its_split(name):
    spec = load_task(name)
    for split in ("train", "heldout"):
        prompts = draw(spec, Bare(), 15, seed=1, split=split)
        assert len({p.clean for p in prompts}) == 15
        assert all(split_of(p) == split for p in prompts)
        assert all(p.right and p.clean != p.corrupted for p in prompts)
        assert not any("{" in text for p in prompts for text in (p.clean, p.corrupted) if isinstance(text, str))
    assert draw(spec, Bare(), 5, 1, "train") == draw(spec, Bare(), 5, 1, "train")


def test_embedded_model_tasks_are_aligned_and_the_model_can_do_them():
    from saelab.analysis.circuits.metrics import at_readout, measure

    model = load_model("embedded")
    for name in ("bracket", "recall"):
        batch = task_batch(name, model, 16)
        assert batch.dropped == 0
        at = at_readout(model.logits(batch.clean), batch.readout)
        other = at_readout(model.logits(batch.corrupted), batch.readout)
        assert float((measure("logit_diff", at, batch, at) > 0).float().mean()) > 0.9
        assert float((measure("logit_diff", other, batch, at) < 0).float().mean()) > 0.9


def test_proportion_and_reverse_answers():
    for prompt in draw(load_task("reverse"), Bare(), 40, 0, "train"):
        letters = [t for t in prompt.clean[1:] if t < 4]
        slots = sum(t == 4 for t in prompt.clean)
        assert prompt.right == ((letters[-slots],),)


def test_known_circuits():
    gpt2 = EdgeGraph(12, 12, 12, True, False)
    ioi = truth_for("ioi-gpt2-small", gpt2)
    assert ioi.nodes.sum() == 26
    names = gpt2.names(ioi.edges)
    assert "a2.h2->a5.h5<k>" in names
    assert "a9.h9->logits" in names
    assert "a10.h7->a9.h9<q>" not in names
    assert truth_for("greater-than-gpt2-small", gpt2).nodes.sum() == 17
    # 24 edges between parts, and 13 input slots: the 37 that ACDC counts.
    docstring = truth_spec("docstring-attn-only-4l").edges
    assert len(docstring) + len({e.split("->")[1] for e in docstring if "logits" not in e}) == 37
    with pytest.raises(ConfigError, match="it is known for gpt2"):
        truth_for("ioi-gpt2-small", EdgeGraph(2, 2, 2, True, False))
    assert set(truth_names()) >= {"reverse", "proportion", "hand-induction"}


def test_prompt_files(tmp_path):
    files = {
        "a.csv": "clean,corrupted,label\nfrom 1352 to 13,from 1301 to 13,52\n",
        "b.csv": ',clean,corrupted,correct_idx,incorrect_idx\n0,"Aaron and Amber sat. Aaron gave it to",'
        '"Aaron and Amber sat. Tom gave it to",1,2\n',
        "c.jsonl": json.dumps({"clean_prefix": "The man", "patch_prefix": "The men", "clean_answer": " is",
                               "patch_answer": " are"}),
        "d.json": json.dumps(["Then, Dan and Mary left. Mary gave a bone to!!!"]),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (read_prompts(tmp_path / name)[0] for name in files)
    assert (len(a.right), len(a.wrong), a.right[0]) == (47, 53, "53")
    assert (b.right, b.wrong) == ((" Amber",), (" Aaron",))
    assert (c.right, c.wrong) == ((" is",), (" are",))
    assert (d.right, d.wrong) == ((" Dan",), (" Mary",))
    assert "Mary" not in d.corrupted
    assert not d.clean.endswith("!")


def test_shared_prompt_files_are_read(shared):
    for path in sorted((shared / "prompts").glob("*")):
        assert len(read_prompts(path)) > 200, path.name


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(MissingFileError, match="did you mean bracket"):
        load_task("brackets")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FormatError, match="no prompt file"):
        read_prompts(tmp_path / "x.csv")
