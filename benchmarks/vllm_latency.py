"""Prefill and decode time of one model in vLLM, as one line of JSON; dummy weights, so that any shape can be timed.

python benchmarks/vllm_latency.py MODEL [--tensor-parallel 2] [--quantization fp8] [--batch-sizes 1 32]
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

# Tensor parallelism without NVLink multicast, which not every host lends: NCCL's own all-reduce.
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--quantization")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    engine = start(options)
    import torch
    import vllm

    result = vars(options) | {"vllm": vllm.__version__, "device": torch.cuda.get_device_name()}
    result["rows"] = [row(engine, size, options) for size in options.batch_sizes]
    print(json.dumps(result), flush=True)


def start(options: argparse.Namespace) -> Any:
    from vllm import LLM

    return LLM(
        model=options.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        trust_remote_code=True,
        tensor_parallel_size=options.tensor_parallel,
        quantization=options.quantization,
        max_model_len=1024,
        max_num_seqs=max(options.batch_sizes),
        enable_prefix_caching=False,
        disable_custom_all_reduce=True,
        compilation_config={"pass_config": {"fuse_allreduce_rms": False}},
    )


def row(engine: Any, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a prefill and of a decode step, and the quartiles of the latter."""
    prefill, decode = [], []
    for repeat in range(options.repeats + 1):
        first = seconds(engine, batch_size, options.prompt, 1)
        whole = seconds(engine, batch_size, options.prompt, 1 + options.new_tokens)
        if repeat:  # the first is not timed
            prefill.append(1e3 * first)
            decode.append(1e3 * (whole - first) / options.new_tokens)
    low, median, high = statistics.quantiles(decode, n=4)
    timed = {"prefill_ms": statistics.median(prefill), "decode_ms": median, "decode_low": low, "decode_high": high}
    return {"batch_size": batch_size, **{name: round(value, 4) for name, value in timed.items()}}


def seconds(engine: Any, batch_size: int, prompt: int, new_tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 5000 + 10 for j in range(prompt)]} for i in range(batch_size)]
    start = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
