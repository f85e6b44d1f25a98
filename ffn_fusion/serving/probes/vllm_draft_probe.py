"""vLLM: greedy decoding with and without a draft model, one engine after the other."""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm_settings import settle

settle()
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

COUNTED = {"rounds": "num_drafts", "proposed": "num_draft_tokens", "accepted": "num_accepted_tokens"}


def decode(request: dict[str, Any], speculation: dict[str, Any] | None) -> tuple[list[Any], dict[str, int]]:
    """New tokens and seconds of each prompt, and what the engine counted."""
    from vllm import LLM, SamplingParams

    options = request["options"]
    engine = LLM(
        model=request["model"],
        trust_remote_code=True,
        dtype=options["dtype"],
        max_model_len=max(map(len, request["prompts"])) + request["new_tokens"] + 16,
        max_num_seqs=4,
        enforce_eager=options.get("eager", True),
        speculative_config=speculation,
        # Both engines of a comparison fit into one GPU, even if the first one leaves late.
        gpu_memory_utilization=0.45,
        disable_log_stats=False,
        **options.get("engine", {}),
    )
    params = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True)

    def run(prompt: list[int]) -> tuple[list[int], float]:
        start = time.perf_counter()
        made = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(made[0].outputs[0].token_ids), time.perf_counter() - start

    run(request["prompts"][0])
    before = counters(engine)
    decoded = [run(prompt) for prompt in request["prompts"]]
    counted = {name: value - before[name] for name, value in counters(engine).items()}
    return decoded, counted


def counters(engine: Any) -> dict[str, int]:
    found = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return {name: int(found.get(f"vllm:spec_decode_{counter}", 0)) for name, counter in COUNTED.items()}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plain, _ = decode(request, None)
    gc.collect()  # the first engine goes before the second one comes
    number = request["options"]["draft_tokens"]
    drafted, counted = decode(
        request, {"method": "draft_model", "model": request["draft"], "num_speculative_tokens": number}
    )
    answer = {"plain": plain, "drafted": drafted, **counted}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
