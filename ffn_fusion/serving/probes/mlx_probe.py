"""MLX-LM, which has model code of its own for the nemotron-nas layout."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load as load_folder
from protocol import Loaded, answer


def load(model: str, options: dict[str, Any]) -> Loaded:
    loaded, tokenizer = load_folder(model)
    loaded.set_dtype(getattr(mx, options.get("dtype", "float32")))

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        cache = make_prompt_cache(loaded)
        fed, tokens, rows = list(prompt), [], []
        for _ in range(new_tokens):
            row = np.array(loaded(mx.array([fed]), cache=cache)[0, -1].astype(mx.float32))
            rows.append(row)
            fed = [int(row.argmax())]
            tokens += fed
        return tokens, np.stack(rows)

    return Loaded(greedy, lambda text: tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    answer(load)
