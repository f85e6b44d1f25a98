"""transformers: greedy decoding with and without a draft model, the two taking turns."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Calls:
    """Counts the forward passes of a model; each of a draft proposes a token, each of a target ends a round."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.number = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def load(model: str, options: dict[str, Any]) -> Any:
    dtype = getattr(torch, options["dtype"])
    loaded = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=True, dtype=dtype, device_map=options["device"]
    )
    loaded.generation_config.num_assistant_tokens = options["draft_tokens"]
    loaded.generation_config.num_assistant_tokens_schedule = "constant"
    # Or a draft that is unsure of itself would stop early, and the number proposed be another one each round.
    loaded.generation_config.assistant_confidence_threshold = 0.0
    return loaded.eval()


def decode(target: Any, prompt: list[int], new_tokens: int, draft: Any = None) -> tuple[list[int], float]:
    """New tokens and seconds."""
    ids = torch.tensor([prompt], device=target.device)
    start = time.perf_counter()
    made = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=-1,
        pad_token_id=0,
        assistant_model=draft,
    )
    return made[0, len(prompt) :].tolist(), time.perf_counter() - start


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target, draft = (load(request[name], request["options"]) for name in ("model", "draft"))
    new_tokens = request["new_tokens"]
    for helper in (None, draft):
        decode(target, request["prompts"][0], new_tokens, helper)
    rounds, proposed = Calls(target), Calls(draft)
    plain, drafted, total = [], [], {"rounds": 0, "proposed": 0}
    for prompt in request["prompts"]:
        plain.append(decode(target, prompt, new_tokens))
        before = rounds.number
        drafted.append(decode(target, prompt, new_tokens, draft))
        total["rounds"] += rounds.number - before
    total["proposed"] = proposed.number
    # A round gives what was accepted and one token of the target's own.
    total["accepted"] = sum(len(tokens) for tokens, _ in drafted) - total["rounds"]
    answer = {"plain": plain, "drafted": drafted, **total}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
