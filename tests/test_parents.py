"""Parents that other tools made: padding blocks, attention without FFN, kv heads and widths of each block's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_parent
from reference import one_line, relative_error
from safetensors.torch import load_file, save_file
from texts import as_windows, write_text
from torch import Tensor

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import AnalyzeResult
from ffn_fusion.folder import read_record
from ffn_fusion.hf.calibrate import Calibration
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder, student_config
from ffn_fusion.hf.probe import record
from ffn_fusion.hf.student import write_student
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.settings import Budget, Fusion, Machine, Text
from ffn_fusion.stages.analyze import analyze
from ffn_fusion.stages.bench import bench
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.stages.search import search

HEADS, HEAD_DIM = 4, 16
BLOCKS = [(2, 96), (1, 256), (0, 0), (4, 0), (0, 512), (0, 256), (1, 0), (2, 768)]
"""kv heads and FFN width of each block; two kv heads and 96 channels are what the stock model has."""
PLAN = "A0F0 A1F1 A3 -F4 -F5 A6 A7F7"
FUSED = "A0F0 A1F1 A3 -F4+5 A7F7"


def nemotron(kv_heads: int, width: int) -> dict[str, Any]:
    return {
        "attention": {
            "no_op": not kv_heads,
            "n_heads_in_group": HEADS // kv_heads if kv_heads else None,
            "replace_with_linear": False,
        },
        "ffn": {"no_op": not width, "ffn_mult": 1.5 * width / 64 if width else None, "replace_with_linear": False},
    }


def puzzletron(kv_heads: int, width: int) -> dict[str, Any]:
    return {
        "attention": {"no_op": not kv_heads, "num_key_value_heads": kv_heads or None},
        "ffn": {"no_op": not width, "intermediate_size": width or None, "moe": None},
        "parallel_blocks": None,
    }


def uneven_parent(folder: Path, blocks: list[tuple[int, int]], entry: Callable[..., Any], **fields: Any) -> Path:
    """A folder as such a tool writes it: the stock model's embeddings and norms, its own blocks."""
    save_tiny_parent("llama", folder, num_hidden_layers=len(blocks))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer, (kv_heads, width) in enumerate(blocks):
        prefix = f"model.layers.{layer}."
        shapes = {f"self_attn.{name}_proj": (kv_heads * HEAD_DIM, 64) for name in "kv"}
        shapes |= {"mlp.gate_proj": (width, 64), "mlp.up_proj": (width, 64), "mlp.down_proj": (64, width)}
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        gone = [] if kv_heads else ["self_attn", "input_layernorm"]
        gone += [] if width else ["mlp", "post_attention_layernorm"]
        for name in [name for name in tensors if name.startswith(tuple(prefix + part for part in gone))]:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"block_configs": [entry(*block) for block in blocks], **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def puzzled(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A Llama of Puzzletron's; never write into it."""
    return ModelFolder(uneven_parent(tmp_path_factory.mktemp("uneven") / "parent", BLOCKS, puzzletron))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(5))


