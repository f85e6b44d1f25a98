"""Target `folded`: a layer is an attention followed by a list of FFNs, so that every layer has an attention.

vLLM's Transformers backend asks each layer for an attention, and this is the form of ours that it loads; families that
the nemotron-nas layout cannot express reach vLLM this way. The weights are those of the student under other names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffn_fusion.hf.arch import Arch, arch_of
from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.hf.model import ModelFolder, copy_companions, model_class
from ffn_fusion.hf.surgery import LAYER

NO_FFN = {"no_op": True, "replace_with_linear": False, "ffn_mult": None, "sparsify": None}


def why_not(student: ModelFolder) -> str | None:
    """Why vLLM's Transformers backend could not run the folded student, or None."""
    groups = {b.attention.n_heads_in_group for b in student.config.block_configs if not b.attention.no_op}
    if len(groups) > 1:
        return "its attentions differ in kv heads, and that backend sizes all of them alike"
    return None


def is_folded(model: ModelFolder) -> bool:
    """Whether a model is the result of this export."""
    return any("following_ffns" in block for block in model.config.block_configs)


def write(student: ModelFolder, folder: Path, _dtype: str) -> None:
    """Write the folded student into `folder`; tensors are copied one at a time."""
    source, renamed = student.checkpoint, dict(_names(student))
    with ShardWriter(folder, {new: source.specs[old] for old, new in renamed.items()}) as writer:
        for old, new in renamed.items():
            writer.write(new, source.read(old))
    (folder / "config.json").write_text(json.dumps(folded_config(student).to_dict(), indent=2) + "\n", encoding="utf-8")
    copy_companions(student.folder, folder)
    ModelFolder(folder).check()


def folded_config(student: ModelFolder) -> Any:
    """Configuration of the folded student, in the class of its own family."""
    arch = _arch(student)
    fields = student.config.to_dict()
    heads = [layer[0] for layer in _layers(student)]
    for name in arch.layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][block] for block in heads]
    fields["block_configs"] = [_entry(student, layer) for layer in _layers(student)]
    fields["num_hidden_layers"] = len(heads)
    if "logits_scaling" in fields:
        # What vLLM's backend calls Granite's divisor of the logits; it does not read the family's own name.
        fields["logit_scale"] = 1 / fields["logits_scaling"]
    fields.pop("model_type")
    config_class = model_class(arch).config_class
    config = config_class.from_dict(fields)
    trunk = arch.class_name.removesuffix("ForCausalLM") + "Model"
    config.architectures = [arch.class_name]
    config.auto_map = {
        "AutoConfig": f"configuration_ffn_fusion.{config_class.__name__}",
        "AutoModel": f"modeling_ffn_fusion.{trunk}",
        "AutoModelForCausalLM": f"modeling_ffn_fusion.{arch.class_name}",
    }
    return config


def _arch(student: ModelFolder) -> Arch:
    """vLLM takes the name DeciLMForCausalLM for its own class, so such a student goes by its parent family's."""
    return arch_of("llama") if student.arch.class_name == "DeciLMForCausalLM" else student.arch


def _layers(student: ModelFolder) -> list[list[int]]:
    """The student's blocks by folded layer: each attention, then the attention-free blocks behind it."""
    layers: list[list[int]] = []
    for index, block in enumerate(student.config.block_configs):
        if not block.attention.no_op:
            layers.append([])
        layers[-1].append(index)
    return layers


def _ffns(student: ModelFolder, layer: list[int]) -> list[int]:
    """Those of a layer's blocks that have an FFN."""
    return [index for index in layer if not student.config.block_configs[index].ffn.no_op]


def _entry(student: ModelFolder, layer: list[int]) -> dict[str, Any]:
    blocks = student.config.block_configs
    first, *following = [blocks[index].ffn for index in _ffns(student, layer)] or [NO_FFN]
    entry = {"attention": blocks[layer[0]].attention, "ffn": first}
    return entry | ({"following_ffns": following} if following else {})


def _names(student: ModelFolder) -> Iterator[tuple[str, str]]:
    """Student tensor name → folded tensor name."""
    places = {}
    for number, layer in enumerate(_layers(student)):
        prefix = LAYER.format(number)
        for index in layer:
            places[index] = prefix
        for position, index in enumerate(_ffns(student, layer)[1:]):
            places[index] = f"{prefix}following_ffns.{position}."
    for name in student.checkpoint.specs:
        if name.startswith("model.layers."):
            block, rest = name.removeprefix("model.layers.").split(".", 1)
            yield name, places[int(block)] + rest
        else:
            yield name, name
