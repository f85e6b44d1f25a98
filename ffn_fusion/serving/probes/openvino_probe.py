"""OpenVINO on the CPU, in f32; its default precision depends on the machine."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from protocol import Loaded, answer
from tokenizers import Tokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def load(model: str, options: dict[str, Any]) -> Loaded:
    compiled = openvino.compile_model(str(Path(model) / "openvino_model.xml"), "CPU", EXACT)
    request = compiled.create_infer_request()
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))

    def greedy(prompt: Any, new_tokens: int) -> tuple[list[int], np.ndarray]:
        request.reset_state()
        fed, seen, tokens, rows = list(prompt), 0, [], []
        for _ in range(new_tokens):
            seen += len(fed)
            inputs = {"input_ids": np.array([fed]), "attention_mask": np.ones((1, seen), dtype=np.int64)}
            made = request.infer(inputs | {"beam_idx": np.array([0], dtype=np.int32)})
            row = made["logits"][0, -1].copy()
            rows.append(row)
            fed = [int(row.argmax())]
            tokens += fed
        return tokens, np.stack(rows)

    return Loaded(greedy, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    answer(load)
