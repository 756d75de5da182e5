"""The judge in this process: a chat model of two small layers, made here."""

import pytest

from saelab.analysis.autointerp.judge import Request, ask_all
from saelab.analysis.autointerp.local import LocalJudge
from saelab.analysis.autointerp.prompts import Message
from saelab.core.errors import ModelError

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "system", "user", "assistant", "hello", "0", "1", "[", "]", ","]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    path = tmp_path_factory.mktemp("judge")
    fast.save_pretrained(path / "plain")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path / "chat")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    for name in ("plain", "chat"):
        LlamaForCausalLM(config).save_pretrained(path / name)
    return path


def ask(judge, text="hello hello", **options):
    return ask_all(judge, [Request((Message("user", text),), max_tokens=4, **options)])[0]


def test_answers_are_greedy_and_repeatable(folder):
    judge = LocalJudge(str(folder / "chat"))
    first = ask(judge)
    assert first == ask(judge)
    assert first.prompt_tokens == 3
    assert 1 <= first.completion_tokens <= 4
    assert first.error == ""


def test_log_probabilities(folder):
    reply = ask(LocalJudge(str(folder / "chat")), logprobs=True)
    assert len(reply.logprobs) == reply.completion_tokens
    token, likeliest = reply.logprobs[0]
    assert likeliest[0][0] == token  # greedy: the first is the likeliest
    assert all(value <= 0 for _, value in likeliest)


def test_a_prompt_that_does_not_fit_is_an_error_of_that_request(folder):
    reply = ask(LocalJudge(str(folder / "chat")), "hello " * 40)
    assert "more than" in reply.error


def test_a_base_model_and_a_missing_one_are_refused(folder):
    with pytest.raises(ModelError, match="no chat template"):
        LocalJudge(str(folder / "plain"))
    with pytest.raises(ModelError, match="cannot load judge"):
        LocalJudge(str(folder / "nothing"))
