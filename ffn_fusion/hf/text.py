"""Text → windows of token ids: local files, folders, JSONL, parquet, Hub datasets and builtins, reproducibly."""

import hashlib
import json
import random
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.records import Sample
from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import PREFIX, builtin_text
from ffn_fusion.settings import Text

if TYPE_CHECKING:
    from pyarrow import Table

Part = Literal["all", "measure", "fit"]
PIECE_CHARS = 20_000
CHARS_PER_TOKEN = 6
"""At most, about: pieces are no shorter than a window."""
MEASURE_SHARE = 8
PLAIN = (".txt", ".md", ".rst")
INSTEAD = {"text": "messages"}
"""Where a column is asked for that is not there: chats of the usual format need no --column."""


@dataclass(frozen=True)
class Windows:
    """`ids` [num_windows, length], the bytes of text in each window after its first token, and their record."""

    ids: Tensor
    num_bytes: tuple[int, ...]
    sample: Sample


def read_windows(text: Text, tokenizer: PreTrainedTokenizerBase, count: int | None, part: Part = "all") -> Windows:
    """`count` windows of `text.length` tokens, the same ones for the same arguments; all that the text fills if None.

    Documents are cut into pieces, shuffled by `text.seed` and tokenised until there are enough. `part` divides the
    pieces in two: "measure" (one in eight) for scores, "fit" for calibration, so that the two never share text.
    """
    # Four bytes a token, where a list takes 36.
    ids = array("i")
    for piece in shuffled_pieces(text, tokenizer, part):
        if count is not None and len(ids) >= text.length * count:
            break
        ids.extend(tokenizer(piece, verbose=False)["input_ids"])
    if count is None:
        count = max(1, len(ids) // text.length)
    needed = text.length * count
    if len(ids) < needed:
        share = "" if part == "all" else f" in its '{part}' part"
        raise UserError(
            f"text {', '.join(text.text)} has only {len(ids):,} tokens{share}; "
            f"{count} windows of {text.length} need {needed:,}"
        )
    tensor = torch.tensor(ids[:needed], dtype=torch.long).view(count, text.length)
    num_bytes = tuple(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in tensor)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
    return Windows(tensor, num_bytes, Sample(list(text.text), part, count, text.length, text.seed, digest))


def shuffled_pieces(text: Text, tokenizer: PreTrainedTokenizerBase, part: Part = "all") -> list[str]:
    """The documents of a part of the text, cut into pieces, in the order that the seed gives them."""
    size = max(PIECE_CHARS, CHARS_PER_TOKEN * text.length)
    found = (document for spec in text.text for document in documents(spec, text.column, tokenizer))
    pieces = [piece for document in found for piece in _pieces(document, size)]
    if part != "all":
        pieces = [p for i, p in enumerate(pieces) if (i % MEASURE_SHARE == 0) == (part == "measure")]
    random.Random(text.seed).shuffle(pieces)
    return pieces


def _pieces(document: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(document):
        end = start + size
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
            end = end if end > start else start + size
        if document[start:end].strip():
            yield document[start:end].rstrip() + "\n\n"
        start = end


def documents(spec: str, column: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents behind one of `Text`'s names; `UserError` if they cannot be had.

    A column of chats, lists of messages with role and content, is spelled out by the tokenizer's chat template.
    """
    if spec.startswith(PREFIX):
        return builtin_text(spec.removeprefix(PREFIX))
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (*PLAIN, ".jsonl", ".parquet", ".arrow"))
        if not files:
            raise UserError(f"{path} holds no text files ({', '.join(PLAIN)}, .jsonl, .parquet, .arrow)")
        return [document for file in files for document in _file(file, column, tokenizer)]
    if path.is_file():
        return _file(path, column, tokenizer)
    return _texts(_hub_dataset(spec, column), tokenizer)


def _file(path: Path, column: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if path.suffix == ".jsonl":
        return _texts([_field(row, column, path) for _, row in json_lines(path)], tokenizer)
    if path.suffix in (".parquet", ".arrow"):
        return _texts(_table_column(path, column), tokenizer)
    return [_read(path)]


def _texts(values: list[Any], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """What of a column is text. Chats are spelled out, or without a tokenizer joined."""
    return [value if isinstance(value, str) else _chat(value, tokenizer) for value in values if value]


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer and not tokenizer.chat_template:
        raise UserError("the text is of chats, and the tokenizer has no chat template to spell them out with")
    try:
        if tokenizer is None:
            return "\n".join(message["content"] for message in messages)
        return bare(str(tokenizer.apply_chat_template(messages, tokenize=False)), tokenizer)
    except Exception as error:  # templates raise what they like
        raise UserError(f"a chat cannot be spelled out: {' '.join(str(error).split())[:200]}") from None


def bare(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text without the begin token that the tokenizer will put in front of it."""
    begin = tokenizer.bos_token
    adds = bool(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if adds else text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _column(where: str, column: str, found: Collection[str]) -> str:
    for name in (column, INSTEAD.get(column, column)):
        if name in found:
            return name
    raise UserError(f"{where} has no text column {column!r}; it has {', '.join(found)} (choose with --column)")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line of a JSONL file; `UserError` at the first that is none."""
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is no JSON object")
        yield number, row


def _field(row: dict[str, Any], column: str, path: Path) -> Any:
    return row[_column(str(path), column, [name for name, value in row.items() if isinstance(value, (str, list))])]


def read_table(path: Path) -> "Table":
    """A parquet or Arrow file; `UserError` if it is none."""
    import pyarrow as pa  # heavy, and only tables need it
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _table_column(path: Path, column: str) -> list[Any]:
    table = read_table(path)
    found: list[Any] = table[_column(str(path), column, table.column_names)].to_pylist()
    return found


def _hub_dataset(spec: str, column: str) -> list[Any]:
    """``owner/name`` or ``owner/name:split`` through the datasets library (extra `hub`)."""
    try:
        import datasets  # optional and slow to import
    except ImportError:
        raise UserError(
            f"{spec} is no local file or folder; for a Hub dataset install the extra: pip install 'ffn-fusion[hub]'"
        ) from None
    name, _, split = spec.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises many types; all mean that the text cannot be had
        raise UserError(f"Hub dataset {spec} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return list(data[_column(spec, column, data.column_names)])
