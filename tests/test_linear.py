"""Linear layers in the place of attentions and FFNs: in every family the student is what a slow reference makes of its
plan, and what engines would not run is refused."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, save_tiny_parent
from engines.running import NEW_TOKENS, assert_same, needs, run_probe
from reference import one_line, planned_logits, relative_error
from safetensors.torch import load_file
from test_contract import TOLERANCE, in_memory
from test_variants import walk_of, windows
from texts import as_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ffn_fusion.core import linear
from ffn_fusion.core.cost import BlockShape, Cost
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.pruning import Cuts
from ffn_fusion.hf.calibrate import Calibration, blocks_to_fit
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder, expected_specs, student_arch, student_config
from ffn_fusion.hf.surgery import student_recipes
from ffn_fusion.serving import folded, gguf_file, hf, megatron, mlx
from ffn_fusion.serving.targets import TARGETS
from ffn_fusion.settings import Fusion, Machine
from ffn_fusion.stages.entrants import cost_of
from ffn_fusion.stages.export import export
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.stages.serve import serve
from ffn_fusion.stages.speculate import speculate

PLAN = Plan.parse("A0F0 A1LF1L -F2 A3LF3 A4L A5F5L")
"""A linear attention with an FFN, with a linear one and alone; a linear FFN behind an attention."""
NOTHING = Fusion(calibrate="none")
Parent = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def stock(tiny_parent: Parent) -> Callable[[str], nn.Module]:
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def student(tiny_parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """`student(family)` is the student of `PLAN`, made by `fuse`."""

    @cache
    def make(family: str) -> ModelFolder:
        out = tmp_path_factory.mktemp(f"{family}-linear") / "student"
        fuse(str(tiny_parent(family)), plan=str(PLAN), out=out, fusion=NOTHING)
        return ModelFolder(out)

    return make


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=windows(), use_cache=False).logits
    return found


@families
@torch.no_grad()
def test_a_linear_attention_is_the_attention_of_a_text_of_one_token(
    family: str, tiny_parent: Parent, stock: Callable[[str], nn.Module]
) -> None:
    parent, handed = ModelFolder(tiny_parent(family)), {}
    attention = stock(family).model.layers[1].self_attn

    def record(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        handed.update(kwargs, output=output[0])

    hook = attention.register_forward_hook(record, with_kwargs=True)
    stock(family)(input_ids=windows()[:, :1], use_cache=False)
    hook.remove()
    model = in_memory(parent, PLAN, "folded")
    found, _ = model.model.layers[1].self_attn(hidden_states=handed["hidden_states"])
    assert relative_error(found, handed["output"]) < 1e-6
    biases = [name for name, _ in model.named_parameters() if name.endswith("linear_attn.bias")]
    assert len(biases) == (3 if family in ("qwen2", "starcoder2") else 0)


@families
@torch.no_grad()
def test_a_student_with_linear_layers_computes_what_its_plan_says(
    family: str, tiny_parent: Parent, stock: Callable[[str], nn.Module]
) -> None:
    parent = ModelFolder(tiny_parent(family))
    parent.check_plan(PLAN)
    found = logits(in_memory(parent, PLAN, "folded"))
    expected = planned_logits(stock(family), PLAN, windows(), "folded")
    assert relative_error(found, expected) < TOLERANCE
    # The reference tells linear layers from what they replace, and from nothing.
    for other in ("A0F0 A1LF1L -F2 A3LF3 A4L A5F5", "A0F0 A1F1L -F2 A3LF3 A4L A5F5L", "A0F0 -F1L -F2 A3LF3 A4L A5F5L"):
        assert relative_error(planned_logits(stock(family), Plan.parse(other), windows(), "folded"), expected) > 1e-2


@families
@torch.no_grad()
def test_it_decodes_with_a_cache_as_it_does_without(family: str, student: Callable[[str], ModelFolder]) -> None:
    model, past, steps = student(family).load(torch.float32, "cpu"), None, []
    for part in windows().split([7, 1, 4], dim=1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), logits(model)) < TOLERANCE
    assert [layer.keys.shape[-2] if layer.keys.numel() else 0 for layer in past.layers] == [12, 0, 0, 0, 0, 12] or (
        family in ("qwen2", "smollm3")  # a window keeps fewer
    )
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(windows(2), **greedy)
    assert torch.equal(cached, model.generate(windows(2), use_cache=False, **greedy))


@torch.no_grad()
def test_a_linear_attention_is_not_the_first_of_its_kind(tiny_parent: Parent) -> None:
    """transformers sizes the mask of windowed attentions by the cache of the first; layers 1 and 4 have a window."""
    parent = ModelFolder(tiny_parent("qwen2"))
    model, past, steps = in_memory(parent, Plan.parse("A0F0 A1LF1 A4F4"), "folded"), None, []
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    for part in windows().split([7, 1, 4], dim=1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), logits(model)) < TOLERANCE


@families
@torch.no_grad()
def test_a_saved_student_loads_to_the_logits_of_the_one_in_memory(
    family: str, student: Callable[[str], ModelFolder], tiny_parent: Parent
) -> None:
    folder = student(family)
    assert Plan.from_json((folder.folder / "plan.json").read_text()) == PLAN
    expected = logits(in_memory(ModelFolder(tiny_parent(family)), PLAN, "folded"))
    assert torch.equal(logits(folder.load(torch.float32, "cpu")), expected)
    shipped = AutoModelForCausalLM.from_pretrained(folder.folder, trust_remote_code=True).eval()
    assert torch.equal(logits(shipped), expected)


@families
def test_recipes_announce_the_shapes_that_the_configuration_asks_for(family: str, tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent(family))
    cuts = Cuts(parent.head_dim)
    recipes = student_recipes(PLAN, parent.checkpoint, student_arch(parent), "folded", cuts)
    assert {name: r.spec.shape for name, r in recipes.items()} == expected_specs(student_config(parent, PLAN))[0]
    for name, recipe in recipes.items():
        built = recipe.build()
        assert (tuple(built.shape), built.dtype) == recipe.spec, name


def test_the_layout_is_that_of_nemotron_nas(student: Callable[[str], ModelFolder]) -> None:
    config = json.loads((student("llama").folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    unused = {"sparsify": None, "num_sink_tokens": None, "window_length": None, "unshifted_sink": False}
    unused["use_prefill_window_in_sink_attention"] = False
    block = config["block_configs"][1]
    assert block["attention"] == {"no_op": False, "replace_with_linear": True, "n_heads_in_group": None, **unused}
    assert block["ffn"] == {"no_op": False, "replace_with_linear": True, "ffn_mult": None, "sparsify": None}
    assert [b["attention"]["replace_with_linear"] for b in config["block_configs"]] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert [b["ffn"]["replace_with_linear"] for b in config["block_configs"]] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    stored = load_file(student("llama").folder / "model.safetensors")
    names = [name.removeprefix("model.layers.1.") for name in stored if name.startswith("model.layers.1.")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert sorted(names) == sorted([*norms, "mlp.linear_mlp.weight", "self_attn.linear_attn.weight"])


def test_counts_tell_linear_layers_from_what_they_replace(student: Callable[[str], ModelFolder]) -> None:
    folder = student("llama")
    shapes = [BlockShape(2, 256), BlockShape(0, 0, True, True), BlockShape(0, 256), BlockShape(0, 256, True)]
    assert folder.shapes == [*shapes, BlockShape(0, 256, True), BlockShape(2, 0, linear_ffn=True)]
    cost = cost_of(folder, torch.float32)
    assert cost.num_attentions == 2
    assert cost.kv_bytes_per_token == 2 * (2 * 2 * 16 * 4)
    assert cost.num_sublayers == 11  # the linear attention that stands alone has an FFN of zeros behind it
    assert Cost([BlockShape(0, 0, True, True)], 1, 0, 16, 4).num_sublayers == 2


@torch.no_grad()
def test_a_student_with_linear_layers_is_a_parent_too(
    student: Callable[[str], ModelFolder], tmp_path: Path, tiny_parent: Parent
) -> None:
    first = student("qwen2")
    named = "A0F0 A1LF1L -F2 A3LF3 A4LF4 A5F5L"
    assert str(first.plan) == named
    fuse(str(first.folder), plan=named, out=tmp_path / "same", fusion=NOTHING)
    same = ModelFolder(tmp_path / "same")
    assert relative_error(logits(same.load(torch.float32, "cpu")), logits(first.load(torch.float32, "cpu"))) < 1e-6
    fuse(str(first.folder), plan="A0F0 A1LF1L -F2+3 A5LF5L", out=tmp_path / "more", fusion=NOTHING)
    assert ModelFolder(tmp_path / "more").plan.linear_attentions == [1, 3]
    one_line(lambda: first.check_plan(Plan.parse("A0F0 A1F1L")), "names A1", "A1L")
    one_line(lambda: first.check_plan(Plan.parse("A0F0 A1/2F1L")), "names A1", "A1L")
    one_line(lambda: first.check_plan(Plan.parse("A0F0 A3LF1+2")), "names F1", "F1L")
    one_line(lambda: first.check_plan(Plan.parse("A0F0 A1LF1:64")), "names F1", "F1L")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, bias, added = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 300), (300, 8), (300,), (8,))
    )
    exact = down.double() @ up.double()
    # Of a bfloat16 sum in float32 only the rare tie rounds otherwise.
    assert (linear.product(down, up) != exact.to(dtype)).float().mean() < 0.05
    assert linear.product(down, up).dtype == dtype
    total = down.double() @ bias.double() + added.double()
    torch.testing.assert_close(linear.product_bias(down, bias, added), total.to(dtype))
    torch.testing.assert_close(linear.product_bias(down, None, added), added)
    torch.testing.assert_close(linear.product_bias(down, bias, None), (total - added.double()).to(dtype))


def test_each_value_head_serves_its_neighbouring_query_heads() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert linear.repeat_heads(rows, 2, 2).flatten().tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert linear.repeat_heads(rows.flatten(), 2, 1).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("family", ["llama", "granite", "starcoder2"])
@pytest.mark.parametrize("target", ["parent", "unfused"])
def test_a_linear_ffn_is_fitted(family: str, target: str, tiny_parent: Parent, tmp_path: Path) -> None:
    parent = ModelFolder(tiny_parent(family))
    plan = Plan.parse("A0F0 A1F1L A2F2 A3LF3 A4L A5F5")
    fusion = Fusion(calibrate=target)  # type: ignore[arg-type]
    calibration = Calibration(walk_of(parent), plan, fusion, {})
    fits = {fit.block: (fit, weight) for fit, weight, _ in calibration.run(windows(64, 1))}
    assert list(fits) == calibration.to_fit == ([1, 3, 5] if target == "parent" else [1])
    assert calibration.output_name(1) == "model.layers.1.mlp.linear_mlp.weight"
    fit, weight = fits[1]
    assert fit.error_after < 0.9 * fit.error_before
    assert tuple(weight.shape) == (64, 64)
    meter = Meter(
        parent,
        parent.load(torch.float32, "cpu"),
        as_windows(windows(8, 2)),
        as_windows(windows(64, 1)),
        fusion,
        Machine(),
    )
    assert meter.fused(plan).mean < meter.plain(plan).mean


def test_a_linear_ffn_of_the_parents_own_is_no_new_one() -> None:
    parent = Plan.parse("A0F0 A1F1L A2F2")
    assert blocks_to_fit(parent, parent, "unfused") == blocks_to_fit(parent, parent, "parent") == []
    assert blocks_to_fit(Plan.parse("A0F0 A1F1L A2F2L"), parent, "unfused") == [2]


def test_what_is_measured_is_what_is_written(tiny_parent: Parent, student: Callable[[str], ModelFolder]) -> None:
    parent = ModelFolder(tiny_parent("phi3"))
    meter = Meter(
        parent, parent.load(torch.float32, "cpu"), as_windows(windows()), as_windows(windows(16)), NOTHING, Machine()
    )
    built = meter._student(PLAN, {})
    with torch.no_grad():
        assert relative_error(logits(built), logits(student("phi3").load(torch.float32, "cpu"))) < 1e-6


@families
@torch.no_grad()
def test_the_folded_form_computes_the_same(family: str, student: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    export(str(student(family).folder), to="folded", out=tmp_path / "folded")
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", trust_remote_code=True).eval()
    assert relative_error(logits(shipped), logits(student(family).load(torch.float32, "cpu"))) < 1e-6
    config = ModelFolder(tmp_path / "folded").config
    assert config.num_hidden_layers == 2
    assert not any(block.attention.replace_with_linear for block in config.block_configs)


def test_engines_that_would_compute_something_else_are_refused(
    student: Callable[[str], ModelFolder], tmp_path: Path, tiny_student: Parent
) -> None:
    folder = str(student("llama").folder)
    for engine, says in (("vllm", ["ignores replace_with_linear", "--to folded"]), ("mlx-lm", ["--to mlx"])):
        one_line(lambda: export(folder, to="hf", out=tmp_path / "out", engine=engine), *says)  # noqa: B023
        one_line(lambda: serve(Path(folder), engine=engine, dry_run=True), *says)  # type: ignore[arg-type]  # noqa: B023
    one_line(lambda: speculate(folder, folder, out=tmp_path / "out", engine="vllm"), "ignores replace_with_linear")
    assert not (tmp_path / "out").exists()
    for to, engine in (("folded", "vllm"), ("mlx", "mlx-lm")):
        export(folder, to=to, out=tmp_path / to)
        hf.check_engine(ModelFolder(tmp_path / to), engine)
    assert TARGETS["hf"].why_not_in(ModelFolder(tiny_student("llama")), "vllm") is None
    listed = export(folder, list_=True)
    assert isinstance(listed, str)
    for says in ("but vllm ignores", "but SGLang ignores", "no linear layer in the place of an FFN"):
        assert says in listed
    assert "ignores" not in str(export(str(tiny_student("llama")), list_=True))
    card = (student("llama").folder / "README.md").read_text()
    assert "attentions [1, 3, 4] and of FFNs [1, 5]" in card
    assert "vllm serve THIS_FOLDER" not in card


def test_llama_cpp_gets_linear_attentions_only(student: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    one_line(lambda: export(str(student("llama").folder), to="gguf", out=tmp_path / "g"), "linear attentions, but no")
    slot = gguf_file._slots(student("llama").config)[1]
    assert (slot.heads, slot.kv_heads) == (4, 0)


def test_megatron_is_told_of_linear_layers(student: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    megatron.write(student("llama"), tmp_path, "")
    blocks = json.loads((tmp_path / "heterogeneous.json").read_text())["block_configs"]
    assert blocks[1] == {
        "attention": {"no_op": False, "replace_with_linear": True, "num_query_groups": None},
        "mlp": {"no_op": False, "replace_with_linear": True, "ffn_hidden_size": None},
    }
    assert "--ffn-hidden-size 256" in (tmp_path / "arguments.txt").read_text()


def test_mlx_gets_names_of_its_own(student: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    export(str(student("llama").folder), to="mlx", out=tmp_path / "mlx")
    names = set(load_file(tmp_path / "mlx" / "model.safetensors"))
    assert {"model.layers.1.self_attn.linear.weight", "model.layers.5.mlp.linear.weight"} <= names
    assert not [name for name in names if "linear_" in name]
    assert "auto_map" not in json.loads((tmp_path / "mlx" / "config.json").read_text())
    one_line(lambda: export(str(student("qwen2").folder), to="mlx", out=tmp_path / "no"), "no model code")


@families
@torch.no_grad()
def test_a_graph_has_caches_for_attentions_proper_only(family: str, student: Callable[[str], ModelFolder]) -> None:
    from ffn_fusion.serving.traced import Traced

    model = student(family).load(torch.float32, "cpu")
    traced = Traced(model)
    assert traced.ordinals == {0: 0, 5: 1}
    ids = windows(2)
    empty = [torch.zeros(2, heads, 0, size) for heads, size in traced.cache_shapes for _ in range(2)]
    found, present = traced(ids, torch.ones_like(ids), empty)
    assert relative_error(found, model(input_ids=ids, use_cache=False).logits) < TOLERANCE
    assert len(present) == 4


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """`wide(plan)` is a student large enough for the engines' kernels."""
    folder = tmp_path_factory.mktemp("wide")
    parent = save_tiny_parent("llama", folder / "parent", hidden_size=256, intermediate_size=512)

    @cache
    def make(plan: str) -> ModelFolder:
        out = folder / plan.replace(" ", "").replace("/", "_")
        fuse(str(parent), plan=plan, out=out, fusion=NOTHING)
        return ModelFolder(out)

    return make


