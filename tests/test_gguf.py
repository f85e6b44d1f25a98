"""The GGUF export as read back from its file; llama.cpp itself runs in tests/engines."""

import json
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from engines.layouts import LAYOUTS, VOCAB_SIZE, save_layout
from reference import one_line
from spellings import BYTE_LEVEL, SPECIAL, save_byte_level, save_sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving import gguf_file, gguf_vocab

Type = gguf.GGMLQuantizationType
HEAD = 64


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each layout; never write into it."""
    folder = tmp_path_factory.mktemp("students")
    return {name: save_layout(name, folder / name) for name in ("fusion", "empty", "ffnfree", "first")}


@pytest.fixture
def student(students: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(students["fusion"], tmp_path / "student"))


def written(folder: Path, out: Path, dtype: str = "f32") -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors of the file that a student becomes."""
    gguf_file.write(ModelFolder(folder), out, dtype)
    reader = gguf.GGUFReader(out / f"model-{dtype}.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(*reversed(tensor.shape))


def change_config(folder: Path, **changes: Any) -> ModelFolder:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return ModelFolder(folder)


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **special: str) -> ModelFolder:
    """The student with another tokenizer, byte-level BPE without merges unless it is one."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>"} | special).save_pretrained(folder)
    return ModelFolder(folder)


def plain_bpe(**model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, [], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("name", ["fusion", "empty", "ffnfree"])
def test_layers_are_arrays_without_empty_blocks(name: str, students: dict[str, Path], tmp_path: Path) -> None:
    fields, tensors = written(students[name], tmp_path)
    blocks = [block for block in LAYOUTS[name] if block != (0, 0)]
    assert fields["general.architecture"] == "deci"
    assert fields["deci.block_count"] == len(blocks)
    assert fields["deci.attention.head_count"] == [4 if kv_heads else 0 for kv_heads, _ in blocks]
    assert fields["deci.attention.head_count_kv"] == [kv_heads for kv_heads, _ in blocks]
    assert fields["deci.feed_forward_length"] == [width or 256 for _, width in blocks]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == HEAD
    assert fields["deci.rope.freq_base"] == 20000.0
    assert "general.name" not in fields
    held = {int(tensor.split(".")[1]) for tensor in tensors if ".attn_q." in tensor}
    assert held == {layer for layer, (kv_heads, _) in enumerate(blocks) if kv_heads}


def test_every_tensor_holds_its_weights_with_q_and_k_in_pairs(students: dict[str, Path], tmp_path: Path) -> None:
    source, (_, tensors) = ModelFolder(students["fusion"]).checkpoint, written(students["fusion"], tmp_path)
    for layer, (kv_heads, _) in enumerate(LAYOUTS["fusion"]):
        for part, heads in (("q", 4), ("k", kv_heads)) if kv_heads else ():
            expected = source.read(f"model.layers.{layer}.self_attn.{part}_proj.weight")
            found = values(tensors.pop(f"blk.{layer}.attn_{part}.weight"))
            for head in range(heads):
                rows = found[head * HEAD : (head + 1) * HEAD]
                halves = expected[head * HEAD : (head + 1) * HEAD].split(HEAD // 2)
                assert torch.equal(rows[0::2], halves[0])
                assert torch.equal(rows[1::2], halves[1])
    names = {"attn_norm": "input_layernorm", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name, tensor in tensors.items():
        _, layer, *part = name.removesuffix(".weight").split(".") if name.startswith("blk.") else ("", "", name)
        ours = f"model.layers.{layer}.{names[part[0]]}" if layer else outer[name.removesuffix(".weight")]
        assert torch.equal(values(tensor), source.read(f"{ours}.weight")), name


def test_an_attention_without_ffn_gets_one_of_zeros(students: dict[str, Path], tmp_path: Path) -> None:
    _, tensors = written(students["ffnfree"], tmp_path)
    assert values(tensors["blk.1.ffn_norm.weight"]).tolist() == [1.0] * 256
    assert {
        part: values(tensors[f"blk.1.ffn_{part}.weight"]).abs().sum().item() for part in ("gate", "up", "down")
    } == {
        "gate": 0.0,
        "up": 0.0,
        "down": 0.0,
    }


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8_0"])
def test_matrices_are_rounded_and_norms_are_not(dtype: str, students: dict[str, Path], tmp_path: Path) -> None:
    fields, tensors = written(students["fusion"], tmp_path, dtype)
    _, exact = written(students["fusion"], tmp_path, "f32")
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    assert list(tensors) == list(exact)
    for name, tensor in tensors.items():
        assert tensor.tensor_type == (Type.F32 if "norm" in name else Type[dtype.upper()]), name
        assert tuple(tensor.shape) == tuple(exact[name].shape)
        expected = values(exact[name])
        # Half a step of 8 bits, and a little for q8_0's scale, which is f16.
        assert (values(tensor) - expected).abs().max() <= expected.abs().max() * (1 / 254 + 2**-11)


def test_rows_that_no_block_of_32_fits_stay_bf16() -> None:
    entry = gguf_file._Entry("a", (4, 40), lambda: torch.zeros(4, 40))
    assert gguf_file._type_of(entry, "q8_0") == Type.BF16


def test_a_weight_beyond_f16_is_refused_by_name(student: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(student / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 70000.0
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    one_line(lambda: written(student, tmp_path, "f16"), "blk.1.ffn_up.weight", "7e+04", "bf16")


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    _, tensors = written(save_layout("lastwide", tmp_path / "student", tie_word_embeddings=True), tmp_path)
    assert "output.weight" not in tensors
    assert "token_embd.weight" in tensors


def test_llama3_scaling_is_a_tensor_of_divisors(student: Path, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    change_config(student, rope_parameters=rope, rope_theta=5000.0, rope_scaling=None)
    _, tensors = written(student, tmp_path)
    factors = values(tensors["rope_freqs.weight"])
    wavelength = 2 * torch.pi * 5000.0 ** (torch.arange(32) / 32)
    assert factors[wavelength < 16].tolist() == pytest.approx([1.0] * int((wavelength < 16).sum()))
    assert factors[wavelength > 64].tolist() == pytest.approx([8.0] * int((wavelength > 64).sum()))
    assert (factors.diff() > -1e-5).all()


def test_linear_scaling_is_two_fields(student: Path, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.5}
    change_config(student, rope_parameters=rope, rope_theta=5000.0, rope_scaling=None)
    fields, tensors = written(student, tmp_path)
    assert (fields["deci.rope.scaling.type"], fields["deci.rope.scaling.factor"]) == ("linear", 2.5)
    assert "rope_freqs.weight" not in tensors


@pytest.mark.parametrize(
    ("family", "word"), [("qwen3", "qwen3 blocks are not Llama blocks"), ("llama", "nemotron-nas layout")]
)
def test_another_layout_is_refused(family: str, word: str, tiny_parent: Any) -> None:
    assert word in (gguf_file.why_not(ModelFolder(tiny_parent(family))) or "")


def test_what_deci_cannot_run_is_refused(students: dict[str, Path], student: Path) -> None:
    assert gguf_file.why_not(ModelFolder(students["fusion"])) is None
    assert "layer 0" in (gguf_file.why_not(ModelFolder(students["first"])) or "")
    yarn = {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    assert "'yarn'" in (gguf_file.why_not(change_config(student, rope_parameters=yarn, rope_scaling=yarn)) or "")
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    change_config(student, rope_parameters=rope, rope_scaling=None)
    assert "SiLU" in (gguf_file.why_not(change_config(student, hidden_act="gelu")) or "")
    blocks = json.loads((student / "config.json").read_text())["block_configs"]
    blocks[0]["following_ffns"] = [blocks[1]["ffn"]]
    assert "folded" in (gguf_file.why_not(change_config(student, hidden_act="silu", block_configs=blocks)) or "")


def test_the_vocabulary_is_padded_and_typed(student: Path, tmp_path: Path) -> None:
    save_byte_level("smollm", student)
    (student / "chat_template.jinja").write_text("{{ messages[0].content }}")
    fields, _ = written(student, tmp_path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert len(tokens) == len(types) == len(set(tokens)) == fields["deci.vocab_size"] == VOCAB_SIZE
    assert tokens[:3] == list(SPECIAL)
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCAB_SIZE - 1}]", gguf.TokenType.UNUSED)
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    assert ids == {"bos": 1, "eos": 2}
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    merges = json.loads((student / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("style", BYTE_LEVEL)
def test_each_known_pre_tokenizer_is_found_by_its_steps(style: str, student: Path) -> None:
    assert gguf_vocab.read_vocabulary(ModelFolder(save_byte_level(style, student))).pre == style


def test_start_and_end_tokens_are_added_as_the_tokenizer_adds_them(student: Path) -> None:
    tokenizer = plain_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(single="b $A </s>", special_tokens=[("b", 2), ("</s>", 0)])
    found = gguf_vocab.read_vocabulary(with_tokenizer(student, tokenizer, bos_token="b"))
    assert (found.add_bos, found.add_eos) == (True, True)
    tokenizer.post_processor = processors.TemplateProcessing(single="a b $A", special_tokens=[("a", 1), ("b", 2)])
    assert "start and an end token only" in (gguf_file.why_not(with_tokenizer(student, tokenizer, bos_token="b")) or "")


@pytest.mark.parametrize("style", ["always", "first", "never"])
def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges(style: str, student: Path) -> None:
    found = gguf_vocab.read_vocabulary(ModelFolder(save_sentencepiece(style, student)))
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", style != "never")
    assert len(found.tokens) == len(found.scores) == len(found.types) == VOCAB_SIZE
    kinds = gguf.TokenType
    assert found.types[:3] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    assert found.types[3:259] == [kinds.BYTE] * 256
    score = dict(zip(found.tokens, found.scores, strict=True))
    order = [score["".join(merge.split(" "))] for merge in found.merges]
    assert order == sorted(order, reverse=True)


def test_merges_that_leave_out_splits_are_refused(student: Path) -> None:
    save_sentencepiece("always", student)
    data = json.loads((student / "tokenizer.json").read_text())
    pieces = ["".join(pair) for pair in data["model"]["merges"]]
    data["model"]["merges"].pop(next(at for at, piece in enumerate(pieces) if pieces.count(piece) > 1))
    (student / "tokenizer.json").write_text(json.dumps(data))
    assert "not SentencePiece's" in (gguf_file.why_not(ModelFolder(student)) or "")


def test_a_sentencepiece_that_splits_at_blanks_is_refused(student: Path) -> None:
    save_sentencepiece("first", student)
    data = json.loads((student / "tokenizer.json").read_text())
    data["pre_tokenizer"]["split"] = True
    (student / "tokenizer.json").write_text(json.dumps(data))
    assert "marks blanks only" in (gguf_file.why_not(ModelFolder(student)) or "")


def refused_tokenizers() -> dict[str, tuple[Tokenizer, str]]:
    unsplit, normalised, blank = plain_bpe(), plain_bpe(), plain_bpe()
    unsplit.pre_tokenizer = pre_tokenizers.Whitespace()
    normalised.normalizer = normalizers.Lowercase()
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    greedy = plain_bpe()
    greedy.add_special_tokens([AddedToken("<x>", lstrip=True)])
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    return {
        "pre-tokenizer": (unsplit, "Whitespace"),
        "normaliser": (normalised, "Lowercase"),
        "prefix blank": (blank, "add_prefix_space"),
        "stripping token": (greedy, "'<x>'"),
        "model": (words, "WordLevel"),
        "suffix": (plain_bpe(end_of_word_suffix="</w>"), "parts of words"),
        "bytes": (plain_bpe(byte_fallback=True), "lacks 256"),
    }


@pytest.mark.parametrize("name", refused_tokenizers())
def test_a_tokenizer_without_a_counterpart_is_refused_with_what_was_found(name: str, student: Path) -> None:
    tokenizer, word = refused_tokenizers()[name]
    reason = gguf_file.why_not(with_tokenizer(student, tokenizer))
    assert reason is not None
    assert word in reason
    assert "\n" not in reason


def test_no_tokenizer_and_no_end_token_are_refused(student: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=plain_bpe()).save_pretrained(student)
    assert "no end token" in (gguf_file.why_not(ModelFolder(student)) or "")
    for path in student.glob("tokenizer*"):
        path.unlink()
    assert "no usable tokenizer" in (gguf_file.why_not(ModelFolder(student)) or "")


def test_a_quantiser_that_is_not_there_is_named(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    one_line(lambda: written(student, tmp_path, "q4_k_m"), "q4_k_m", "pip install llama-cpp-python", "llama-quantize")
    assert not list(tmp_path.glob("*.gguf"))


def test_the_python_quantiser_is_asked_for_the_type(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    class Params(ctypes.Structure):
        _fields_ = [("ftype", ctypes.c_int)]

    def quantise(source: bytes, target: bytes, params: Any) -> int:
        asked.append((Path(source.decode()).is_file(), params._obj.ftype))
        shutil.copyfile(source, target)
        return 0 if len(asked) == 1 else 1

    asked: list[tuple[bool, int]] = []
    stub = SimpleNamespace(llama_model_quantize_default_params=Params, llama_model_quantize=quantise)
    monkeypatch.setitem(sys.modules, "llama_cpp", stub)
    written(student, tmp_path, "q5_k_m")
    assert asked == [(True, gguf.LlamaFileType.MOSTLY_Q5_K_M)]
    assert [path.name for path in tmp_path.glob("**/*.gguf*")] == ["model-q5_k_m.gguf"]
    one_line(lambda: written(student, tmp_path, "q4_0"), "q4_0", "code 1")


def test_a_quantiser_on_the_path_is_used_and_its_last_message_told(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho loading >&2\necho "no such type $3" >&2\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    one_line(lambda: written(student, tmp_path, "q4_k_s"), "no such type Q4_K_S")
    assert not list(tmp_path.glob(".*partial"))
