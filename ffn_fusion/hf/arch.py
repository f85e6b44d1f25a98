"""What differs between model families, as data: one row a family, and one sentence for each that cannot be fused."""

from dataclasses import dataclass
from typing import Any

from ffn_fusion.errors import UserError

ATTENTION = "self_attn"
ATTENTION_NORM = "input_layernorm"
FFN = "mlp"
FFN_NORM = "post_attention_layernorm"


@dataclass(frozen=True)
class Arch:
    """One pre-norm decoder family. Layers are ``model.layers.N.{self_attn,mlp,input_layernorm,...}`` in all of them.

    `inputs` names the projections that read the normalised stream; `parts` is 2 where one packed tensor holds gate
    and up; `kv` names the projections with keys and values, one name where they are packed behind the queries;
    `norm_offset` is what the norm adds to its stored weight; `layer_lists` names config lists with one entry
    a layer.
    """

    class_name: str
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    parts: int = 1
    kv: tuple[str, ...] = ("k_proj", "v_proj")
    norm_offset: float = 0.0
    layer_lists: tuple[str, ...] = ("layer_types",)


ARCHS: dict[str, Arch] = {
    "nemotron-nas": Arch("DeciLMForCausalLM"),
    "llama": Arch("FusedLlamaForCausalLM"),
    "mistral": Arch("FusedMistralForCausalLM"),
    "qwen2": Arch("FusedQwen2ForCausalLM"),
    "qwen3": Arch("FusedQwen3ForCausalLM"),
    "phi3": Arch("FusedPhi3ForCausalLM", inputs=("gate_up_proj",), parts=2, kv=("qkv_proj",)),
    "granite": Arch("FusedGraniteForCausalLM"),
    "gemma": Arch("FusedGemmaForCausalLM", norm_offset=1.0),
    "smollm3": Arch("FusedSmolLM3ForCausalLM", layer_lists=("layer_types", "no_rope_layers")),
    "arcee": Arch("FusedArceeForCausalLM", inputs=("up_proj",)),
    "starcoder2": Arch("FusedStarcoder2ForCausalLM", inputs=("c_fc",), output="c_proj"),
}

STUDENT_TYPE = "ffn-fusion-{}"
"""`model_type` of a student whose family the nemotron-nas layout cannot express."""

_POST_NORM = "it normalises each FFN's output before adding it, so the sum of members is not one FFN"
_EXPERTS = "its FFNs are routed experts, packed in one tensor; fusing them would lose the routing"
_PARALLEL = "its attention and FFN already share one norm and run side by side"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text"), _POST_NORM),
    **dict.fromkeys(("olmo2", "olmo3", "glm4", "exaone4"), _POST_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("cohere", "cohere2", "phi", "gptj", "falcon"), _PARALLEL),
}


def family(model_type: str) -> str:
    """The parent family of a `model_type`, a student's own included."""
    prefix = STUDENT_TYPE.format("")
    return model_type.removeprefix(prefix)


def arch_of(model_type: str) -> Arch:
    """The row of a family; raises `UserError` with the reason for one that cannot be fused exactly."""
    name = family(model_type)
    if name in REFUSED:
        raise UserError(f"{name} models cannot be fused: {REFUSED[name]}")
    if name not in ARCHS:
        raise UserError(f"model family {name!r} is not in the table; known: {', '.join(sorted(ARCHS))}")
    return ARCHS[name]


def why_not_decilm(config: dict[str, Any]) -> str | None:
    """Why the nemotron-nas layout cannot express a parent, or None if it can (docs/formats.md)."""
    name = family(config["model_type"])
    if name == "nemotron-nas":
        return None
    if name not in ("llama", "mistral"):
        return f"{name} blocks are not Llama blocks"
    if config.get("sliding_window"):
        return "sliding-window attention has no field there"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "biases are not portable there"
    if config.get("hidden_act") != "silu":
        return f"activation {config.get('hidden_act')!r} is not SiLU"
    head_dim = config.get("head_dim")
    if head_dim and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        return "head_dim differs from hidden_size / num_attention_heads"
    return None
