"""Tiny random parents, one a family, saved by the stock transformers classes and shared by the whole session.

Weights are large and norm gains far from one: in a default-initialised model the FFNs add next to nothing and every
gain is one, so that a wrong fusion would pass unseen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ffn_fusion.settings import Fusion
from ffn_fusion.stages.fuse import fuse

settings.register_profile("tiny", max_examples=25, deadline=None)
settings.load_profile("tiny")
# More threads only wait for each other on tensors this small.
torch.set_num_threads(1)

NUM_LAYERS = 6
VOCAB_SIZE = 128
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2,
    },
    "qwen3": {"head_dim": 16},
    "phi3": {"original_max_position_embeddings": 256},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.5},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1], "use_sliding_window": True, "sliding_window": 5},
    "arcee": {},
    "starcoder2": {"use_bias": True},
}
"""What each family's configuration adds to or changes in `BASE`."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
"""For tests that chat; the tiny tokenizer has none of its own."""
STUDENT_PLAN = "A0F0 A1F1+2 -F3 A4 A5F5"
"""A fused FFN with an attention, an FFN without, an attention without FFN."""


def save_tiny_parent(model_type: str, folder: Path, **changes: Any) -> Path:
    """Make one tiny parent and a tokenizer in `folder`; `changes` override fields of its configuration."""
    config = AutoConfig.for_model(model_type, **(BASE | FAMILIES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(len(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith(".weight"):
                centre = 0.0 if model_type == "gemma" else 1.0
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + centre - 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token for each printable ASCII character, tab and newline.

    Byte-level, because AutoTokenizer builds some families' own class (Qwen2) around the saved vocabulary.
    """
    # Byte-level spelling moves the blank, tab and newline out of the way by 256.
    alphabet = [*map(chr, range(33, 127)), *(chr(256 + code) for code in (9, 10, 32))]
    vocab = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_parent(family)` is the folder of that family's tiny parent; never write into it, copy it first."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny_parent(model_type, tmp_path_factory.mktemp(model_type) / "parent")
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def tiny_student(tiny_parent: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_student(family)` is a folder that `fuse` made of that parent by `STUDENT_PLAN`; copy it to change it."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(f"{model_type}-fused") / "student"
            fusion = Fusion(calibrate="none")
            fuse(str(tiny_parent(model_type)), plan=STUDENT_PLAN, out=made[model_type], fusion=fusion)
        return made[model_type]

    return make
