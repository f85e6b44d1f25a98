"""vLLM, its own classes or its Transformers backend, as its resolver picks."""

import os
from typing import Any

import numpy as np
from protocol import Loaded, answer
from vllm_settings import settle

# Attention kernels would compute float32 products in TF32, ten bits of mantissa, on a GPU.
settle(TRITON_F32_DEFAULT="ieee")


def load(model: str, options: dict[str, Any]) -> Loaded:
    ranks = options.get("tensor_parallel", 1)
    if ranks == 1:
        # The engine in this process: a second one would import everything again.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        trust_remote_code=True,
        dtype=options.get("dtype", "float32"),
        max_model_len=options.get("max_model_len", 256),
        max_num_seqs=4,
        tensor_parallel_size=ranks,
        enforce_eager=options.get("eager", True),
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        **options.get("engine", {}),
    )
    tokenizer = engine.get_tokenizer()

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, logprobs=-1, ignore_eos=True)
        made = engine.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)[0].outputs[0]
        vocabulary = len(made.logprobs[0])
        logits = np.full((len(made.token_ids), vocabulary), np.nan, dtype=np.float32)
        for row, step in zip(logits, made.logprobs, strict=True):
            for token, entry in step.items():
                row[token] = entry.logprob
        return list(made.token_ids), logits

    return Loaded(greedy, lambda text: tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    answer(load)
