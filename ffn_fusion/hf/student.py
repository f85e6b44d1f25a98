"""Writes a student folder: weights streamed in, configuration, plan, tokenizer, our two model files, a model card."""

import json
from collections.abc import Callable, Mapping
from itertools import accumulate, product
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.pruning import Channels, Cuts
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
from ffn_fusion.hf.surgery import LAYER, Norm, Trained, dropped_tensors, student_recipes
from ffn_fusion.progress import track

SAMPLED = 128
"""Channels or outputs compared in each tensor."""
TOLERANCE = 2e-2
"""Relative difference allowed between a written fused FFN and its members: weights are rounded to bf16 once."""


def write_student(
    parent: ModelFolder,
    plan: Plan,
    out: Path,
    norm: Norm,
    fits: Mapping[str, Path],
    channels: Channels,
    trained: Trained | None = None,
) -> list[str]:
    """Write the student of `plan` into the existing folder `out`; returns the source tensors it leaves out.

    `fits` maps tensor names to safetensors files that hold a refitted replacement, `channels` has those kept of each
    FFN that the plan cuts, `trained` the blocks that are not made of the parent alone. Memory holds one tensor at a
    time.
    """
    source, arch = parent.checkpoint, student_arch(parent)
    recipes = student_recipes(plan, source, arch, norm, Cuts(parent.head_dim, channels), trained)
    config = student_config(parent, plan)
    for name, shape in expected_specs(config)[0].items():
        assert recipes[name].spec.shape == shape, (name, recipes[name].spec.shape, shape)
    with ShardWriter(out, {name: recipe.spec for name, recipe in recipes.items()}) as writer:
        for name, recipe in track(recipes.items(), "fuse: tensors written", len(recipes)):
            writer.write(name, _read_fit(fits[name], recipe.spec.dtype) if name in fits else recipe.build())
    sampled = _Sampled(source, Checkpoint(out), arch, norm, channels)
    down = f"{FFN}.{arch.output}.weight"
    for index, block in enumerate(plan.blocks):
        prefix, makers = LAYER.format(index), trained.makers(block) if trained else {}
        sampled.check_trained({prefix + name: make for name, make in makers.items() if prefix + name not in fits})
        # A trained FFN is no longer its members; one that was only fitted is, but for its down projection.
        if (block.is_fused or block.is_cut) and not any(
            name.startswith((FFN, FFN_NORM)) for name in makers.keys() - {down}
        ):
            sampled.check(block, prefix, fitted=prefix + down in fits or down in makers)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    copy_companions(parent.folder, out)
    ModelFolder(out).check()
    return dropped_tensors(recipes, source)


def _read_fit(path: Path, dtype: torch.dtype) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor("weight")
    return tensor.to(dtype)


