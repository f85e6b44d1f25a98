"""Recording, resuming and switching off must agree with plain forward passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.probe import SUBLAYERS, record, resume, visiting, without

FAMILIES = ("llama", "granite", "qwen2", "gemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_resumed_from_any_layer_gives_the_same_logits(family: str, tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent(family)).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (2, 24))
    clean = record(model, ids)
    for start in range(6):
        assert torch.equal(resume(model, ids, start, clean.streams[start]), clean.logits)


def test_contributions_add_up_to_the_change_of_the_stream(tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    clean = record(model, torch.randint(4, 128, (2, 24)))
    for layer in range(6):
        change = clean.streams[layer + 1] - clean.streams[layer]
        torch.testing.assert_close(clean.contribution(layer), change, rtol=1e-4, atol=1e-4)


def test_a_removed_sublayer_does_not_run_and_comes_back(tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (1, 16))
    before = record(model, ids).logits
    seen = []
    with without(model, 2, "self_attn"), visiting(model, lambda i, part, _: seen.append((i, part))):
        changed = model(input_ids=ids).logits
    assert (2, "self_attn") not in seen
    assert len(seen) == 6 * len(SUBLAYERS) - 1
    assert not torch.allclose(changed, before)
    assert torch.equal(record(model, ids).logits, before)


def test_skipped_layers_cost_nothing(tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (1, 16))
    clean = record(model, ids)
    seen = []
    with visiting(model, lambda i, part, _: seen.append(i)):
        resume(model, ids, 4, clean.streams[4])
    assert seen == [4, 4, 5, 5]