def plain_logits(folder: Path, plan: Plan, ids: Tensor) -> Tensor:
    """A Llama's forward from the tensors alone, block after block; kv heads follow from the shapes."""
    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    x = w["model.embed_tokens.weight"][ids]
    angles = torch.arange(ids.shape[1]).double()[:, None] / config["rope_parameters"]["rope_theta"] ** (
        torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM
    )
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * gain

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ w[name].T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def attention(x: Tensor, at: str) -> Tensor:
        q, k, v = (heads(x, f"{at}.{name}_proj.weight") for name in "qkv")
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{at}.o_proj.weight"].T

    def ffn(x: Tensor, at: str) -> Tensor:
        gate, up = (x @ w[f"{at}.{name}_proj.weight"].T for name in ("gate", "up"))
        return (torch.nn.functional.silu(gate) * up) @ w[f"{at}.down_proj.weight"].T

    for block in plan.blocks:
        if block.attention:
            at = f"model.layers.{block.attention.layer}."
            x = x + attention(norm(x, w[f"{at}input_layernorm.weight"]), f"{at}self_attn")
        shared = x
        for member in block.ffns:
            at = f"model.layers.{member.layer}."
            x = x + ffn(norm(shared, w[f"{at}post_attention_layernorm.weight"]), f"{at}mlp")
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("entry", [puzzletron, nemotron])
def test_a_parent_of_uneven_blocks_computes_what_its_blocks_say(
    entry: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    official = {"num_key_value_heads": None, "intermediate_size": None} if entry is nemotron else {}
    kind = {"model_type": "nemotron-nas"} if entry is nemotron else {}
    # The multiplier of nemotron-nas knows multiples of 256 only.
    blocks = [(kv, 256 if width == 96 else width) for kv, width in BLOCKS] if entry is nemotron else BLOCKS
    parent = ModelFolder(uneven_parent(tmp_path / "parent", blocks, entry, **official, **kind))
    assert str(parent.plan) == PLAN
    assert parent.num_layers == 8
    found = parent.load(torch.float32, "cpu")(input_ids=ids).logits
    expected = plain_logits(parent.folder, parent.plan, ids)
    assert relative_error(found.double(), expected) < 1e-4
    # The reference tells blocks apart.
    other = plain_logits(parent.folder, Plan.parse("A0F0 A1F1 -F4 -F5 A6 A7F7"), ids)
    assert relative_error(other, expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("plan", [PLAN, FUSED, "A0F0 A1F1 A3 A6F4+5 -F7", "A0 A1F1 -F4+5 A3 A6 -F7"])
def test_its_student_computes_what_the_plan_says(plan: str, puzzled: ModelFolder, ids: Tensor, tmp_path: Path) -> None:
    write_student(puzzled, Plan.parse(plan), tmp_path, "folded", {}, {})
    student = ModelFolder(tmp_path)
    found = student.load(torch.float32, "cpu")(input_ids=ids).logits
    assert relative_error(found.double(), plain_logits(puzzled.folder, Plan.parse(plan), ids)) < 1e-4
    parts = []
    past = None
    model = student.load(torch.float32, "cpu")
    for part in ids.split([7, 1, 4], dim=1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    assert relative_error(torch.cat(parts, 1), found) < 1e-4


def test_an_attention_without_ffn_gets_one_of_zeros_behind_a_neutral_norm(puzzled: ModelFolder, tmp_path: Path) -> None:
    write_student(puzzled, Plan.parse(PLAN), tmp_path, "folded", {}, {})
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.2.mlp.gate_proj.weight"].shape == (256, 64)
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (64, 256)
    assert not any(tensors[f"model.layers.2.mlp.{name}_proj.weight"].any() for name in ("gate", "up", "down"))
    assert torch.equal(tensors["model.layers.2.post_attention_layernorm.weight"], torch.ones(64))
    config = student_config(puzzled, Plan.parse(PLAN))
    assert [block.ffn.no_op for block in config.block_configs] == [False] * 7
    assert config.ffn_widths == [256, 256, 256, 512, 256, 256, 768]
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 4, 1, None, None, 4, 2]
    assert str(ModelFolder(tmp_path).plan) == "A0F0 A1F1 A2F2 -F3 -F4 A5F5 A6F6"


@pytest.mark.parametrize(("family", "neutral"), [("gemma", 0.0), ("starcoder2", 1.0)])
def test_the_neutral_norm_is_the_familys_own(
    family: str, neutral: float, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    write_student(ModelFolder(tiny_parent(family)), Plan.parse("A0F0 A1 A2F2"), tmp_path, "folded", {}, {})
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.post_attention_layernorm.weight"], torch.full((64,), neutral))
    others = [t for n, t in tensors.items() if n.startswith("model.layers.1.mlp.")]
    others += [t for n, t in tensors.items() if n == "model.layers.1.post_attention_layernorm.bias"]
    assert len(others) == (3 if family == "gemma" else 5)
    assert not any(tensor.any() for tensor in others)


def test_a_linear_layer_without_its_weights_is_refused(puzzled: ModelFolder, tmp_path: Path) -> None:
    config = json.loads((puzzled.folder / "config.json").read_text())
    config["block_configs"][1]["attention"]["replace_with_linear"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(puzzled.folder / "model.safetensors", tmp_path / "model.safetensors")
    one_line(ModelFolder(tmp_path).check, "lacks tensor model.layers.1.self_attn.linear_attn.weight")


def test_entries_that_are_not_as_many_as_layers_are_refused(puzzled: ModelFolder, tmp_path: Path) -> None:
    config = json.loads((puzzled.folder / "config.json").read_text()) | {"num_hidden_layers": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    one_line(lambda: ModelFolder(tmp_path).config, "8 entries", "9 layers")


def test_a_plan_may_name_only_what_such_a_parent_has(puzzled: ModelFolder) -> None:
    one_line(lambda: puzzled.check_plan(Plan.parse("A0F0 A1F1 A2F4")), "attention 2")
    one_line(lambda: puzzled.check_plan(Plan.parse("A0F0 A1F1 -F3")), "FFN 3")


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(4, 128, (count, 24), generator=torch.Generator().manual_seed(seed))


def test_an_uneven_parent_can_be_measured_and_fitted(puzzled: ModelFolder) -> None:
    meter = Meter(
        puzzled,
        puzzled.load(torch.float32, "cpu"),
        as_windows(windows(4, 1)),
        as_windows(windows(32, 0)),
        Fusion(),
        Machine(batch_size=3),
    )
    assert abs(meter.fused(puzzled.plan).mean) < 1e-5
    removed = meter.removals([6], [3])[3].mean
    assert removed == pytest.approx(meter.plain(puzzled.plan.without_attention([3, 6])).mean, rel=1e-3)
    plan = Plan.parse(FUSED)
    fitted = meter.fused(plan).mean
    assert fitted < meter.plain(plan).mean


def test_a_fit_on_an_uneven_parent_streams_as_the_model_does(puzzled: ModelFolder) -> None:
    """From disk, one layer at a time, padding and attentions without FFN included."""
    ids = windows(16, 0)
    walk = ParentWalk(puzzled, puzzled.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    calibration = Calibration(walk, Plan.parse(FUSED.replace("A7F7", "-F7")), Fusion(), {})
    *_, (_, _, state) = calibration.run(ids)
    model = puzzled.load(torch.float32, "cpu")
    torch.testing.assert_close(state.parent, record(model, ids).streams[-1], rtol=1e-4, atol=1e-4)


def test_an_uneven_parent_goes_through_search_fuse_and_bench(puzzled: ModelFolder, tmp_path: Path) -> None:
    name, machine = str(puzzled.folder), Machine(dtype="fp32")
    text = Text(text=(str(write_text(tmp_path, "text", 0, documents=200)),), length=24)
    analyze(name, out=tmp_path / "a", windows=2, text=text, machine=machine)
    options: dict[str, Any] = {"windows": 2, "fit_windows": 8, "text": text, "machine": machine}
    budget = Budget(remove_attention=3, fusion_slack=1e9)
    found = search(name, analysis=tmp_path / "a", out=tmp_path / "s", budget=budget, **options).result
    plan = Plan.parse(found.plan)
    assert plan.ffn_layers == puzzled.plan.ffn_layers, "only attentions are removed"
    assert len(plan.attention_layers) == 2
    assert plan.runs() == plan.groups, "with no limit every run is one FFN"
    fuse(name, plan=found.plan, out=tmp_path / "student", fit_windows=8, text=text, machine=machine)
    rows = bench(name, str(tmp_path / "student"), out=tmp_path / "b", new_tokens=2, repeats=1, machine=machine)
    counted = rows.result.models
    assert counted[0].num_sublayers == puzzled.plan.num_sublayers
    assert counted[0].kv_bytes_per_token == 2 * HEAD_DIM * 4 * (2 + 1 + 4 + 1 + 2)


def test_an_uneven_parent_can_be_analysed(puzzled: ModelFolder, tmp_path: Path) -> None:
    text = Text(text=(str(write_text(tmp_path, "text", 0, documents=100)),), length=24)
    analyze(str(puzzled.folder), out=tmp_path / "a", windows=2, text=text, machine=Machine(dtype="fp32"))
    found = read_record(tmp_path / "a", AnalyzeResult).result
    assert [score is not None for score in found.attention] == [kv > 0 for kv, _ in BLOCKS]
    assert [score is not None for score in found.ffn] == [width > 0 for _, width in BLOCKS]
    assert found.geometry.norm_ratio[2] == 0, "padding adds nothing"
    assert found.geometry.norm_ratio[3] > 0
    block = torch.tensor(found.block_dependency)
    assert block.isfinite().all()
    assert block[2].abs().max() < 1e-5, "nothing depends on padding"
    assert block[0, 3] > 0, "what an attention without FFN adds depends on block 0"
    assert block[3, 6] > 0
