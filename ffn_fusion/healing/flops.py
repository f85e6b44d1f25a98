"""Floating-point operations of training, and what the device could do: model FLOPs, recomputation not counted."""

import time

import torch

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.healing.feeds import EMBEDDING
from ffn_fusion.hf.model import ModelFolder

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product is timed."""


def training_flops(parent: ModelFolder | None, student: ModelFolder, stage: TrainingStage) -> float | None:
    """Operations a token: the student forward and twice as much backward, the parent forward. None where only some
    blocks run or train."""
    if stage.trains != "all":
        return None
    return 3 * forward_flops(student, stage.length) + (forward_flops(parent, stage.length) if parent else 0.0)


def forward_flops(model: ModelFolder, length: int) -> float:
    """Two for each weight of a matrix, head included, and 4 · heads · head size for each token that is attended to,
    half the window on average."""
    sizes = {name: torch.Size(spec.shape) for name, spec in model.checkpoint.specs.items()}
    matrices = sum(shape.numel() for name, shape in sizes.items() if len(shape) == 2 and name != EMBEDDING)
    head = sizes[EMBEDDING].numel() if model.config.tie_word_embeddings else 0
    attentions = sum(1 for shape in model.shapes if shape.kv_heads)
    attended = 4 * model.config.num_attention_heads * model.head_dim * length / 2
    return float(2 * (matrices + head) + attentions * attended)


def matrix_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product, the best of three."""
    side = SIDE.get(device.type, 1024)
    a = torch.randn(side, side, device=device).to(dtype)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(8):
            b = a @ a
        float(b[0, 0])
        best = max(best, 8 * 2 * side**3 / (time.perf_counter() - start))
    return best
