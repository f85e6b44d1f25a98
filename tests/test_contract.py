"""The contract of every family: what we load is the stock model, and what we fuse is what the plan says."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, NUM_LAYERS, VOCAB_SIZE, save_tiny_parent
from reference import one_line, planned_logits, relative_error
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.pruning import Channels, Cuts
from ffn_fusion.hf.arch import ARCHS, REFUSED
from ffn_fusion.hf.checkpoint import Checkpoint
from ffn_fusion.hf.model import ModelFolder, expected_specs, materialise, skeleton, student_arch, student_config
from ffn_fusion.hf.surgery import dropped_tensors, student_recipes

TOLERANCE = 1e-4
"""Largest deviation of a logit, relative to the largest logit, in float32."""
PLANS = {
    "identity": "A0F0 A1F1 A2F2 A3F3 A4F4 A5F5",
    "attention removed, nothing fused": "A0F0 A1F1 -F2 -F3 A4F4 A5F5",
    "head of the group keeps its attention": "A0F0 A1F1+2+3 A4F4 A5F5",
    "group without attention": "A0F0 A1F1 -F2+3 A4F4 A5F5",
    "two groups, a layer dropped": "A0F0 -F1+2 A4F4+5",
    "attention and FFN of different layers": "A0F1 A2F3 -F4+5",
    "attentions without FFN": "A0F0 A1 A2F2+3 A4 A5",
}
Parent = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def stock(tiny_parent: Parent) -> Callable[[str], nn.Module]:
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval())


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(5))


def in_memory(parent: ModelFolder, plan: Plan, norm: str, channels: Channels | None = None) -> nn.Module:
    """The student as `fuse` makes it, without a folder."""
    cuts = Cuts(parent.head_dim, channels or {})
    recipes = student_recipes(plan, parent.checkpoint, student_arch(parent), norm, cuts)  # type: ignore[arg-type]
    model = skeleton(student_config(parent, plan))
    materialise(model, {name: recipe.build for name, recipe in recipes.items()}, torch.device("cpu"), torch.float32)
    trunk = model.model
    trunk.rotary_emb = type(trunk.rotary_emb)(config=model.config)
    if hasattr(trunk.embed_tokens, "scalar_embed_scale"):
        trunk.embed_tokens.embed_scale = torch.tensor(trunk.embed_tokens.scalar_embed_scale)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = trunk.embed_tokens.weight
    assert [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta] == []
    return model


def folder_with(config: dict[str, object], folder: Path, weights: Path | None = None) -> ModelFolder:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (folder / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    return ModelFolder(folder)


def test_every_family_of_the_table_has_a_tiny_parent() -> None:
    assert set(FAMILIES) == set(ARCHS) - {"nemotron-nas"}


@families
def test_a_tiny_parent_has_a_tokenizer_that_restores_its_text(family: str, tiny_parent: Parent) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent(family))
    text = "Two FFNs on one input\n\tare one FFN. <3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < VOCAB_SIZE


@families
@torch.no_grad()
def test_a_parent_loads_to_the_logits_of_the_stock_model(
    family: str, tiny_parent: Parent, stock: Callable[[str], nn.Module], ids: torch.Tensor
) -> None:
    parent = ModelFolder(tiny_parent(family))
    expected = stock(family)(input_ids=ids).logits
    assert relative_error(parent.load(torch.float32, "cpu")(input_ids=ids).logits, expected) < 1e-6
    assert parent.plan == Plan.identity(NUM_LAYERS)
    assert parent.made_by is None


@families
@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_student_computes_what_its_plan_says(
    family: str, name: str, norm: str, tiny_parent: Parent, stock: Callable[[str], nn.Module], ids: torch.Tensor
) -> None:
    parent, plan = ModelFolder(tiny_parent(family)), Plan.parse(PLANS[name])
    parent.check_plan(plan)
    expected = planned_logits(stock(family), plan, ids, norm)
    assert relative_error(in_memory(parent, plan, norm)(input_ids=ids).logits, expected) < TOLERANCE


@families
@torch.no_grad()
def test_the_reference_can_tell_plans_and_norms_apart(
    family: str, stock: Callable[[str], nn.Module], ids: torch.Tensor
) -> None:
    model, plan = stock(family), Plan.parse(PLANS["head of the group keeps its attention"])
    logits = planned_logits(model, plan, ids, "folded")
    assert relative_error(planned_logits(model, Plan.identity(NUM_LAYERS), ids, "folded"), model(ids).logits) < 1e-6
    assert relative_error(logits, model(ids).logits) > 100 * TOLERANCE
    assert relative_error(logits, planned_logits(model, plan, ids, "last")) > 100 * TOLERANCE
    assert relative_error(logits, planned_logits(model, Plan.parse("A0F0 A1F1 -F2 -F3 A4F4 A5F5"), ids, "folded")) > (
        100 * TOLERANCE
    )


@families
@torch.no_grad()
def test_a_student_decodes_with_a_cache_as_it_does_without(family: str, tiny_parent: Parent, ids: torch.Tensor) -> None:
    model = in_memory(ModelFolder(tiny_parent(family)), Plan.parse(PLANS["two groups, a layer dropped"]), "folded")
    past, steps = None, []
    for part in ids.split([7, 1, 1, 3], dim=1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), model(input_ids=ids, use_cache=False).logits) < TOLERANCE


@families
def test_recipes_announce_the_shapes_that_the_student_configuration_asks_for(family: str, tiny_parent: Parent) -> None:
    parent, plan = ModelFolder(tiny_parent(family)), Plan.parse(PLANS["two groups, a layer dropped"])
    recipes = student_recipes(plan, parent.checkpoint, student_arch(parent), "folded")
    assert {name: recipe.spec.shape for name, recipe in recipes.items()} == expected_specs(
        student_config(parent, plan)
    )[0]
    for name, recipe in recipes.items():
        built = recipe.build()
        assert (tuple(built.shape), built.dtype) == recipe.spec, name


@families
def test_every_source_tensor_is_used_or_listed_as_dropped(family: str, tiny_parent: Parent) -> None:
    parent, plan = ModelFolder(tiny_parent(family)), Plan.parse("A0F0 A1F1+2 A4F4 A5F5")
    recipes = student_recipes(plan, parent.checkpoint, student_arch(parent), "folded")
    dropped = dropped_tensors(recipes, parent.checkpoint)
    gone = tuple(f"model.layers.{layer}." for layer in ("2.self_attn", "2.input_layernorm", "3"))
    norm_biases = "post_attention_layernorm.bias" if family == "starcoder2" else "nothing else"
    assert {name for name in parent.checkpoint.specs if name.startswith(gone)} == {
        name for name in dropped if norm_biases not in name or name.startswith(gone)
    }


def test_a_student_without_changes_needs_no_tensor_dropped(tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent("llama"))
    recipes = student_recipes(parent.plan, parent.checkpoint, student_arch(parent), "folded")
    assert dropped_tensors(recipes, parent.checkpoint) == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_plain_parent_gets_the_portable_layout(family: str, tiny_parent: Parent) -> None:
    config = student_config(ModelFolder(tiny_parent(family)), Plan.parse(PLANS["group without attention"]))
    assert config.model_type == "nemotron-nas"
    assert config.architectures == ["DeciLMForCausalLM"]
    assert [block.attention.no_op for block in config.block_configs] == [False, False, True, False, False]
    assert config.ffn_widths == [256] * 5


@families
def test_a_student_configuration_survives_its_file(family: str, tiny_parent: Parent, tmp_path: Path) -> None:
    parent = ModelFolder(tiny_parent(family))
    config = student_config(parent, Plan.parse(PLANS["attention and FFN of different layers"]))
    config.save_pretrained(tmp_path)
    # `ModelFolder` uses our own classes, so the way to the shipped files is left out.
    own = dict.fromkeys(("auto_map", "transformers_version"))
    assert ModelFolder(tmp_path).config.to_dict() | own == config.to_dict() | own
    assert str(ModelFolder(tmp_path).plan) == "A0F0 A1F1 -F2"


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "cohere"])
def test_a_family_that_cannot_be_fused_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    folder = folder_with({"model_type": model_type, "num_hidden_layers": 4}, tmp_path / "model")
    one_line(lambda: folder.config, model_type, REFUSED[model_type])
    one_line(folder.check, REFUSED[model_type])
    one_line(lambda: folder.load(torch.float32, "cpu"), REFUSED[model_type])


@pytest.mark.parametrize("config", [{"model_type": "mamba9"}, {}])
def test_an_unknown_family_is_refused_and_the_known_ones_are_named(config: dict[str, object], tmp_path: Path) -> None:
    folder = folder_with(config, tmp_path / "model")
    one_line(lambda: folder.config, str(config.get("model_type")), "llama", "starcoder2")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("intermediate_size", 128, "model.layers.0.mlp"),
        ("hidden_size", 32, "shape"),
        ("num_key_value_heads", 4, "self_attn.k_proj"),
        ("vocab_size", 99, "model.embed_tokens.weight"),
        ("num_hidden_layers", 7, "model.layers.6."),
        ("attention_bias", True, "self_attn.q_proj.bias"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(
    field: str, value: object, named: str, tiny_parent: Parent, tmp_path: Path
) -> None:
    parent = tiny_parent("llama")
    config = json.loads((parent / "config.json").read_text()) | {field: value}
    folder = folder_with(config, tmp_path / "model", weights=parent)
    one_line(folder.check, named, str(tmp_path / "model"))
    one_line(lambda: folder.load(torch.float32, "cpu"), named)


def test_a_configuration_with_a_field_of_the_wrong_type_is_refused(tiny_parent: Parent, tmp_path: Path) -> None:
    config = json.loads((tiny_parent("llama") / "config.json").read_text()) | {"hidden_size": "wide"}
    one_line(lambda: folder_with(config, tmp_path / "model").config, "config.json", "hidden_size")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    one_line(lambda: ModelFolder(tmp_path).config, "config.json", "does not exist")


def test_a_quantised_parent_is_refused(tiny_parent: Parent, tmp_path: Path) -> None:
    config = json.loads((tiny_parent("llama") / "config.json").read_text())
    folder = folder_with(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, tmp_path / "model")
    one_line(folder.check, "quantised", str(tmp_path / "model"))


def test_a_plan_for_sublayers_that_the_parent_lacks_is_refused(tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent("llama"))
    one_line(lambda: parent.check_plan(Plan.parse("A0F0 A6F1")), "attention 6")
    one_line(lambda: parent.check_plan(Plan.parse("A0F0 A1F1+7")), "FFN 7")


def test_a_norm_bias_without_an_ffn_bias_to_fold_it_into_is_refused(tmp_path: Path) -> None:
    parent = ModelFolder(save_tiny_parent("starcoder2", tmp_path / "parent", use_bias=False))
    plan, arch = Plan.parse(PLANS["head of the group keeps its attention"]), student_arch(parent)
    one_line(lambda: student_recipes(plan, parent.checkpoint, arch, "folded"), "bias", "--norm last")
    assert student_recipes(plan, parent.checkpoint, arch, "last")
    assert student_recipes(Plan.identity(NUM_LAYERS), parent.checkpoint, arch, "folded")


def test_a_checkpoint_opens_as_the_source_of_a_parent(tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent("qwen3"))
    assert isinstance(parent.checkpoint, Checkpoint)
    parent.check()
