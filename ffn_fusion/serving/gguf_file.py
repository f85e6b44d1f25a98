"""A student as one GGUF file, in llama.cpp's architecture `deci`: head counts and FFN widths are arrays by layer."""

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes import byref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ffn_fusion.core.layout import is_linear
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import why_not_decilm
from ffn_fusion.hf.model import ModelFolder, expected_specs
from ffn_fusion.progress import track
from ffn_fusion.serving.gguf_vocab import read_vocabulary

PLAIN = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# f16 first: llama.cpp rounds activations to the type of the weights, so it comes closer than bf16 (KL to f32 2e-6
# against 1e-4 on a fused SmolLM2-135M). A weight beyond its range is refused by name; bf16 holds those.
DTYPES = (*PLAIN, "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k")
"""Names of file types, the default first; those after q8_0 are made by llama.cpp's own quantiser."""
ROPE_TYPES = ("default", "linear", "llama3")
ZERO_WIDTH = 256
"""Width of the all-zero FFN behind an attention without one; k-quants need rows of 256."""
ATTENTION = {
    "input_layernorm": "attn_norm",
    **{
        f"self_attn.{ours}_proj": f"attn_{theirs}"
        for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    },
}
LINEAR_ATTENTION = {"input_layernorm": "attn_norm", "self_attn.linear_attn": "attn_output"}
FFN = {"post_attention_layernorm": "ffn_norm", **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}}


def why_not(student: ModelFolder) -> str | None:
    """Why llama.cpp cannot run a student, as one clause; None if it can."""
    reason = _why_not_layout(student)
    if reason is None:
        try:
            read_vocabulary(student)
        except UserError as error:
            return str(error)
    return reason


def _why_not_layout(student: ModelFolder) -> str | None:
    config = student.config
    if student.arch.class_name != "DeciLMForCausalLM":
        reason = why_not_decilm(config.to_dict() | {"model_type": student.raw_config["model_type"]})
        return f"llama.cpp's deci architecture cannot hold it: {reason or 'it is not in the nemotron-nas layout'}"
    if any("following_ffns" in block for block in config.block_configs):
        return "a block with several FFNs, the folded form, has no place in llama.cpp's deci architecture"
    if any(is_linear(block.ffn) for block in config.block_configs):
        return "llama.cpp's deci architecture has linear attentions, but no linear layer in the place of an FFN"
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        return "llama.cpp's deci architecture is run without biases and with SiLU only"
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        return f"rope type {rope!r} is not one of {', '.join(ROPE_TYPES)}, which this export knows"
    if not (slots := _slots(config)) or not slots[0].kv_heads:
        return "llama.cpp takes the size of heads from layer 0, which has no attention here"
    return None


def write(student: ModelFolder, folder: Path, dtype: str) -> None:
    """Write `<folder>/model-<dtype>.gguf`. Memory holds one tensor at a time, in up to three copies.

    `UserError` if the tokenizer does not fit, a weight exceeds f16, the disk is too small or no quantiser is found.
    """
    path = folder / f"model-{dtype}.gguf"
    if dtype in PLAIN or dtype == "q8_0":
        _write_file(student, path, dtype)
        return
    quantise = _quantiser(dtype)
    embedding = student.checkpoint.specs["model.embed_tokens.weight"].dtype
    exact = "bf16" if embedding == torch.bfloat16 else "f32"
    unquantised = folder / f".{exact}.gguf.partial"
    try:
        _write_file(student, unquantised, exact)
        quantise(unquantised, path)
    finally:
        unquantised.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Slot:
    """One layer of the file: the student's block it is, its query and kv heads (0 without attention), its FFN width.

    A linear attention is query heads without kv heads.
    """

    block: int
    heads: int
    kv_heads: int
    width: int

    @property
    def file_width(self) -> int:
        # llama.cpp forgets the attention of a layer whose FFN width is 0: an FFN of zeros adds nothing and keeps it.
        return self.width or ZERO_WIDTH


