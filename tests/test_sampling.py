"""Documents drawn by the decode step, against the `generate` of the model class: the same tokens from one generator."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.speed import sampling
from ffn_fusion.speed.sampling import Sampler, has_room

Parents = Callable[[str], Path]
BEGINNINGS = torch.tensor([[5, 3, 8], [5, 3, 8], [9, 1, 4], [2, 2, 7]])
TOKENS = 20


def load(folder: Path) -> PreTrainedModel:
    return ModelFolder(folder).load(torch.float32, "cpu")


@torch.no_grad()
def generated(model: PreTrainedModel, temperature: float, top_p: float) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = model.generate(
        input_ids=BEGINNINGS,
        attention_mask=torch.ones_like(BEGINNINGS),
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[:, BEGINNINGS.shape[1] :]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_that_generate_draws(family: str, top_p: float, tiny_parent: Parents) -> None:
    model = load(tiny_parent(family))
    expected = generated(model, 0.7, top_p)
    torch.manual_seed(0)
    assert torch.equal(Sampler(model)(BEGINNINGS, TOKENS, 0.7, top_p), expected)
    assert len(expected.unique()) > 5, "not one token over and over"


def test_there_is_room_where_the_weights_fit_once_more(tiny_parent: Parents, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_parent("llama"))
    size = sum(weight.nbytes for weight in model.parameters())
    for free, room in ((size + 1, True), (size - 1, False)):
        monkeypatch.setattr(sampling, "available", lambda _, free=free: float(free))
        assert has_room(model) is room
    model.model.layers[0].to("meta")
    assert not has_room(model), "a model on two devices has no decode step"
