"""Target `mlx`: the student folder for MLX-LM, which has names of its own for linear layers.

MLX-LM runs model code of its own, so ours stays out: it would not find these names.
"""

import json
from pathlib import Path

from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.hf.model import ModelFolder, copy_tokenizer
from ffn_fusion.hf.replace import LINEAR_ATTENTION, LINEAR_FFN

NAMES = {LINEAR_ATTENTION: "self_attn.linear", LINEAR_FFN: "mlp.linear"}


def is_mlx(model: ModelFolder) -> bool:
    """Whether a model's linear layers go by MLX-LM's names."""
    return any(f".{name}." in stored for stored in model.checkpoint.specs for name in NAMES.values())


def why_not(student: ModelFolder) -> str | None:
    """Why MLX-LM cannot run this student, or None."""
    if student.arch.class_name != "DeciLMForCausalLM":
        return f"MLX-LM has no model code for {student.arch.class_name}; of students it loads nemotron-nas ones"
    return None


def write(student: ModelFolder, folder: Path, _dtype: str) -> None:
    """Write the renamed student into `folder`; tensors are copied one at a time."""
    source = student.checkpoint
    renamed = {name: _renamed(name) for name in source.specs}
    with ShardWriter(folder, {new: source.specs[old] for old, new in renamed.items()}) as writer:
        for old, new in renamed.items():
            writer.write(new, source.read(old))
    fields = {name: value for name, value in student.config.to_dict().items() if name != "auto_map"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(student.folder, folder)


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name
