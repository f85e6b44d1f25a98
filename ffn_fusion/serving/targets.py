"""The table of export targets."""

from ffn_fusion.serving import folded, gguf_file, hf, megatron, mlx, onnx, openvino
from ffn_fusion.serving.target import Target

AS_IT_IS = "as the student"
_TARGETS = (
    Target(
        "hf",
        "the student folder: safetensors in the nemotron-nas layout where the family allows it",
        ("transformers", "vllm", "mlx-lm"),
        ("SGLang", "TensorRT-LLM", "ExLlamaV3", "Megatron-Bridge", "NeMo AutoModel"),
        (AS_IT_IS,),
        hf.why_not,
        hf.write,
        hf.why_not_in,
    ),
    Target(
        "folded",
        "every layer an attention and several FFNs, for vLLM's Transformers backend; any family",
        ("vllm", "transformers"),
        (),
        (AS_IT_IS,),
        folded.why_not,
        folded.write,
    ),
    Target(
        "mlx",
        "the student folder with its linear layers under MLX-LM's names; without any, hf does",
        ("mlx-lm",),
        (),
        (AS_IT_IS,),
        mlx.why_not,
        mlx.write,
    ),
    Target(
        "gguf",
        "one GGUF file of architecture deci, tokenizer and chat template inside",
        ("llama.cpp",),
        ("Ollama", "LM Studio"),
        gguf_file.DTYPES,
        gguf_file.why_not,
        gguf_file.write,
    ),
    Target(
        "onnx",
        "a folder for ONNX Runtime GenAI",
        ("onnxruntime-genai",),
        (),
        onnx.DTYPES,
        onnx.why_not,
        onnx.write,
    ),
    Target(
        "openvino", "a stateful OpenVINO model", ("openvino",), (), openvino.DTYPES, openvino.why_not, openvino.write
    ),
    Target(
        "megatron",
        "layer JSON and flags for Megatron-Core's heterogeneous transformer, without weights",
        (),
        ("Megatron-Core",),
        ("no weights",),
        megatron.why_not,
        megatron.write,
    ),
)
TARGETS = {target.name: target for target in _TARGETS}
