"""Continuations scored together must score as each one alone in one plain pass, for a fraction of the work."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE
from hypothesis import given
from hypothesis import strategies as st
from reference import one_line
from torch import nn
from transformers import PreTrainedModel

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student
from ffn_fusion.tasks.continuations import score_continuations

Pair = tuple[tuple[int, ...], tuple[int, ...]]
FAMILIES = ("llama", "qwen2", "smollm3", "granite", "gemma", "starcoder2")
STUDENTS = {"llama": "A0F0 -F1+2 A3F3 A4F4+5", "qwen2": "A0F0 A1F1+2 -F3 A4F4+5", "smollm3": "A0F0 -F1 A2F2+3 -F4 A5F5"}
LONG, ROOM = 256, 10_000


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, VOCAB_SIZE), k=count))


SHARED, NEAR, OTHER = tokens(40, 0), tokens(36, 1), tokens(31, 2)
PAIRS: list[Pair] = [
    *((SHARED, tokens(length, length)) for length in (1, 2, 5, 9)),
    (SHARED, tokens(5, 5)[:3]),
    *((NEAR, (token,)) for token in (10, 11, 12)),
    *((NEAR, tokens(3, 20 + n)) for n in range(3)),
    (OTHER, tokens(4, 30)),
    (OTHER, (*tokens(4, 30)[:3], 9)),
    (OTHER, tokens(4, 30)),
    *((tokens(length, 40 + length), tokens(2, length)) for length in (1, 2, 7, 20)),
]


@torch.no_grad()
def alone(model: nn.Module, context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[float, bool]:
    """Log-softmax of one full pass over what fits of context and continuation."""
    ids = torch.tensor([*context, *continuation][-(max_length + 1) :])
    targets = ids[-len(continuation) :]
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, -len(continuation) :].float()
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(chosen.double().sum()), bool((logits.argmax(-1) == targets).all())


@torch.no_grad()
def scored(
    model: PreTrainedModel, pairs: Sequence[Pair], max_length: int = LONG, budget: int = ROOM
) -> list[tuple[float, bool]]:
    found = list(score_continuations(model, pairs, max_length, budget))
    assert sorted(place for place, _ in found) == list(range(len(pairs))), "each pair once"
    return [answer for _, answer in sorted(found)]


def assert_as_alone(
    model: PreTrainedModel, pairs: Sequence[Pair], max_length: int = LONG, budget: int = ROOM
) -> list[bool]:
    found = scored(model, pairs, max_length, budget)
    wanted = [alone(model, *pair, max_length) for pair in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    return [greedy for _, greedy in found]


@contextmanager
def passes(model: nn.Module) -> Iterator[list[tuple[int, int, int]]]:
    """For each pass: its rows, the tokens of a row, and the positions that logits were made for."""
    seen: list[tuple[int, int, int]] = []

    def note(_: nn.Module, __: Any, options: dict[str, Any], output: Any) -> None:
        seen.append((*options["input_ids"].shape, output.logits.shape[1]))

    hook = model.register_forward_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.fixture(scope="module")
def load(tiny_parent: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    loaded: dict[str, PreTrainedModel] = {}

    def load(family: str) -> PreTrainedModel:
        if family not in loaded:
            loaded[family] = ModelFolder(tiny_parent(family)).load(torch.float32, "cpu")
        return loaded[family]

    return load


@pytest.mark.parametrize("budget", [1, 150, ROOM])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_scores_in_any_company_as_it_does_alone(
    family: str, budget: int, load: Callable[[str], PreTrainedModel]
) -> None:
    assert_as_alone(load(family), PAIRS, budget=budget)


@pytest.mark.parametrize("family", STUDENTS)
def test_blocks_without_attention_do_not_disturb_the_shared_contexts(
    family: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    write_student(ModelFolder(tiny_parent(family)), Plan.parse(STUDENTS[family]), tmp_path, "folded", {}, {})
    assert_as_alone(ModelFolder(tmp_path).load(torch.float32, "cpu"), PAIRS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_greedy_decoding_would_write_is_flagged(family: str, load: Callable[[str], PreTrainedModel]) -> None:
    model = load(family)
    pairs: list[Pair] = []
    for context in (SHARED, OTHER):
        written: tuple[int, ...] = ()
        for _ in range(4):
            with torch.no_grad():
                written += (int(model(input_ids=torch.tensor([context + written])).logits[0, -1].argmax()),)
        changed = (written[0], 4 + (written[1] == 4), *written[2:])
        pairs += [(context, continuation) for continuation in (written, written[:1], changed, (changed[1],))]
    assert assert_as_alone(model, pairs) == [True, True, False, False] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@given(data=st.data())
def test_any_set_of_pairs_scores_as_each_alone(
    family: str, data: st.DataObject, load: Callable[[str], PreTrainedModel]
) -> None:
    token = st.integers(4, 9)
    contexts = data.draw(st.lists(st.lists(token, min_size=1, max_size=30).map(tuple), min_size=1, max_size=3))
    pair = st.tuples(st.sampled_from(contexts), st.lists(token, min_size=1, max_size=6).map(tuple))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=8))
    max_length, budget = data.draw(st.sampled_from([6, 20, LONG])), data.draw(st.sampled_from([1, 60, ROOM]))
    assert_as_alone(load(family), pairs, max_length, budget)


def test_a_context_that_is_too_long_loses_its_beginning(load: Callable[[str], PreTrainedModel]) -> None:
    model, long = load("llama"), tokens(50, 3)
    pairs: list[Pair] = [(long, tokens(length, length)) for length in (1, 4, 16)]
    with passes(model) as seen:
        assert_as_alone(model, pairs, max_length=16, budget=1)
    assert [width for _, width, _ in seen[:3]] == [16] * 3, "the last token of a continuation is not fed"


@pytest.mark.parametrize("continuation", [(), tokens(17, 0)])
def test_an_answer_without_tokens_or_with_too_many_is_refused(
    continuation: tuple[int, ...], load: Callable[[str], PreTrainedModel]
) -> None:
    one_line(lambda: scored(load("llama"), [(SHARED, continuation), (SHARED, (9,))], max_length=16), "16")


def test_a_shared_context_runs_once(load: Callable[[str], PreTrainedModel]) -> None:
    model = load("llama")
    with passes(model) as seen:
        scored(model, [(SHARED, tokens(3, seed)) for seed in range(4)])
    assert seen == [(1, 39, 1), (4, 3, 3)]


def test_a_context_shorter_than_what_follows_is_repeated_in_one_pass(load: Callable[[str], PreTrainedModel]) -> None:
    model = load("llama")
    with passes(model) as seen:
        scored(model, [(SHARED[:6], tokens(9, seed)) for seed in range(2)])
    assert seen == [(2, 14, 9)]


def test_options_of_one_token_are_read_off_one_row(load: Callable[[str], PreTrainedModel]) -> None:
    model = load("llama")
    with passes(model) as seen:
        scored(model, [(SHARED, (token,)) for token in (5, 6, 7, 8)])
    assert seen == [(1, 40, 1)]


def test_logits_are_made_only_where_they_are_read(load: Callable[[str], PreTrainedModel]) -> None:
    model = load("llama")
    with passes(model) as seen:
        scored(model, [(SHARED, tokens(2, 0))])
        scored(model, [(SHARED, tokens(2, 0)), (NEAR, tokens(3, 1))])
    assert seen == [(1, 41, 2), (2, 41, 3 + 3)], "the second row is three tokens shorter"


def test_contexts_of_unlike_length_run_apart_longest_first(load: Callable[[str], PreTrainedModel]) -> None:
    model = load("llama")
    pairs = [(context, tokens(3, seed)) for context in (tokens(15, 9), SHARED, NEAR) for seed in range(4)]
    with passes(model) as seen:
        scored(model, pairs)
    assert seen == [(2, 39, 1), (8, 3, 3), (1, 14, 1), (4, 3, 3)]


def test_a_batch_of_several_contexts_stays_within_the_budget(load: Callable[[str], PreTrainedModel]) -> None:
    model, budget = load("llama"), 150
    with passes(model) as seen:
        scored(model, [(tokens(20, seed), tokens(4, seed)) for seed in range(20)], budget=budget)
    assert [rows * width <= budget for rows, width, _ in seen] == [True] * len(seen)
    assert len(seen) == 4, "and fills it"


def test_log_probabilities_of_a_bfloat16_model_are_summed_in_float32(tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.bfloat16, "cpu")
    pair = (SHARED, tokens(9, 9))
    (found, _), *_ = scored(model, [pair])
    assert found == pytest.approx(alone(model, *pair, LONG)[0], abs=1e-4)
