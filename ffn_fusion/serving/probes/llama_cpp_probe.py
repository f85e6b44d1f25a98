"""llama.cpp, through llama-cpp-python; the cache in f32, because its default f16 hides or fakes differences."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from protocol import Loaded, answer


def load(model: str, options: dict[str, Any]) -> Loaded:
    path = next(Path(model).glob("*.gguf")) if Path(model).is_dir() else Path(model)
    f32 = llama_cpp.GGML_TYPE_F32
    loaded = llama_cpp.Llama(
        str(path),
        n_ctx=options.get("max_model_len", 256),
        logits_all=True,
        type_k=f32,
        type_v=f32,
        flash_attn=False,
        verbose=False,
    )

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        loaded.reset()
        fed, tokens, rows = list(prompt), [], []
        for _ in range(new_tokens):
            loaded.eval(fed)
            row = np.array(loaded.scores[loaded.n_tokens - 1], dtype=np.float32)
            rows.append(row)
            fed = [int(row.argmax())]
            tokens += fed
        return tokens, np.stack(rows)

    return Loaded(greedy, lambda text: loaded.tokenize(text.encode(), add_bos=False, special=True))


if __name__ == "__main__":
    answer(load)
