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


def ffn_width(ffn: dict[str, Any], hidden_size: int) -> int:
    """Width of one FFN entry; 0 where there is none. `intermediate_size` holds widths the multiplier cannot express."""
    if ffn["no_op"]:
        return 0
    return width_of(ffn["ffn_mult"], hidden_size) if ffn.get("ffn_mult") else ffn["intermediate_size"]


class BlockConfigs:
    """Adds `block_configs` to a family's configuration, and writes the rotary base in both of its spellings."""

    def __post_init__(self, **kwargs: Any) -> None:
        blocks = kwargs.pop("block_configs", [])
        self.block_configs = [Entry(attention=Entry(b["attention"]), ffn=Entry(b["ffn"])) for b in blocks]
        self.intermediate_size = max(self.ffn_widths, default=self.intermediate_size)
        super().__post_init__(**kwargs)

    @property
    def ffn_widths(self) -> list[int]:
        """FFN width of each block; 0 where there is none."""
        return [ffn_width(block.ffn, self.hidden_size) for block in self.block_configs]

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        rope = data.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            # MLX-LM reads the old spelling only and falls back to 500,000 in silence.
            data["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                data["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        return data


class DeciLMConfig(BlockConfigs, LlamaConfig):
    model_type = "nemotron-nas"


class FusedLlamaConfig(BlockConfigs, LlamaConfig):
    model_type = "ffn-fusion-llama"


class FusedMistralConfig(BlockConfigs, MistralConfig):
    model_type = "ffn-fusion-mistral"


class FusedQwen2Config(BlockConfigs, Qwen2Config):
    model_type = "ffn-fusion-qwen2"


class FusedQwen3Config(BlockConfigs, Qwen3Config):
    model_type = "ffn-fusion-qwen3"


class FusedPhi3Config(BlockConfigs, Phi3Config):
    model_type = "ffn-fusion-phi3"


class FusedGraniteConfig(BlockConfigs, GraniteConfig):
    model_type = "ffn-fusion-granite"


class FusedGemmaConfig(BlockConfigs, GemmaConfig):
    model_type = "ffn-fusion-gemma"


class FusedSmolLM3Config(BlockConfigs, SmolLM3Config):
    model_type = "ffn-fusion-smollm3"


class FusedArceeConfig(BlockConfigs, ArceeConfig):
    model_type = "ffn-fusion-arcee"


class FusedStarcoder2Config(BlockConfigs, Starcoder2Config):
    model_type = "ffn-fusion-starcoder2"
