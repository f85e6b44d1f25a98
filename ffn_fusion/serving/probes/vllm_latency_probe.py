"""vLLM with dummy weights or a model's own: prefill and decode time, as its own scheduler runs them."""

import os
from typing import Any

from pipe import Decode, prompt_ids, serve
from vllm_settings import settle

# Tensor parallelism without NVLink multicast, which not every host lends: NCCL's own all-reduce.
settle(VLLM_ALLREDUCE_USE_SYMM_MEM="0", NCCL_NVLS_ENABLE="0")


def start(request: dict[str, Any]) -> Decode:
    ranks, on_gpu = request["ranks"], request["on_gpu"]
    if not on_gpu:
        # The engine in this process: a second one would import everything again. On a GPU it runs ahead in its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    compilation: dict[str, Any] = {"cudagraph_capture_sizes": request["batch_sizes"]}
    if ranks > 1:
        # It picks FlashInfer's all-reduce with NVLink multicast, which hangs or fails where that is off.
        compilation["pass_config"] = {"fuse_allreduce_rms": False}
    on_device = {"gpu_memory_utilization": request["memory_share"], "compilation_config": compilation} if on_gpu else {}
    engine = LLM(
        model=request["model"],
        load_format="dummy" if request["random"] else "auto",
        dtype=request["dtype"],
        quantization="fp8" if request["fp8"] else None,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        tensor_parallel_size=ranks,
        max_model_len=request["max_length"],
        max_num_seqs=max(request["batch_sizes"]),
        max_num_batched_tokens=request["max_tokens"],
        enable_prefix_caching=False,
        disable_custom_all_reduce=ranks > 1,
        enforce_eager=not on_gpu,
        **on_device,
    )

    def decode(batch_size: int, prompt_length: int, new_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": prompt_ids(prompt_length, number, request["vocabulary"])}
            for number in range(batch_size)
        ]
        engine.generate(prompts, params, use_tqdm=False)

    return decode


if __name__ == "__main__":
    serve(start)