def _slots(config: Any) -> list[_Slot]:
    """The layers to write. Empty blocks compute nothing, and llama.cpp aborts on an empty last one: they stay out."""
    slots = []
    for index, (block, width) in enumerate(zip(config.block_configs, config.ffn_widths, strict=True)):
        heads = 0 if block.attention.no_op else config.num_attention_heads
        cached = heads and not is_linear(block.attention)
        slots.append(_Slot(index, heads, heads // block.attention.n_heads_in_group if cached else 0, width))
    return [slot for slot in slots if slot.heads or slot.width]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: name, shape (rows first), how to make it, and whether it is kept in f32."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    exact: bool = False


def _entries(student: ModelFolder) -> Iterator[_Entry]:
    specs, _ = expected_specs(student.config)  # without a tied head, which llama.cpp finds by its absence
    read = student.checkpoint.read

    def copied(ours: str, theirs: str, heads: int = 0) -> _Entry:
        name, shape = f"{ours}.weight", specs[f"{ours}.weight"]
        make = partial(_interleaved, read, name, heads) if heads else partial(read, name)
        return _Entry(f"{theirs}.weight", shape, make, exact=len(shape) == 1)

    yield copied("model.embed_tokens", "token_embd")
    yield from _rope_factors(student.config)
    for layer, slot in enumerate(_slots(student.config)):
        ours, theirs = f"model.layers.{slot.block}.", f"blk.{layer}."
        rotated = {"self_attn.q_proj": slot.heads, "self_attn.k_proj": slot.kv_heads}
        attention = ATTENTION if slot.kv_heads else LINEAR_ATTENTION
        for part, name in attention.items() if slot.heads else ():
            yield copied(ours + part, theirs + name, rotated.get(part, 0))
        if slot.width:
            yield from (copied(ours + part, theirs + name) for part, name in FFN.items())
        else:
            yield from _zero_ffn(theirs, student.config.hidden_size)
    yield copied("model.norm", "output_norm")
    if "lm_head.weight" in specs:
        yield copied("lm_head", "output")


def _interleaved(read: Callable[[str], Tensor], name: str, heads: int) -> Tensor:
    """Rows of q or k [heads · size, d] with the two halves of each head interleaved, as llama.cpp rotates pairs."""
    weight = read(name)
    rows = torch.arange(len(weight)).view(heads, 2, -1)
    return weight[rows.mT.flatten()]


def _zero_ffn(prefix: str, hidden: int) -> Iterator[_Entry]:
    yield _Entry(f"{prefix}ffn_norm.weight", (hidden,), partial(torch.ones, hidden), exact=True)
    for name in ("gate", "up", "down"):
        shape = (hidden, ZERO_WIDTH) if name == "down" else (ZERO_WIDTH, hidden)
        yield _Entry(f"{prefix}ffn_{name}.weight", shape, partial(torch.zeros, shape))


def _rope_factors(config: Any) -> Iterator[_Entry]:
    """For llama3 scaling, what to divide each rotary frequency by [head size / 2]."""
    if config.rope_parameters["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        factors = config.rope_parameters["rope_theta"] ** -exponents / scaled
        yield _Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors, exact=True)


def _write_file(student: ModelFolder, path: Path, dtype: str) -> None:
    vocabulary = read_vocabulary(student)
    # No general.name: llama.cpp changes how it tokenises by words in it.
    writer = gguf.GGUFWriter(path, "deci")
    _add_fields(writer, student.config, dtype)
    vocabulary.add_to(writer)
    entries = [(entry, _type_of(entry, dtype)) for entry in _entries(student)]
    total = 0
    for entry, kind in entries:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(entry.shape)) // block * block_bytes
        total += size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
    if total > (free := shutil.disk_usage(path.parent).free):
        raise UserError(
            f"the GGUF file needs {total / 1e9:.1f} GB in {path.parent}, which has {free / 1e9:.1f} GB free"
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, kind in track(entries, f"export: {dtype} tensors", len(entries)):
            writer.write_tensor_data(_packed(entry, kind))
    finally:
        writer.close()


def _add_fields(writer: Any, config: Any, dtype: str) -> None:
    slots, rope = _slots(config), config.rope_parameters
    writer.add_type("model")
    writer.add_file_type(_file_type(dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(slots))
    writer.add_head_count([slot.heads for slot in slots])
    writer.add_head_count_kv([slot.kv_heads for slot in slots])
    writer.add_feed_forward_length([slot.file_width for slot in slots])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _file_type(dtype: str) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])


def _type_of(entry: _Entry, dtype: str) -> Any:
    kind = gguf.GGMLQuantizationType["F32" if entry.exact else dtype.upper()]
    fits = entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.BF16


def _packed(entry: _Entry, kind: Any) -> NDArray[Any]:
    """The bytes of a tensor in its type of the file."""
    tensor = entry.make()
    if kind.name == "Q8_0":
        packed: NDArray[Any] = gguf.quantize(tensor.float().numpy(), kind)
        return packed
    cast = tensor.to(PLAIN[kind.name.lower()]).contiguous()
    if kind.name == "F16" and not torch.isfinite(cast).all():
        raise UserError(f"{entry.name} holds {float(tensor.abs().max()):.3g}, more than f16 can; write bf16 instead")
    return cast.view(torch.uint8).numpy()


def _quantiser(dtype: str) -> Callable[[Path, Path], None]:
    """llama.cpp's own, from llama-cpp-python or from the PATH; `UserError` if there is neither."""
    with suppress(ImportError):
        return partial(_quantise_in_process, importlib.import_module("llama_cpp"), dtype)
    if program := shutil.which("llama-quantize"):
        return partial(_quantise_by_program, program, dtype)
    raise UserError(
        f"{dtype} is made by llama.cpp's own quantiser, and there is neither Python's llama_cpp nor llama-quantize on "
        f"the PATH; run `pip install llama-cpp-python`, or write q8_0, which needs neither"
    )


def _quantise_in_process(llama_cpp: Any, dtype: str, source: Path, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _file_type(dtype)
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), byref(params))
    if code != 0:
        raise UserError(f"llama.cpp could not quantise to {dtype} (code {code}); its messages are above")


def _quantise_by_program(program: str, dtype: str, source: Path, target: Path) -> None:
    done = subprocess.run([program, source, target, dtype.upper()], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{program} could not quantise to {dtype}: {message}")
