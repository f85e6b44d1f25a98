"""The forward pass made for speed, against the model class: same logits for every family, plan, call and part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCAB_SIZE
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ffn_fusion.hf.decode import Decoder, DecodeStep
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.sublayers import Cache

Parents = Callable[[str], Path]
TOLERANCE = 1e-5
"""Relative to the largest logit, in float32."""
PAST = 9
families = pytest.mark.parametrize("family", FAMILIES)


def itself(weight: Tensor) -> Tensor:
    return weight.detach()


def load(folder: Path) -> PreTrainedModel:
    return ModelFolder(folder).load(torch.float32, "cpu")


@torch.no_grad()
def decoded(decoder: Decoder, ids: Tensor) -> list[Tensor]:
    """Logits after all tokens but the last, and after the last one, which is decoded behind their cache."""
    past = ids.shape[1] - 1
    prefill = DecodeStep(decoder, ids.shape[0], 0, past)
    prefill.ids.copy_(ids[:, :-1])
    first = prefill.logits()
    step = DecodeStep(decoder, ids.shape[0], past, 1)
    step.ids.copy_(ids[:, -1:])
    for own, made in zip(step.caches, prefill.caches, strict=True):
        _carry(own, made)
    return [first, step.logits()]


def _carry(own: Cache, made: Cache) -> None:
    kept = own.keys.shape[2] - 1
    own.keys[:, :, :kept] = made.keys[:, :, made.keys.shape[2] - kept :]
    own.values[:, :, :kept] = made.values[:, :, made.keys.shape[2] - kept :]


@torch.no_grad()
def expected(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    cache = DynamicCache(config=model.config)
    return [model(input_ids=part, past_key_values=cache).logits[:, -1:] for part in (ids[:, :-1], ids[:, -1:])]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (2, PAST + 1), generator=torch.Generator().manual_seed(7))


@families
def test_logits_are_those_of_the_model_class(family: str, tiny_parent: Parents, ids: Tensor) -> None:
    model = load(tiny_parent(family))
    assert_same(decoded(Decoder(model, itself), ids), expected(model, ids))


@families
def test_students_too(family: str, tiny_student: Parents, ids: Tensor) -> None:
    model = load(tiny_student(family))
    decoder = Decoder(model, itself)
    assert_same(decoded(decoder, ids), expected(model, ids))
