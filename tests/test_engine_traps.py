"""What engines trip over in silence. Each test fails when the guard against one trap is taken out; that engines do
load what these tests describe is tested in tests/engines."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, NUM_LAYERS, save_tiny_parent
from engines.layouts import save_layout
from reference import one_line
from transformers import AutoModelForCausalLM

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import DeciLMConfig
from ffn_fusion.serving import probes
from ffn_fusion.settings import Fusion
from ffn_fusion.stages.export import export
from ffn_fusion.stages.fuse import fuse

Folder = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ATTENTION_KEYS = {
    *("no_op", "replace_with_linear", "n_heads_in_group", "sparsify", "num_sink_tokens", "unshifted_sink"),
    *("use_prefill_window_in_sink_attention", "window_length"),
}
FFN_KEYS = {"no_op", "replace_with_linear", "ffn_mult", "sparsify"}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def saved_again(folder: Path, out: Path) -> Path:
    ModelFolder(folder).load(torch.float32, "cpu").save_pretrained(out)
    return out


def fused(parent: Path, plan: str, out: Path) -> Path:
    fuse(str(parent), plan=plan, out=out, fusion=Fusion(calibrate="none"))
    return out


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ModelFolder(folder).load(torch.float32, "cpu")(input_ids=ids).logits


@families
def test_the_rotary_base_is_spelled_both_ways(family: str, tiny_student: Folder, tmp_path: Path) -> None:
    """MLX-LM reads `rope_theta` and falls back to 500,000; newer engines read `rope_parameters`."""
    student = tiny_student(family)
    for folder in (student, saved_again(student, tmp_path / "again")):
        config = config_of(folder)
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] > 0
        assert not config.get("rope_scaling")
    assert ModelFolder(tmp_path / "again").config.to_dict()["rope_theta"] == config_of(student)["rope_theta"]


def test_llama3_scaling_is_spelled_both_ways(tmp_path: Path) -> None:
    parent = save_tiny_parent("llama", tmp_path / "parent", rope_parameters=LLAMA3)
    student = fused(parent, "A0F0 A1F1+2 -F3 A4 A5F5", tmp_path / "student")
    for folder in (student, saved_again(student, tmp_path / "again")):
        config = config_of(folder)
        assert config["rope_theta"] == 5e5
        assert config["rope_parameters"] == LLAMA3
        assert config["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = config_of(student)
    del old["rope_parameters"]
    read = DeciLMConfig.from_dict({name: value for name, value in old.items() if name != "auto_map"})
    assert read.rope_parameters == LLAMA3, "the old spelling alone says the same"


def test_layer_0_has_an_attention(tmp_path: Path) -> None:
    """Engines size heads and caches by layer 0. Export of such a folder: test_export."""
    foreign = ModelFolder(save_layout("first", tmp_path / "foreign"))
    one_line(lambda: foreign.plan, "layer 0")
    for text in ("-F0 A1F1", "A1F1 A0F0"):
        one_line(lambda text=text: Plan.parse(text), "layer 0")
    one_line(lambda: export(str(foreign.folder), to="hf", out=tmp_path / "out"), "layer 0")


@families
def test_an_attention_without_ffn_has_an_ffn_of_256_zeros_behind_it(family: str, tiny_student: Folder) -> None:
    """llama.cpp leaves out an attention whose FFN is none."""
    student = ModelFolder(tiny_student(family))
    assert str(student.plan) == "A0F0 A1F1 -F2 A3F3 A4F4", "no block is an attention alone"
    assert student.config.ffn_widths[3] == 256
    assert not student.config.block_configs[3].ffn.no_op
    weights = [name for name in student.checkpoint.specs if name.startswith("model.layers.3.mlp.")]
    assert weights
    assert not any(student.checkpoint.read(name).any() for name in weights)


@families
@torch.no_grad()
def test_widths_are_multiples_of_256_and_the_padding_adds_nothing(
    family: str, tiny_parent: Folder, tmp_path: Path
) -> None:
    """k-quants and tensor parallelism ask for round widths; the multiplier must give them back exactly."""
    student = fused(tiny_parent(family), str(Plan.identity(NUM_LAYERS)), tmp_path / "student")
    config = config_of(student)
    for block in config["block_configs"]:
        width = int(2 * block["ffn"]["ffn_mult"] * config["hidden_size"] / 3)
        assert width == 256, "no rounding is left to the engine"
    ids = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    stock = AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(logits(student, ids), stock, rtol=0, atol=1e-5 * float(stock.abs().max()))
    checkpoint = ModelFolder(student).checkpoint
    down = next(
        name for name in checkpoint.specs if name.endswith(("layers.1.mlp.down_proj.weight", "1.mlp.c_proj.weight"))
    )
    assert not checkpoint.read(down)[:, 96:].any()
    assert checkpoint.read(down)[:, :96].any()


@families
def test_every_block_has_exactly_the_keys_that_engines_insist_on(
    family: str, tiny_student: Folder, tmp_path: Path
) -> None:
    """MLX-LM and the llama.cpp converter fail on others; TensorRT-LLM takes the type of all from the first."""
    for folder in (tiny_student(family), saved_again(tiny_student(family), tmp_path / "again")):
        blocks = config_of(folder)["block_configs"]
        assert [set(block) for block in blocks] == [{"attention", "ffn"}] * 5
        assert [set(block["attention"]) for block in blocks] == [ATTENTION_KEYS] * 5
        assert [set(block["ffn"]) for block in blocks] == [FFN_KEYS] * 5
        # 1.5 · 256 / 64 is 6: a whole number, which must not be written as one.
        assert [block["ffn"]["ffn_mult"] for block in blocks] == [6.0] * 5
        assert all(type(block["ffn"]["ffn_mult"]) is float for block in blocks)
        assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, 2, None, 2, 2]


@families
def test_no_configuration_has_a_per_layer_config(family: str, tiny_student: Folder, tmp_path: Path) -> None:
    """Its presence makes vLLM and transformers take a model for one with layers of different kinds of their own."""
    export(str(tiny_student(family)), to="folded", out=tmp_path / "folded")
    again = saved_again(tiny_student(family), tmp_path / "again")
    for folder in (tiny_student(family), tmp_path / "folded", again):
        assert "per_layer_config" not in (folder / "config.json").read_text()
        assert "per_layer_config" not in ModelFolder(folder).config.to_dict()


@families
@torch.no_grad()
def test_every_cache_entry_can_be_cropped(family: str, tiny_student: Folder) -> None:
    """transformers 5.17 slices `keys` of every entry, whether or not it was ever written."""
    model = ModelFolder(tiny_student(family)).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert len(cache.layers) == 5
    for entry in cache.layers:
        assert entry.is_initialized
        lengths = {part[..., :4, :].shape[-2] for part in (entry.keys, entry.values)}
        assert lengths == {0 if entry is cache.layers[2] else 4}
    if not any(entry.is_sliding for entry in cache.layers):
        for entry in cache.layers:
            entry.crop(-5)
        assert [entry.keys.shape[-2] for entry in cache.layers] == [4, 4, 0, 4, 4]
        found = model(input_ids=ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, 4:], rtol=1e-4, atol=1e-4)
        assert [entry.keys.shape[-2] for entry in cache.layers] == [9, 9, 0, 9, 9]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_student_and_its_parent_can_draft_for_each_other(
    family: str, tiny_parent: Folder, tiny_student: Folder
) -> None:
    parent = AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval()
    student = ModelFolder(tiny_student(family)).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for target, draft in ((parent, student), (student, parent)):
        assert torch.equal(target.generate(ids, **options, assistant_model=draft), target.generate(ids, **options))


@families
def test_a_fused_ffn_has_one_norm(family: str, tiny_student: Folder) -> None:
    """Engines apply one norm a block; the members' gains are in their weights."""
    student = ModelFolder(tiny_student(family))
    names = [name for name in student.checkpoint.specs if "norm.weight" in name and "layers.1." in name]
    assert [name for name in names if "post_attention" in name] == ["model.layers.1.post_attention_layernorm.weight"]
    gain = student.checkpoint.read("model.layers.1.post_attention_layernorm.weight")
    assert torch.equal(gain, torch.full_like(gain, 1.0 - student.arch.norm_offset))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A probe as a module, its engine a stand-in."""

    def load(name: str, **engine: object) -> ModuleType:
        monkeypatch.syspath_prepend(str(Path(str(probes.__file__)).parent))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**engine))
        for module in ("protocol", f"{name}_probe"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        module = importlib.import_module(f"{name}_probe")
        for own in ("protocol", f"{name}_probe"):
            monkeypatch.delitem(sys.modules, own)
        return module

    return load


def test_the_probe_of_llama_cpp_caches_in_f32(probe: Callable[..., ModuleType], tmp_path: Path) -> None:
    """Its default f16 hides or fakes differences."""
    started: list[dict[str, Any]] = []

    class Llama:
        n_tokens = 3

        def __init__(self, _: str, **options: Any) -> None:
            started.append(options)
            self.scores = np.eye(8)

        def reset(self) -> None: ...

        def eval(self, _: list[int]) -> None: ...

    loaded = probe("llama_cpp", Llama=Llama, GGML_TYPE_F32=0).load("model.gguf", {})
    assert (started[0]["type_k"], started[0]["type_v"], started[0]["flash_attn"]) == (0, 0, False)
    tokens, rows = loaded.greedy([5, 6], 4)
    assert (tokens, rows.shape) == ([2] * 4, (4, 8))


def test_the_probe_of_vllm_goes_on_behind_an_end_token_and_asks_for_raw_logits(
    probe: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it answers differ in length, and log-probabilities are not what is compared."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked: dict[str, Any] = {}

    class Engine:
        def __init__(self, **options: Any) -> None:
            asked["engine"] = options

        def get_tokenizer(self) -> None: ...

        def generate(self, *_: object, **__: object) -> list[Any]:
            step = {token: SimpleNamespace(logprob=float(token)) for token in range(4)}
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[3, 3], logprobs=[step, step])])]

    def params(**options: Any) -> None:
        asked["params"] = options

    tokens, rows = probe("vllm", LLM=Engine, SamplingParams=params).load("model", {}).greedy([5, 6], 2)
    assert asked["params"] == {"temperature": 0.0, "max_tokens": 2, "logprobs": -1, "ignore_eos": True}
    assert (asked["engine"]["logprobs_mode"], asked["engine"]["dtype"]) == ("raw_logits", "float32")
    assert (tokens, rows.tolist()) == ([3, 3], [[0.0, 1.0, 2.0, 3.0]] * 2)
