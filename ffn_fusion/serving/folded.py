"""Target `folded`: a layer is an attention followed by a list of FFNs, so that every layer has an attention.

vLLM's Transformers backend asks each layer for an attention, and this is the form of ours that it loads; families that
the nemotron-nas layout cannot express reach vLLM this way, and so do linear layers, which its own class ignores. A
linear attention is listed among the FFNs: like them it adds what it makes of the normalised stream. The weights are
those of the student under other names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffn_fusion.core.layout import is_linear
from ffn_fusion.hf.arch import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, Arch, arch_of
from ffn_fusion.hf.block_configs import linear_ffn_entry
from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.hf.model import ModelFolder, copy_companions, model_class
from ffn_fusion.hf.replace import LINEAR_ATTENTION, LINEAR_FFN
from ffn_fusion.hf.surgery import LAYER

NO_FFN = {"no_op": True, "replace_with_linear": False, "ffn_mult": None, "sparsify": None}


def why_not(student: ModelFolder) -> str | None:
    """Why vLLM's Transformers backend could not run the folded student, or None."""
    groups = {b.attention.n_heads_in_group for b in student.config.block_configs if _is_cached(b)}
    if len(groups) > 1:
        return "its attentions differ in kv heads, and that backend sizes all of them alike"
    return None


def is_folded(model: ModelFolder) -> bool:
    """Whether a model is the result of this export."""
    return "AutoModel" in (model.raw_config.get("auto_map") or {})


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


def _is_cached(block: Any) -> bool:
    """Whether a block has an attention proper."""
    return not block.attention.no_op and not is_linear(block.attention)


def _layers(student: ModelFolder) -> list[list[int]]:
    """The student's blocks by folded layer: each attention, then the blocks behind it that have none."""
    layers: list[list[int]] = []
    for index, block in enumerate(student.config.block_configs):
        if _is_cached(block):
            layers.append([])
        layers[-1].append(index)
    return layers


def _listed(student: ModelFolder, layer: list[int]) -> Iterator[tuple[int, str]]:
    """Block and kind of the FFNs of a folded layer, the student's linear attentions among them."""
    for index in layer:
        block = student.config.block_configs[index]
        if is_linear(block.attention):
            yield index, ATTENTION
        if not block.ffn.no_op:
            yield index, FFN


def _entry(student: ModelFolder, layer: list[int]) -> dict[str, Any]:
    blocks = student.config.block_configs
    first, *following = [_ffn(student, *place) for place in _listed(student, layer)] or [NO_FFN]
    entry = {"attention": blocks[layer[0]].attention, "ffn": first}
    return entry | ({"following_ffns": following} if following else {})


def _ffn(student: ModelFolder, index: int, kind: str) -> dict[str, Any]:
    if kind == FFN:
        entry: dict[str, Any] = student.config.block_configs[index].ffn
        return entry
    bias = f"{LAYER.format(index)}{LINEAR_ATTENTION}.bias" in student.checkpoint.specs
    return linear_ffn_entry() | {"bias": bias}


def _names(student: ModelFolder) -> Iterator[tuple[str, str]]:
    """Student tensor name → folded tensor name."""
    places: dict[tuple[int, str], str] = {}
    for number, layer in enumerate(_layers(student)):
        prefix = LAYER.format(number)
        places |= {(index, ATTENTION): prefix for index in layer}
        for position, place in enumerate(_listed(student, layer)):
            places[place] = f"{prefix}following_ffns.{position - 1}." if position else prefix
    for name in student.checkpoint.specs:
        if name.startswith("model.layers."):
            block, rest = name.removeprefix("model.layers.").split(".", 1)
            kind = ATTENTION if rest.startswith((f"{ATTENTION}.", f"{ATTENTION_NORM}.")) else FFN
            yield name, places[int(block), kind] + _renamed(student.config.block_configs[int(block)], kind, rest)
        else:
            yield name, name


def _renamed(block: Any, kind: str, name: str) -> str:
    """A tensor's name within its place: a linear attention goes by the names of an FFN."""
    if kind == ATTENTION and is_linear(block.attention):
        return name.replace(LINEAR_ATTENTION, LINEAR_FFN).replace(ATTENTION_NORM, FFN_NORM)
    return name
