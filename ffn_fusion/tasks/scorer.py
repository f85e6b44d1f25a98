"""Our loaded model as the harness' own `hf` model, quicker: contexts and tokens shared, answers stopped one by one."""

import logging
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.continuations import Answer, score_continuations

# It warns that a loaded model is not a name, and more that a user cannot act on.
logging.getLogger("lm_eval").setLevel(logging.ERROR)

Tokens = dict[str, "array[int]"]
Conversation = list[dict[str, str]]

LOGIT_BYTES = 12
"""A token whose logits are read takes this many bytes for each entry of the vocabulary: logits, float32, a copy."""
CPU_TOKENS = 1024
"""On a CPU, more at once is not quicker."""
MAX_TOKENS = 32_768


class _StopString(StopStringCriteria):  # type: ignore[misc]
    """Stop strings in what was generated; the end of the prompt is no part of one, as in the harness."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], prompt_width: int) -> None:
        super().__init__(tokenizer, stop)
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        done: torch.Tensor = super().__call__(input_ids[:, self._prompt_width :], scores, **options)
        return done


class Scorer(HFLM):  # type: ignore[misc]
    """`model` for the harness. `tokens` keeps encoded strings, so that models with one tokenizer encode them once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> None:
        super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=8)
        self._tokens = tokens

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is not None or left_truncate_len or kwargs:
            encoded: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
            return encoded
        if string not in self._tokens:
            self._tokens[string] = array("i", super().tok_encode(string))
        return self._tokens[string].tolist()

    def _encode_all(self, texts: Iterable[str]) -> None:
        """Encode many strings at once, which uses every core."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        # Of these the harness keeps the tokenizer from putting another one in front.
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens and not text.startswith(begin)]
        for ids, text in zip(self.tokenizer(new, verbose=False)["input_ids"] if new else [], new, strict=True):
            self._tokens[text] = array("i", ids)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = score_continuations(self.model, pairs, self.max_length, self._budget())
        found = dict(tqdm(answers, total=len(pairs), disable=disable_tqdm, desc="scoring"))
        return [found[i] for i in range(len(pairs))]

    def _prompts_at_once(self, requests: list[Instance], room: int) -> int:
        """As many prompts, each with `room` for its answer, as a third of the free memory holds the caches of."""
        if self.device.type != "cuda":
            return 8
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        length = max(len(self.tok_encode(request.args[0])) for request in requests) + room
        cache: int = 4 * config.num_hidden_layers * heads * head_dim * length
        return max(1, min(256, torch.cuda.mem_get_info(self.device)[0] // 3 // cache))

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """A prompt is done at its own stop string; the harness' criterion waits for all to reach the same one."""
        if not options["do_sample"]:
            options.pop("temperature", None)  # of which transformers would warn
        tokens: torch.Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([_StopString(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return tokens

    def _budget(self) -> int:
        if self.device.type != "cuda":
            return CPU_TOKENS
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        vocabulary: int = self.model.config.vocab_size
        return min(MAX_TOKENS, free // 4 // (LOGIT_BYTES * vocabulary))

    def answer(self, kind: str, requests: list[Instance], quiet: bool = False) -> list[Any]:
        """Answers to requests of one of the harness' kinds, with its progress bar where there is a terminal."""
        if kind == "generate_until":
            room = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
            if room >= self.max_length:
                raise UserError(f"its answers may take {room:,} tokens; the model takes {self.max_length:,} at most")
            self.batch_size_per_gpu = self._prompts_at_once(requests, room)
        else:
            self._encode_all(text for request in requests for text in _as_encoded(*request.args))
        answers: list[Any] = getattr(self, kind)(requests, disable_tqdm=quiet or not sys.stderr.isatty())
        return answers

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to prompts, which already hold the chat template if one is wanted."""
        options = {"until": list(stop), "do_sample": False, "temperature": 0.0, "max_gen_toks": max_tokens}
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=i)
            for i, prompt in enumerate(prompts)
        ]
        return self.answer("generate_until", requests)

    def log_probability(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Sum of log-probabilities of each answer's tokens after its prompt, in nats."""
        pairs = zip(prompts, answers, strict=True)
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)
        ]
        return [value for value, _ in self.answer("loglikelihood", requests)]


def _as_encoded(context: str, continuation: str = "") -> tuple[str, str]:
    """The strings that the harness encodes for a request: spaces at a context's end go over to the continuation."""
    return context.rstrip(), context + continuation


def chat_prompt(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """A conversation as a prompt, by the tokenizer's chat template."""

    def render(conversation: Conversation, add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return render


def plain_prompt(conversation: Conversation) -> str:
    """A conversation as a prompt for a model without a chat template."""
    return "\n\n".join(turn["content"] for turn in conversation) + "\n\n"
