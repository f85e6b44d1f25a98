"""Configuration of a fused model: its parent family's, with one entry of `block_configs` for each block.

Shipped with every student of ffn-fusion and loaded by transformers, vLLM, SGLang and TensorRT-LLM through `auto_map`.
The layout of `block_configs` is that of nemotron-nas.
"""

from typing import Any

from transformers import (
    ArceeConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

WIDTH_MULTIPLE = 256


class Entry(dict):
    """A JSON object whose keys are attributes too: vLLM and SGLang read ``block.attention.no_op``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """FFN width of a nemotron-nas multiplier: two thirds of it times the hidden size, up to a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def is_linear(entry: dict[str, Any]) -> bool:
    """Whether a linear layer stands in the place of an attention or FFN."""
    return bool(entry.get("replace_with_linear")) and not entry["no_op"]


def ffn_width(ffn: dict[str, Any], hidden_size: int) -> int:
    """Width of one FFN entry; 0 where there is none, or a linear layer in its place.

    `intermediate_size` holds widths the multiplier cannot express.
    """
    if ffn["no_op"] or is_linear(ffn):
        return 0
    return width_of(ffn["ffn_mult"], hidden_size) if ffn.get("ffn_mult") else ffn["intermediate_size"]


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        return Entry({name: _entries(item) for name, item in value.items()})
    return [_entries(item) for item in value] if isinstance(value, list) else value


class BlockConfigs:
    """Adds `block_configs` to a family's configuration, and writes the rotary base in both of its spellings.

    In the folded form a block's entry lists the FFNs after its first one as `following_ffns`.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_configs = kwargs.pop("block_configs", [])
        self.intermediate_size = max(self.ffn_widths, default=0) or self.intermediate_size
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # On assignment, because transformers 4, which engines may pin, calls no __post_init__.
        super().__setattr__(name, _entries(value) if name == "block_configs" else value)

    @property
    def ffn_widths(self) -> list[int]:
        """FFN width of each block, all its FFNs together; 0 where there is none that has channels."""
        return [sum(self.widths_of(block)) for block in self.block_configs]

    def widths_of(self, block: Entry) -> list[int]:
        """Width of each FFN of a block."""
        return [ffn_width(ffn, self.hidden_size) for ffn in (block.ffn, *block.get("following_ffns", ()))]

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        rope = data.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            # MLX-LM reads the old spelling only and falls back to 500,000 in silence.
            data["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                data["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        return data


def sharded(plan: dict[str, str]) -> dict[str, str]:
    """A family's tensor-parallel plan, for the following FFNs of the folded form too."""
    return plan | {name.replace(".mlp.", ".following_ffns.*.mlp."): style for name, style in plan.items()}


class DeciLMConfig(BlockConfigs, LlamaConfig):
    model_type = "nemotron-nas"


class FusedLlamaConfig(BlockConfigs, LlamaConfig):
    model_type = "ffn-fusion-llama"
    base_model_tp_plan = sharded(LlamaConfig.base_model_tp_plan)


class FusedMistralConfig(BlockConfigs, MistralConfig):
    model_type = "ffn-fusion-mistral"
    base_model_tp_plan = sharded(MistralConfig.base_model_tp_plan)


class FusedQwen2Config(BlockConfigs, Qwen2Config):
    model_type = "ffn-fusion-qwen2"
    base_model_tp_plan = sharded(Qwen2Config.base_model_tp_plan)


class FusedQwen3Config(BlockConfigs, Qwen3Config):
    model_type = "ffn-fusion-qwen3"
    base_model_tp_plan = sharded(Qwen3Config.base_model_tp_plan)


class FusedPhi3Config(BlockConfigs, Phi3Config):
    model_type = "ffn-fusion-phi3"
    base_model_tp_plan = sharded(Phi3Config.base_model_tp_plan)


class FusedGraniteConfig(BlockConfigs, GraniteConfig):
    model_type = "ffn-fusion-granite"
    base_model_tp_plan = sharded(GraniteConfig.base_model_tp_plan)


class FusedGemmaConfig(BlockConfigs, GemmaConfig):
    model_type = "ffn-fusion-gemma"
    base_model_tp_plan = sharded(GemmaConfig.base_model_tp_plan)


class FusedSmolLM3Config(BlockConfigs, SmolLM3Config):
    model_type = "ffn-fusion-smollm3"
    base_model_tp_plan = sharded(SmolLM3Config.base_model_tp_plan)


class FusedArceeConfig(BlockConfigs, ArceeConfig):
    model_type = "ffn-fusion-arcee"
    base_model_tp_plan = sharded(ArceeConfig.base_model_tp_plan)


class FusedStarcoder2Config(BlockConfigs, Starcoder2Config):
    model_type = "ffn-fusion-starcoder2"
    base_model_tp_plan = sharded(Starcoder2Config.base_model_tp_plan)
