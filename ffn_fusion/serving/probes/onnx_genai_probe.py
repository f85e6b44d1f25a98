"""ONNX Runtime GenAI; tokens are appended by hand, because its own loop ends at an end token.

`min_length` is no way around that: it takes the end token out of the logits.
"""

from typing import Any

import numpy as np
import onnxruntime_genai as genai
from protocol import Loaded, answer


def load(model: str, options: dict[str, Any]) -> Loaded:
    loaded = genai.Model(model)
    tokenizer = genai.Tokenizer(loaded)
    tokenizer.update_options(add_special_tokens="false")

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        params = genai.GeneratorParams(loaded)
        params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
        generator = genai.Generator(loaded, params)
        fed, tokens, rows = list(prompt), [], []
        for _ in range(new_tokens):
            generator.append_tokens(np.array(fed, dtype=np.int32))
            row = np.array(generator.get_logits(), dtype=np.float32).reshape(-1)
            rows.append(row)
            fed = [int(row.argmax())]
            tokens += fed
        return tokens, np.stack(rows)

    return Loaded(greedy, lambda text: [int(token) for token in tokenizer.encode(text)])


if __name__ == "__main__":
    answer(load)