def in_engine(engine: str, probe: str, model: Path, of: ModelFolder, folder: Path) -> None:
    options = {"engine": {"gpu_memory_utilization": 0.08}} if engine == "vllm" else {}
    found = run_probe(engine, probe, {"it": model}, folder, options=options)["it"]
    assert found.tokens.shape[1] == NEW_TOKENS
    assert_same(found, of)


@needs("mlx-lm")
def test_mlx_runs_linear_layers(wide: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = wide(str(PLAN))
    (tmp_path / "mlx").mkdir()
    mlx.write(model, tmp_path / "mlx", "")
    in_engine("mlx-lm", "mlx", tmp_path / "mlx", model, tmp_path)


@needs("transformers")
def test_the_oldest_transformers_runs_linear_layers(wide: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    in_engine("transformers", "transformers", wide(str(PLAN)).folder, wide(str(PLAN)), tmp_path)


@needs("vllm")
def test_vllm_runs_linear_layers_in_folded_form(wide: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = wide(str(PLAN))
    (tmp_path / "folded").mkdir()
    folded.write(model, tmp_path / "folded", "")
    in_engine("vllm", "vllm", tmp_path / "folded", model, tmp_path)


@needs("llama.cpp")
def test_llama_cpp_runs_linear_attentions(wide: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = wide("A0F0 A1LF1 -F2 A3LF3 A4L A5F5")
    gguf_file.write(model, tmp_path, "f32")
    in_engine("llama.cpp", "llama_cpp", tmp_path / "model-f32.gguf", model, tmp_path)
