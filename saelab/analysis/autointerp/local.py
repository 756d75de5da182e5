"""A judge in this process: a chat model of Hugging Face transformers, greedy, one request after another."""

from collections.abc import Sequence
from typing import Any

from saelab.analysis.autointerp.judge import Done, Reply, Request, as_dicts
from saelab.core.errors import ModelError
from saelab.core.progress import progress


class LocalJudge:
    """Answers with a chat model loaded here. Raises :class:`ModelError` when it cannot be loaded or has no template."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, self.device = model, device
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self._model: Any = AutoModelForCausalLM.from_pretrained(model).to(device).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"cannot load judge {model}: {reason}; give a Hugging Face id or folder") from None
        if not getattr(self._tokenizer, "chat_template", None):
            raise ModelError(f"judge {model} has no chat template; give a chat (instruct) model")

    def ask(self, requests: Sequence[Request], done: Done) -> None:
        """Answer all requests in turn."""
        with progress(f"ask {self.name}"[-24:], len(requests), unit="requests") as bar:
            for place, request in enumerate(requests):
                done(place, self._answer(request))
                bar.advance(1)

    def _answer(self, request: Request) -> Reply:
        import torch

        ids = self._tokenizer.apply_chat_template(
            as_dicts(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(self.device)
        room = int(getattr(self._model.config, "max_position_embeddings", 1 << 30)) - ids.shape[1]
        if room < 1:
            return Reply("", error=f"the prompt has {ids.shape[1]} tokens, more than {self.name} reads")
        sampling = {"do_sample": True, "temperature": request.temperature} if request.temperature > 0 else {}
        with torch.no_grad():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(request.max_tokens, room),
                output_scores=request.logprobs,
                return_dict_in_generate=True,
                pad_token_id=self._tokenizer.eos_token_id,
                **(sampling or {"do_sample": False}),
            )
        new = made.sequences[0, ids.shape[1] :]
        logprobs = []
        if request.logprobs:
            for token, scores in zip(new.tolist(), made.scores, strict=True):
                best = scores[0].log_softmax(-1).topk(min(10, scores.shape[-1]))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                likeliest = tuple((self._tokenizer.decode([i]), value) for i, value in pairs)
                logprobs.append((self._tokenizer.decode([token]), likeliest))
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return Reply(text, prompt_tokens=ids.shape[1], completion_tokens=len(new), logprobs=tuple(logprobs))
