"""Parents and students as models: one class for both, built from a folder, a configuration or single blocks."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.demands import check_demands
from ffn_fusion.core.layout import BLOCK_CONFIGS, is_linear, portable_blocks
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import ARCHS, Arch, arch_of, why_not_decilm
from ffn_fusion.hf.block_configs import attention_entry, ffn_entry, linear_attention_entry, linear_ffn_entry
from ffn_fusion.hf.checkpoint import Checkpoint, Spec, fingerprint, read_json
from ffn_fusion.hf.remote import configuration_ffn_fusion as student_config_file
from ffn_fusion.hf.remote import modeling_ffn_fusion as student_model_file

PLAN_FILE = "plan.json"
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    *("generation_config.json", "LICENSE*"),
)
DECILM_FIELDS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "initializer_range", "tie_word_embeddings", "dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder, parent or student: configuration, family row, and the weights' headers."""

    folder: Path

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def arch(self) -> Arch:
        return arch_of(str(self.raw_config.get("model_type")))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @cached_property
    def config(self) -> Any:
        """The folder's configuration as one of our classes, `block_configs` filled in for an ordinary parent."""
        raw = {name: value for name, value in self.raw_config.items() if name not in ("model_type", "auto_map")}
        config_class = model_class(self.arch).config_class
        if raw.get(BLOCK_CONFIGS) is not None:
            raw = {name: value for name, value in raw.items() if value is not None}
            raw[BLOCK_CONFIGS] = portable_blocks(raw)
            return _build_config(config_class, raw, self.folder)
        config = _build_config(config_class, raw, self.folder)
        group = config.num_attention_heads // config.num_key_value_heads
        entry = {"attention": {"no_op": False, "n_heads_in_group": group}}
        entry["ffn"] = {"no_op": False, "intermediate_size": config.intermediate_size}
        return _build_config(config_class, raw | {"block_configs": [entry] * config.num_hidden_layers}, self.folder)

    @cached_property
    def plan(self) -> Plan:
        """The model's blocks named as source layers of the folder itself: the plan that changes nothing."""
        if any("following_ffns" in entry for entry in self.config.block_configs):
            raise UserError(f"{self.folder} is in folded form, made for engines; use the student it was exported from")
        blocks = [
            Block(
                None if entry.attention.no_op else Attention(layer, linear=is_linear(entry.attention)),
                () if entry.ffn.no_op else (Ffn(layer, linear=is_linear(entry.ffn)),),
            )
            for layer, entry in enumerate(self.config.block_configs)
        ]
        return Plan(tuple(block for block in blocks if block.layers))

    @property
    def made_by(self) -> Plan | None:
        """The plan that made a student of its parent, in the parent's layers; none for a parent."""
        path = self.folder / PLAN_FILE
        return Plan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Rows of the query, key and value projections that one head has."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def shapes(self) -> list[BlockShape]:
        """Sizes of each layer."""
        return [
            BlockShape(_kv_heads(entry, self.config), width, is_linear(entry.attention), is_linear(entry.ffn))
            for entry, width in zip(self.config.block_configs, self.config.ffn_widths, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the model does."""
        return fingerprint([self.folder / "config.json", *self.folder.glob("*.safetensors")])

    def check(self) -> None:
        """Compare every weight's name and shape with the configuration; `UserError` at the first misfit."""
        if self.raw_config.get("quantization_config"):
            raise UserError(f"{self.folder} is quantised; fuse the unquantised checkpoint and quantise the student")
        expected, tied = expected_specs(self.config)
        specs = self.checkpoint.specs
        for name, shape in expected.items():
            if name not in specs:
                raise UserError(f"{self.folder} lacks tensor {name}, which its config.json asks for")
            if specs[name].shape != shape:
                raise UserError(
                    f"tensor {name} in {self.folder} has shape {list(specs[name].shape)}; "
                    f"config.json asks for {list(shape)}"
                )
        extra = sorted(set(specs) - set(expected) - tied)
        if extra:
            raise UserError(f"{self.folder} holds tensor {extra[0]}, which its config.json has no place for")

    def check_plan(self, plan: Plan) -> None:
        """A plan for this parent names only sublayers that it has, and no sizes that it cannot be cut to."""
        check_demands(plan, self.plan, self.shapes, str(self.folder))

    def load(self, dtype: torch.dtype, device_map: str) -> PreTrainedModel:
        """The model in memory, in evaluation mode, its layers editable."""
        self.check()
        with quiet_transformers():
            model = model_class(self.arch).from_pretrained(
                self.folder, config=self.config, dtype=dtype, device_map=device_map
            )
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
                raise UserError(f"tensor {name} in {self.folder} holds NaN or infinite values")
        return model.eval()


for _arch in ARCHS.values():
    # So that tokenizers of students find their configuration without remote code.
    _config_class = getattr(student_model_file, _arch.class_name).config_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)


def _build_config(config_class: Any, raw: dict[str, Any], folder: Path) -> Any:
    try:
        return config_class.from_dict(raw)
    except Exception as error:  # strict dataclasses raise several types of their own
        raise UserError(f"{folder / 'config.json'} is not valid: {' '.join(str(error).split())}") from None


def model_class(arch: Arch) -> Any:
    return getattr(student_model_file, arch.class_name)


def student_arch(parent: ModelFolder) -> Arch:
    """The student's row: the portable nemotron-nas layout wherever the parent fits into it."""
    # The built configuration: a raw one leaves fields to defaults that matter, such as a sliding window.
    fields = parent.config.to_dict() | {"model_type": parent.raw_config["model_type"]}
    return arch_of("nemotron-nas") if why_not_decilm(fields) is None else parent.arch


def student_config(parent: ModelFolder, plan: Plan) -> Any:
    """Configuration of the student that `plan` makes of `parent`, in one of our classes."""
    source, arch = parent.config, student_arch(parent)
    fields = source.to_dict()
    fields.pop("layer_types", None) if arch is not parent.arch else None
    if arch.class_name == "DeciLMForCausalLM":
        fields = {name: fields[name] for name in DECILM_FIELDS if name in fields}
    for name in arch.layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][layer] for layer in _attention_at(plan)]
    widths = source.ffn_widths
    groups = [_heads_in_group(block, source) for block in plan.blocks]
    if plan.kv_heads:
        # What engines go by that know one number only.
        fields["num_key_value_heads"] = source.num_attention_heads // min(filter(None, groups))
    fields["block_configs"] = [
        {
            "attention": linear_attention_entry() if _is_linear(block) else attention_entry(group),
            "ffn": linear_ffn_entry()
            if block.has_linear_ffn
            else ffn_entry(sum(ffn.width or widths[ffn.layer] for ffn in block.ffns), source.hidden_size),
        }
        for block, group in zip(plan.blocks, groups, strict=True)
    ]
    fields["num_hidden_layers"] = len(plan.blocks)
    config_class = model_class(arch).config_class
    fields.pop("model_type", None)
    config = config_class.from_dict(fields)
    config.architectures = [arch.class_name]
    config.auto_map = {
        "AutoConfig": f"configuration_ffn_fusion.{config_class.__name__}",
        "AutoModelForCausalLM": f"modeling_ffn_fusion.{arch.class_name}",
    }
    return config


