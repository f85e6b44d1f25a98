"""Gradients through the shipped model code: those of the stock models, of finite differences, and of checkpointing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.settings import Fusion
from ffn_fusion.stages.fuse import fuse

PLAN = "A0F0 A1LF1+2 -F3L A4 A5/1F5"
"""A linear attention, a fused FFN, a linear FFN without attention, an attention alone, fewer kv heads."""

EMPTY = ("model.layers.3.mlp", "model.layers.3.post_attention_layernorm")
"""The FFN of zeros behind the attention that stands alone."""


def loss_of(model: PreTrainedModel) -> Tensor:
    """A loss with padding on the left, as batches have it."""
    ids = torch.randint(4, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_unchanged_model_has_the_gradients_of_the_stock_one(family: str, tiny_parent: Callable[[str], Path]) -> None:
    folder = tiny_parent(family)
    ours = ModelFolder(folder).load(torch.float32, "cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(loss_of(ours), loss_of(stock))
    wanted, found = gradients(stock), gradients(ours)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "phi3", "granite", "starcoder2"])
def test_every_weight_of_a_student_has_the_gradient_of_finite_differences(
    family: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    fuse(str(tiny_parent(family)), plan=PLAN, out=tmp_path / "student", fusion=Fusion(calibrate="none"))
    model = ModelFolder(tmp_path / "student").load(torch.float32, "cpu")
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Along the gradient itself, as far as the loss changes by about 0.002: norms round to float32.
            length = found[name].norm()
            if length == 0:
                assert name.startswith(EMPTY)
                continue
            step = 0.002 * found[name] / length**2
            weight += step
            ahead = loss_of(model)
            weight -= 2 * step
            slope = (ahead - loss_of(model)) / (2 * step.norm())
            weight += step
            torch.testing.assert_close(slope, length, rtol=0.02, atol=0, msg=f"{name}: {slope}, {length}")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.17 has no other name
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_checkpointed_activations_give_the_same_gradients(family: str, tiny_student: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_student(family)).load(torch.float32, "cpu").train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model)
    assert len(calls) == 2 * len(model.model.layers)  # once forward, once more for the backward pass
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
