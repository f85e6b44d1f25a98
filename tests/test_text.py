"""Windows of text: every kind of file, reproducible, the two parts apart."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from reference import one_line
from texts import sentences, write_text
from tokenizers.processors import TemplateProcessing

from ffn_fusion.cli import app
from ffn_fusion.errors import UserError
from ffn_fusion.hf.text import read_windows
from ffn_fusion.settings import Text


def read(*specs: Path, count: int = 4, column: str = "text", part: str = "all", seed: int = 0) -> list[list[int]]:
    text = Text(text=tuple(map(str, specs)), column=column, length=32, seed=seed)
    return read_windows(text, tiny_tokenizer(), count, part).ids.tolist()  # type: ignore[arg-type]


def test_the_same_arguments_give_the_same_windows_and_another_seed_others(tmp_path: Path) -> None:
    folder = write_text(tmp_path)
    assert read(folder) == read(folder)
    assert read(folder) != read(folder, seed=1)


def test_the_two_parts_share_no_document(tmp_path: Path) -> None:
    folder = write_text(tmp_path, documents=16)
    decode = tiny_tokenizer().decode
    measure = decode([i for row in read(folder, part="measure", count=20) for i in row])
    for path in folder.glob("*.txt"):
        lines = path.read_text().splitlines()
        in_fit = decode([i for row in read(folder, part="fit", count=20) for i in row])
        assert not (lines[3] in measure and lines[3] in in_fit)


def test_jsonl_parquet_and_arrow_give_the_text_of_their_column(tmp_path: Path) -> None:
    rows = [sentences(8, seed) for seed in range(8)]
    (tmp_path / "a.txt").write_text("")
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, row in enumerate(rows):
        (plain / f"{number}.txt").write_text(row)
    # A raw U+2028 is allowed inside a JSON string and is no line end.
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(json.dumps({"body": row}) for row in rows) + "\n\n")
    table = pa.table({"body": rows})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    wanted = read(plain)
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        assert read(tmp_path / name, column="body") == wanted


def test_a_chat_begins_with_one_begin_token(tmp_path: Path) -> None:
    """Where the template writes it and the tokenizer, too, would put it in front."""
    chat = [{"role": "user", "content": sentences(2, 0)}, {"role": "assistant", "content": "so it is"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    text = Text(text=(str(tmp_path / "chats.jsonl"),), length=32)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    wanted = read_windows(text, tokenizer, 1).ids
    assert wanted[0, 0] == tokenizer.bos_token_id
    assert read_windows(replace(text, column="messages"), tokenizer, 1).ids.equal(wanted)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert read_windows(text, tokenizer, 1).ids.equal(wanted)


def test_bytes_are_those_of_the_text_that_each_window_predicts(tmp_path: Path) -> None:
    text = Text(text=(str(write_text(tmp_path)),), length=32)
    windows = read_windows(text, tiny_tokenizer(), 3)
    assert windows.num_bytes == (31, 31, 31)  # one byte a token, the first token is not predicted


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.joinpath("t.txt").write_text("short"), "7 tokens"),
        (lambda p: p.joinpath("t.jsonl").write_text("{bad"), "line 1"),
        (lambda p: p.joinpath("t.jsonl").write_text('{"other": "x"}'), "other"),
        (lambda p: p.joinpath("t.jsonl").write_bytes(b"\xff\xfe"), "UTF-8"),
        (lambda p: p.joinpath("t.txt").write_bytes(b"\xff\xfe\xff"), "UTF-8"),
        (lambda p: p.joinpath("t.parquet").write_bytes(b"no table"), "cannot be read"),
    ],
)
def test_unusable_text_is_one_clear_line(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    one_line(lambda: read(next(tmp_path.iterdir())), says)


def test_a_builtin_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wikipedia"):
        read_windows(Text(text=("builtin:nothing",)), tiny_tokenizer(), 1)


@pytest.mark.parametrize(
    ("command", "source", "length"),
    [
        (["eval", "m", "--seed", "3", "--out", "o"], "builtin:novels", 1024),
        (["fuse", "m", "--plan", "p", "--seed", "3", "--out", "o"], "builtin:wikipedia", 1024),
        (["speculate", "m", "d", "--seed", "3", "--out", "o"], "builtin:novels", 64),
        (["analyze", "m", "--seed", "3", "--out", "o"], "builtin:wikipedia", 512),
    ],
)
def test_one_option_of_the_text_leaves_a_verbs_other_defaults_alone(
    command: list[str], source: str, length: int
) -> None:
    text = app.parse_args(command, exit_on_error=False, print_error=False)[1].arguments["text"]
    assert (text.text, text.length, text.seed) == ((source,), length, 3)
