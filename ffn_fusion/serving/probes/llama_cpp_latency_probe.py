"""llama.cpp, through llama-cpp-python: prefill and decode time of one sequence; all layers on the GPU if it has one."""

from typing import Any

import llama_cpp
from pipe import Decode, prompt_ids, serve


def start(request: dict[str, Any]) -> Decode:
    loaded = llama_cpp.Llama(
        request["model"],
        n_ctx=request["max_length"],
        n_batch=request["max_length"],
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=-1 if request["on_gpu"] else 0,
        verbose=False,
    )

    def decode(batch_size: int, prompt_length: int, new_tokens: int) -> None:
        assert batch_size == 1
        loaded.reset()
        # The first token comes with the prompt.
        loaded.eval(prompt_ids(prompt_length, vocabulary=request["vocabulary"]))
        for _ in range(new_tokens - 1):
            loaded.eval([loaded.sample(temp=0.0)])
        loaded.sample(temp=0.0)

    return decode


if __name__ == "__main__":
    serve(start)
