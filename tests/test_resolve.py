"""What a user names: models, tokenizers, plans, and the short names of tables."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from reference import one_line
from transformers import AutoModelForCausalLM, PreTrainedModel

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import labels, load_tokenizer, read_plan, read_source, resolve_model


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name in ("a/student", "b/student", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    assert labels(["builtin:x", str(tmp_path / "a/student"), str(tmp_path / "b/other")]) == [
        "builtin:x",
        "student",
        "other",
    ]
    both = labels([str(tmp_path / "a/student"), str(tmp_path / "b/student")])
    assert both == ["a/student", "b/student"]
    assert labels(["same", "same"]) == ["same", "same"]


def test_a_gguf_file_is_converted_once_and_gives_the_model_it_was_written_from(
    tiny_parent: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFN_FUSION_CACHE", str(tmp_path / "cache"))
    stock = AutoModelForCausalLM.from_pretrained(tiny_parent("llama"))
    path = tmp_path / "tiny.gguf"
    write_gguf(stock, path)
    model = resolve_model(str(path))
    ids = torch.randint(4, 128, (1, 12))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(parameter.bfloat16())
        wanted = stock(input_ids=ids).logits
        found = model.load(torch.float32, "cpu")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    stamp = (model.folder / "model.safetensors").stat().st_mtime_ns
    assert (resolve_model(str(path)).folder / "model.safetensors").stat().st_mtime_ns == stamp


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A llama GGUF file: query and key rows in the interleaved rotary order that llama.cpp keeps them in."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "11", *(f"t{i}" for i in range(1, config.vocab_size - 2))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1", "1 1"])  # one alone is read back as a string
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".", 3)
        if name.startswith("model.layers."):
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if parts[3] in heads:
                tensor = tensor.view(heads[parts[3]], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            target = f"blk.{parts[2]}.{names[parts[3]]}.weight"
        else:
            outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            target = outer[name.removesuffix(".weight")] + ".weight"
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_parent("llama"), folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"extra{i}": 128 + i for i in range(40)}
    path.write_text(json.dumps(data))
    one_line(lambda: load_tokenizer(resolve_model(str(folder))), "vocabulary 128")


def test_a_folder_without_tokenizer_is_refused(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_parent("llama"), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    one_line(lambda: load_tokenizer(resolve_model(str(folder))), "no usable tokenizer")


def test_a_tensor_without_a_place_is_named(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_parent("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    one_line(lambda: resolve_model(str(folder)), "q_proj.bias")


def test_nan_weights_are_named_before_anything_is_measured(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_parent("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line(lambda: resolve_model(str(folder)).load(torch.float32, "cpu"), "layers.3.mlp.up_proj", "NaN")


def test_a_plan_is_read_from_text_or_file(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    plan, parent = Plan.parse("A0F0 A1/1F1:64+2"), ModelFolder(tiny_parent("llama"))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert read_plan(str(path), parent) == read_plan("A0F0 A1/1F1:64+2", parent) == plan
    assert read_plan(str(tmp_path), parent) == plan
    one_line(lambda: read_plan("A0F0 A1F6", parent), "FFN 6")


def test_a_plan_longer_than_a_file_name_may_be_is_read_as_text() -> None:
    plan = Plan.identity(126)
    assert read_source(str(plan), 126) == (plan, None)


def test_a_broken_gguf_file_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFN_FUSION_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing more")
    one_line(lambda: resolve_model(str(path)), "broken.gguf")
    assert not any((tmp_path / "cache" / "gguf").iterdir())