def _attention_at(plan: Plan) -> list[int]:
    """Source layer whose kind of attention each block is listed under; one without kv cache takes that of the block
    before.

    Its own layer's would not do: caches size a mask by the first block of a kind, and its cache stays empty.
    """
    at = 0
    layers = []
    for block in plan.blocks:
        at = block.attention.layer if block.attention and not block.attention.linear else at
        layers.append(at)
    return layers


def _is_linear(block: Block) -> bool:
    return block.attention is not None and block.attention.linear


def _heads_in_group(block: Block, source: Any) -> int | None:
    if block.attention is None or block.attention.linear:
        return None
    if block.attention.kv_heads is not None:
        return int(source.num_attention_heads) // block.attention.kv_heads
    return _group(source.block_configs[block.attention.layer])


def _kv_heads(entry: Any, config: Any) -> int:
    """Kv heads of a block, 0 without a kv cache."""
    cached = not entry.attention.no_op and not is_linear(entry.attention)
    return int(config.num_attention_heads) // _group(entry) if cached else 0


def _group(entry: Any) -> int:
    """Query heads a kv head."""
    return int(entry.attention.n_heads_in_group)


def skeleton(config: Any) -> PreTrainedModel:
    """The model without memory: every weight on the meta device."""
    with torch.device("meta"):
        return _class_of(config)(config).eval()


def _class_of(config: Any) -> Any:
    return getattr(student_model_file, type(config).__name__.removesuffix("Config") + "ForCausalLM")


def expected_specs(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shape of every weight a checkpoint of this configuration holds, and the names of tied ones, which it may hold."""
    model = skeleton(config)
    tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}, tied


class ResidentSource:
    """The weights of a model in memory, as a source to build blocks from."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: Mapping[str, Tensor] = model.state_dict()
        self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def materialise(
    layer: nn.Module, tensors: Mapping[str, Callable[[], Tensor]], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Give a skeleton's layer its weights, one at a time."""
    for name, make in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(make().to(device, dtype), requires_grad=False))
    return layer


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """A skeleton's buffers are empty and in no checkpoint: make the rotary frequencies and embedding scale again."""
    trunk = model.model
    trunk.rotary_emb = type(trunk.rotary_emb)(config=model.config).to(device)
    if hasattr(trunk.embed_tokens, "scalar_embed_scale"):
        trunk.embed_tokens.embed_scale = torch.tensor(trunk.embed_tokens.scalar_embed_scale, device=device)


def assemble(
    parent: ModelFolder, plan: Plan, tensors: Mapping[str, Callable[[], Tensor]], like: PreTrainedModel
) -> PreTrainedModel:
    """A student in memory, its weights on the device and in the dtype of the model `like`; equal tensors are shared."""
    model = skeleton(student_config(parent, plan))
    materialise(model, tensors, like.device, like.dtype)
    restore_buffers(model, like.device)
    model.tie_weights()
    return model


def copy_tokenizer(model: Path, out: Path) -> None:
    """Tokenizer, chat template and generation settings travel as they are."""
    for pattern in COMPANIONS:
        for path in model.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


def copy_companions(parent: Path, student: Path) -> None:
    """What every student folder holds beside weights and configuration: the tokenizer and our two model files."""
    copy_tokenizer(parent, student)
    for module in (student_config_file, student_model_file):
        path = Path(str(module.__file__))
        shutil.copyfile(path, student / path.name)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Our own progress bar is enough: silence transformers' while it loads."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