class _Sampled:
    """Compares samples of a written fused or cut FFN with its members: some channels of each input projection on a
    random normalised input, and some outputs of the down projection on random activations. Both are the block."""

    def __init__(self, parent: Checkpoint, student: Checkpoint, arch: Arch, norm: Norm, channels: Channels) -> None:
        self.parent, self.student, self.arch, self.norm, self.channels = parent, student, arch, norm, channels
        self.generator = torch.Generator().manual_seed(0)

    def check(self, block: Block, prefix: str, fitted: bool) -> None:
        members = [LAYER.format(ffn.layer) for ffn in block.ffns]
        down = f"{FFN}.{self.arch.output}.weight"
        own = [self.parent.specs[member + down].shape[1] for member in members]
        kept = [self.channels.get(ffn.layer, torch.arange(h)) for ffn, h in zip(block.ffns, own, strict=True)]
        widths = [len(channels) for channels in kept]
        hidden_size, total = self.student.specs[prefix + down].shape
        x = torch.randn(hidden_size, generator=self.generator)
        found, wanted = [], []
        for index, end in enumerate(accumulate(widths)):
            first, count = self._range(widths[index])
            norm_of = members[index] if self.norm == "folded" else members[-1]
            for name, part in product(self.arch.inputs, range(self.arch.parts)):
                key = f"{FFN}.{name}"
                theirs = part * own[index] + kept[index][first : first + count]
                wanted.append(self._project(self.parent, members[index] + key, x, norm_of, theirs))
                ours = part * total + end - widths[index] + first + torch.arange(count)
                found.append(self._project(self.student, prefix + key, x, prefix, ours))
        _assert_close(torch.cat(found), torch.cat(wanted), block)
        if not fitted:
            h = torch.randn(total, generator=self.generator)
            rows = self._range(hidden_size)
            parts = zip(members, kept, h[: sum(widths)].split(widths), strict=True)
            sums = [self.parent.rows(member + down, *rows)[:, held].float() @ part for member, held, part in parts]
            _assert_close(self.student.rows(prefix + down, *rows).float() @ h, torch.stack(sums).sum(0), block)

    def check_trained(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        """Some rows of every tensor of a trained block are those of the library."""
        for name, make in makers.items():
            rows = self._range(self.student.specs[name].shape[0])
            wanted = make().to(self.student.specs[name].dtype)[rows[0] : sum(rows)]
            assert torch.equal(self.student.rows(name, *rows), wanted), f"{name} is not the library's"

    def _range(self, size: int) -> tuple[int, int]:
        count = min(SAMPLED, size)
        return int(torch.randint(size - count + 1, (), generator=self.generator)), count

    def _project(self, source: Checkpoint, key: str, x: Tensor, norm_prefix: str, channels: Tensor) -> Tensor:
        norm = norm_prefix + FFN_NORM
        z = x * (source.read(f"{norm}.weight").float() + self.arch.norm_offset)
        z = z + source.read(f"{norm}.bias").float() if f"{norm}.bias" in source.specs else z
        y = _picked(source, f"{key}.weight", channels).float() @ z
        return y + _picked(source, f"{key}.bias", channels).float() if f"{key}.bias" in source.specs else y


def _picked(source: Checkpoint, name: str, rows: Tensor) -> Tensor:
    """Rows of a tensor, in rising order, without reading those in front of the first and behind the last."""
    first = int(rows[0])
    return source.rows(name, first, int(rows[-1]) - first + 1)[rows - first]


def _assert_close(found: Tensor, wanted: Tensor, block: Block) -> None:
    error = float((found - wanted).norm() / wanted.norm())
    assert error < TOLERANCE, f"block {block} differs from its members by {error:.1e}; nothing was saved"


SERVED = {
    True: "vllm serve THIS_FOLDER --trust-remote-code    # or: mlx_lm.server --model THIS_FOLDER",
    False: "ffn-fusion export THIS_FOLDER --to folded --out FOLDED && vllm serve FOLDED --trust-remote-code",
}
"""How engines serve a student in the portable layout without linear layers, and any other."""


def model_card(parent_name: str, plan: Plan, layout: str) -> str:
    """README of the student folder."""
    return f"""---
license: other
base_model: {parent_name}
library_name: transformers
tags: [ffn-fusion]
---
# A fused student of {parent_name}

Made by ffn-fusion: attention layers removed or given fewer kv heads, FFNs made narrower or fused into one, either of
them replaced by a linear layer.

- Plan: `{plan}`
- {len(plan.blocks)} blocks, {len(plan.attention_layers)} attentions, {plan.num_sublayers} sequential sublayers
- Linear layers in the place of attentions {plan.linear_attentions or "none"} and of FFNs {plan.linear_ffns or "none"}
- Fused groups (source layers): {plan.groups or "none"}
- Layout: {layout}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)
```

```sh
{SERVED[layout == "DeciLMForCausalLM" and not plan.has_linear]}
```

`record.json` holds how it was made. The model inherits its parent's licence and limits.
"""
