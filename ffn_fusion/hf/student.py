"""Writes a student folder: weights streamed in, configuration, plan, tokenizer, our two model files, a model card."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.activations import ACT2FN

from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.hf.arch import FFN, FFN_NORM, Arch
from ffn_fusion.hf.checkpoint import Checkpoint, ShardWriter
from ffn_fusion.hf.model import (
    PLAN_FILE,
    ModelFolder,
    copy_companions,
    expected_specs,
    student_arch,
    student_config,
)
from ffn_fusion.hf.surgery import LAYER, Norm, dropped_tensors, student_recipes
from ffn_fusion.progress import track

TOLERANCE = 2e-2
"""Relative difference allowed between a written fused FFN and its members: weights are rounded to bf16 once."""


def write_student(parent: ModelFolder, plan: Plan, out: Path, norm: Norm, fits: Mapping[str, Path]) -> list[str]:
    """Write the student of `plan` into the existing folder `out`; returns the source tensors it leaves out.

    `fits` maps tensor names to safetensors files that hold a refitted replacement. Memory holds one tensor at a time.
    """
    source, arch = parent.checkpoint, student_arch(parent)
    recipes = student_recipes(plan, source, arch, norm)
    config = student_config(parent, plan)
    for name, shape in expected_specs(config)[0].items():
        assert recipes[name].spec.shape == shape, (name, recipes[name].spec.shape, shape)
    with ShardWriter(out, {name: recipe.spec for name, recipe in recipes.items()}) as writer:
        for name, recipe in track(recipes.items(), "fuse: tensors written", len(recipes)):
            writer.write(name, _read_fit(fits[name], recipe.spec.dtype) if name in fits else recipe.build())
    _check_fused_blocks(parent, plan, Checkpoint(out), arch, norm, fits)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    copy_companions(parent.folder, out)
    ModelFolder(out).check()
    return dropped_tensors(recipes, source)


def _read_fit(path: Path, dtype: torch.dtype) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor("weight")
    return tensor.to(dtype)


@torch.no_grad()
def _check_fused_blocks(
    parent: ModelFolder, plan: Plan, student: Checkpoint, arch: Arch, norm: Norm, fits: Mapping[str, Path]
) -> None:
    """What was written must equal the sum of the members on random input (a fitted block up to its activations)."""
    act = ACT2FN[parent.config.hidden_act]
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(plan.blocks):
        if not block.is_fused:
            continue
        x = torch.randn(4, parent.config.hidden_size, generator=generator)
        prefix = LAYER.format(index)
        fused = _activations(student, prefix, x, arch, act)
        members = [_member_activations(parent.checkpoint, block, j, x, arch, act, norm) for j in range(len(block.ffns))]
        wanted = torch.cat(members, dim=-1)
        _assert_close(fused[:, : wanted.shape[1]], wanted, str(block))
        name = f"{prefix}{FFN}.{arch.output}.weight"
        if name not in fits:
            down = student.read(name).float()
            parts = [
                h @ parent.checkpoint.read(f"{LAYER.format(ffn.layer)}{FFN}.{arch.output}.weight").float().T
                for h, ffn in zip(members, block.ffns, strict=True)
            ]
            _assert_close(fused @ down.T, torch.stack(parts).sum(0), str(block))


def _member_activations(
    source: Checkpoint, block: Block, member: int, x: Tensor, arch: Arch, act: torch.nn.Module, norm: Norm
) -> Tensor:
    prefix = LAYER.format(block.ffns[member].layer)
    of_norm = prefix if norm == "folded" else LAYER.format(block.ffns[-1].layer)
    return _activations(source, prefix, x, arch, act, of_norm)


def _activations(
    source: Checkpoint, prefix: str, x: Tensor, arch: Arch, act: torch.nn.Module, norm_prefix: str | None = None
) -> Tensor:
    """Hidden activations [N, h] of one FFN on a normalised input before the norm's gain, in float32."""
    norm = f"{norm_prefix or prefix}{FFN_NORM}."
    x = x * (source.read(f"{norm}weight").float() + arch.norm_offset)
    if f"{norm}bias" in source.specs:
        x = x + source.read(f"{norm}bias").float()
    projected: list[Tensor] = []
    for name in arch.inputs:
        key = f"{prefix}{FFN}.{name}"
        y = x @ source.read(f"{key}.weight").float().T
        projected += (y + source.read(f"{key}.bias").float() if f"{key}.bias" in source.specs else y).chunk(
            arch.parts, -1
        )
    activated: Tensor = act(projected[0])
    return activated * projected[1] if len(projected) > 1 else activated


def _assert_close(found: Tensor, wanted: Tensor, block: str) -> None:
    error = float((found - wanted).norm() / wanted.norm())
    assert error < TOLERANCE, f"block {block} differs from its members by {error:.1e}; nothing was saved"


def model_card(parent_name: str, plan: Plan, layout: str) -> str:
    """README of the student folder."""
    return f"""---
license: other
base_model: {parent_name}
library_name: transformers
tags: [ffn-fusion]
---
# A fused student of {parent_name}

Made by ffn-fusion: attention layers removed, runs of FFNs fused into one.

- Plan: `{plan}`
- {len(plan.blocks)} blocks, {len(plan.attention_layers)} attentions, {plan.num_sublayers} sequential sublayers
- Fused groups (source layers): {plan.groups or "none"}
- Layout: {layout}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`record.json` holds how it was made. The model inherits its parent's licence and limits.
"""
