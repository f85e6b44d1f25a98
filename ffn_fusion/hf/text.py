"""Text → windows of token ids: local files, folders, JSONL, parquet, Hub datasets and builtins, reproducibly."""

import hashlib
import json
import random
from collections.abc import Iterator
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
MEASURE_SHARE = 8
PLAIN = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Windows:
    """`ids` [num_windows, length], the bytes of text in each window after its first token, and their record."""

    ids: Tensor
    num_bytes: tuple[int, ...]
    sample: Sample


def read_windows(text: Text, tokenizer: PreTrainedTokenizerBase, count: int, part: Part = "all") -> Windows:
    """`count` windows of `text.length` tokens, the same ones for the same arguments.

    Documents are cut into pieces, shuffled by `text.seed` and tokenised until there are enough. `part` divides the
    pieces in two: "measure" (one in eight) for scores, "fit" for calibration, so that the two never share text.
    """
    pieces = [piece for spec in text.text for document in documents(spec, text.column) for piece in _pieces(document)]
    if part != "all":
        pieces = [p for i, p in enumerate(pieces) if (i % MEASURE_SHARE == 0) == (part == "measure")]
    random.Random(text.seed).shuffle(pieces)
    ids: list[int] = []
    needed = text.length * count
    for piece in pieces:
        ids += tokenizer(piece, verbose=False)["input_ids"]
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        share = "" if part == "all" else f" in its '{part}' part"
        raise UserError(
            f"text {', '.join(text.text)} has only {len(ids):,} tokens{share}; "
            f"{count} windows of {text.length} need {needed:,}"
        )
    tensor = torch.tensor(ids[:needed]).view(count, text.length)
    num_bytes = tuple(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in tensor)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
    return Windows(tensor, num_bytes, Sample(list(text.text), part, count, text.length, text.seed, digest))


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while start < len(document):
        end = start + PIECE_CHARS
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
            end = end if end > start else start + PIECE_CHARS
        if document[start:end].strip():
            yield document[start:end].rstrip() + "\n\n"
        start = end


def documents(spec: str, column: str) -> list[str]:
    """The documents behind one of `Text`'s names; `UserError` if they cannot be had."""
    if spec.startswith(PREFIX):
        return builtin_text(spec.removeprefix(PREFIX))
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (*PLAIN, ".jsonl", ".parquet", ".arrow"))
        if not files:
            raise UserError(f"{path} holds no text files ({', '.join(PLAIN)}, .jsonl, .parquet, .arrow)")
        return [document for file in files for document in _file(file, column)]
    if path.is_file():
        return _file(path, column)
    return _hub_dataset(spec, column)


def _file(path: Path, column: str) -> list[str]:
    if path.suffix == ".jsonl":
        return [_field(row, column, path) for _, row in json_lines(path)]
    if path.suffix in (".parquet", ".arrow"):
        return _table_column(path, column)
    return [_read(path)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _no_column(where: str, column: str, found: list[str]) -> UserError:
    return UserError(f"{where} has no text column {column!r}; it has {', '.join(found)} (choose with --column)")


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


def _field(row: dict[str, Any], column: str, path: Path) -> str:
    if not isinstance(row.get(column), str):
        raise _no_column(str(path), column, list(row))
    return str(row[column])


def read_table(path: Path) -> "Table":
    """A parquet or Arrow file; `UserError` if it is none."""
    import pyarrow as pa  # heavy, and only tables need it
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _table_column(path: Path, column: str) -> list[str]:
    table = read_table(path)
    if column not in table.column_names:
        raise _no_column(str(path), column, table.column_names)
    return [text for text in table[column].to_pylist() if isinstance(text, str)]


def _hub_dataset(spec: str, column: str) -> list[str]:
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
    if column not in data.column_names:
        raise _no_column(spec, column, data.column_names)
    return [text for text in data[column] if isinstance(text, str)]
