"""Chat and preference files: what is learnt of a record, what is refused, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from ffn_fusion.errors import UserError
from ffn_fusion.healing.examples import IGNORED, Answer, digest, read_examples, split

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CHAT = [USER, SAID, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., list[Path]]:
    def to_file(*rows: Any) -> list[Path]:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [path]

    return to_file


def whole(tokenizer: PreTrainedTokenizerFast, answer: Answer) -> str:
    return tokenizer.decode(answer.ids)


def learnt(tokenizer: PreTrainedTokenizerFast, answer: Answer) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(answer.ids, answer.labels, strict=True))
    return tokenizer.decode([label for label in answer.labels if label != IGNORED])


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]
) -> None:
    ((example,),) = (read_examples(write({"messages": CHAT, "id": 7}), "sft", tokenizer),)
    (answer,) = example.answers
    assert whole(tokenizer, answer) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt(tokenizer, answer) == "yes</s>no</s>"
    assert answer.num_learnt == 7


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "hi ", "completion": "yes"}, "hi yes</s>"),
        ({"prompt": [USER], "completion": [SAID]}, "<s>user: hi</s><s>assistant: yes</s>"),
        ({"prompt": "hi ", "completion": "yes</s>"}, "hi yes</s>"),
    ],
)
def test_a_completion_is_learnt_with_its_end(
    row: dict[str, Any], text: str, tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]
) -> None:
    ((example,),) = (read_examples(write(row), "sft", tokenizer),)
    assert whole(tokenizer, example.answers[0]) == text
    assert learnt(tokenizer, example.answers[0]) == "yes</s>"


NO = {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi ", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [SAID], "rejected": [NO]},
        {"chosen": [USER, SAID], "rejected": [USER, NO]},
    ],
)
def test_pairs_share_their_prompt_and_differ_behind_it(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]
) -> None:
    ((example,),) = (read_examples(write(row), "dpo", tokenizer),)
    chosen, rejected = example.answers
    assert learnt(tokenizer, chosen) == "yes</s>"
    assert learnt(tokenizer, rejected) == "no</s>"
    start = chosen.labels.count(IGNORED)
    assert chosen.ids[:start] == rejected.ids[:start]
    assert rejected.labels.count(IGNORED) == start


def test_a_pair_begins_where_either_answer_leaves_the_prompt(write: Callable[..., list[Path]]) -> None:
    """`b` merges with the first letter of one answer, whose prompt is a token shorter."""
    table = {"ab": [1, 2], "abc": [1, 3], "abd": [1, 2, 4]}

    class Merging:
        eos_token_id, chat_template = 9, None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": table[text]}

    row = {"prompt": "ab", "chosen": "c", "rejected": "d"}
    ((example,),) = (read_examples(write(row), "dpo", Merging()),)  # type: ignore[arg-type]
    chosen, rejected = example.answers
    assert (chosen.labels, rejected.labels) == ([IGNORED, 3, 9], [IGNORED, 2, 4, 9])


def test_parquet_files_hold_the_same_records(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]], tmp_path: Path
) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "records.parquet")
    assert read_examples([tmp_path / "records.parquet"], "sft", tokenizer) == read_examples(
        write(*rows), "sft", tokenizer
    )


@pytest.mark.parametrize(
    ("method", "row", "said"),
    [
        ("sft", {"text": "hi"}, r"line 1 has text; --method sft needs messages, or prompt and completion"),
        ("dpo", {"messages": CHAT}, r"has messages; --method dpo needs prompt, chosen and rejected"),
        ("sft", {"prompt": "hi", "completion": None}, "has prompt, completion; --method sft needs"),
        ("sft", {"messages": "hi"}, "messages is text"),
        ("sft", {"messages": []}, "neither text nor a list"),
        ("sft", {"messages": [{"role": "user", "content": 3}]}, "lacks a role or a content"),
        ("sft", {"messages": [USER]}, "no answer of an assistant"),
        ("sft", {"messages": [SAID, USER]}, "no answer of an assistant"),
        ("sft", {"prompt": "hi", "completion": [SAID]}, "all texts, or all lists of messages"),
        ("dpo", {"chosen": "hi yes", "rejected": "hi no"}, "without prompt, chosen and rejected are lists"),
        ("dpo", {"chosen": [USER, SAID], "rejected": [USER]}, "none of them empty"),
        ("sft", {"messages": [{"role": "bad", "content": "hi"}, SAID]}, "the chat template refuses it: no such role"),
    ],
)
def test_what_is_no_record_is_refused_by_file_and_line(
    method: Any,
    row: dict[str, Any],
    said: str,
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., list[Path]],
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        read_examples(write(row), method, tokenizer)
    assert "records.jsonl line 1" in str(raised.value)


def test_files_without_records_are_refused(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no records"):
        read_examples(write(), "sft", tokenizer)
    with pytest.raises(UserError, match="is no file"):
        read_examples([tmp_path / "none.jsonl"], "sft", tokenizer)


def test_messages_need_a_chat_template(write: Callable[..., list[Path]]) -> None:
    with pytest.raises(UserError, match="no chat template"):
        read_examples(write({"messages": CHAT}), "sft", tiny_tokenizer())


def test_a_template_that_rewrites_history_is_refused(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]
) -> None:
    """Qwen3's gives the last answer an empty thought, and takes it away once another answer follows."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'</s>'", "('!' if loop.last else '') + '</s>'")
    assert read_examples(write({"messages": CHAT[:2]}), "sft", tokenizer)
    with pytest.raises(UserError, match="rewrites an answer"):
        read_examples(write({"messages": CHAT}), "sft", tokenizer)


def test_no_prompt_is_on_both_sides(tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]) -> None:
    rows = [{"prompt": f"{number % 10}", "completion": f"{number}"} for number in range(30)]
    examples = read_examples(write(*rows), "sft", tokenizer)
    trained, held_out = split(examples, 0.3, 0)
    assert (len(trained), len(held_out)) == (21, 9)
    assert not {example.prompt for example in trained} & {example.prompt for example in held_out}
    assert split(examples, 0.3, 0) == (trained, held_out)
    assert split(examples, 0.3, 1) != (trained, held_out)
    assert digest(trained) == digest(list(trained))
    assert digest(trained) != digest(trained[::-1])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_too_few_prompts_on_a_side_are_refused(
    share: float, tokenizer: PreTrainedTokenizerFast, write: Callable[..., list[Path]]
) -> None:
    rows = [{"prompt": f"{number}", "completion": "yes"} for number in range(20)]
    with pytest.raises(UserError, match="at least 2 must be held out and 1 trained on"):
        split(read_examples(write(*rows), "sft", tokenizer), share, 0)
