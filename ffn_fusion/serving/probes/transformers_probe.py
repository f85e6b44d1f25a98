"""transformers, through the folder's own model code."""

from typing import Any

import numpy as np
import torch
from protocol import Loaded, answer
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: str, options: dict[str, Any]) -> Loaded:
    dtype = getattr(torch, options.get("dtype", "float32"))
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        ids = torch.tensor([list(prompt)])
        made = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=None,
            max_new_tokens=new_tokens,
            # An end token would stop some sequences early.
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            cache_implementation=options.get("cache"),
        )
        logits = torch.cat(made.logits).float().numpy()
        return made.sequences[0, ids.shape[1] :].tolist(), logits

    return Loaded(greedy, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    answer(load)
