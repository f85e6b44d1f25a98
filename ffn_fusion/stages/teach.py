"""`teach`: parent and text → the parent's answers on it, for distillation; the parent can write the text itself."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.teach_records import Answers, Form, TeachResult, Written
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.healing.author import Author, Document
from ffn_fusion.healing.teacher_cache import SHARD, ask, tokenizer_key, windows_per_shard, write_shard
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Above0, Machine, NotNegative, Positive, Text
from ffn_fusion.settings_training import Writing
from ffn_fusion.speed.sampling import Sampler, has_room

TEXT = "text.jsonl"
PROGRESS = "written.json"
SHARDS = "shards.json"
MOST_FRUITLESS = 8
"""Batches without a new document after which the parent has nothing more to say."""


def teach(
    model: str,
    *,
    out: Path,
    windows: NotNegative | None = None,
    top_k: Positive = 64,
    temperature: Above0 = 1.0,
    hidden: tuple[NotNegative, ...] = (),
    writing: Writing = Writing(),  # noqa: B008, frozen
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[TeachResult]:
    """Store what a parent answers at each token of a text: its likeliest next tokens and the mass of all others.

    With --write the parent writes the text itself (text.jsonl, which every --text reads), for users who have none.

    Parameters
    ----------
    model
        Parent: folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        New folder: shards of answers.
    windows
        Windows of text to answer; without it, as many as the text fills. 0 with --write: text alone.
    top_k
        Likeliest tokens to store at each token, with their log-probabilities.
    temperature
        The parent's logits are divided by this first.
    hidden
        Also store the stream after this layer, as bf16; give the option again for each.
    """
    parent = resolve_model(model)
    _check(parent, windows, top_k, hidden, writing)
    tokenizer = load_tokenizer(parent, machine.trust_remote_code)
    dtype = pick_dtype(machine, parent.checkpoint)
    config = parent.config
    form = Form(text.length, config.vocab_size, config.hidden_size, top_k, temperature, sorted(set(hidden)))
    given = None if writing.write else read_windows(text, tokenizer, windows, "fit")
    opened = replace(text, length=writing.opening) if writing.opening else None
    openings = read_windows(opened, tokenizer, None, "fit") if opened else None
    inputs = {
        "model": parent.fingerprint,
        "text": [read.sample.digest for read in (given, openings) if read],
        "writing": asdict(writing) if writing.write else None,
        "seed": text.seed,
        "windows": windows,
        "form": asdict(form),
        "batch_size": machine.batch_size,
        "dtype": str(dtype),
    }

    def work(folder: StageFolder) -> tuple[TeachResult, Environment]:
        loaded = parent.load(dtype, device_map(machine))
        written, found = None, given
        if writing.write:
            sampler = Sampler(loaded) if has_room(loaded) else None
            begin = openings.ids if openings else None
            author = Author(loaded, tokenizer, writing, text.seed, machine.batch_size, sampler, begin)
            written = replace(_write(author, folder, writing.write), openings=openings.sample if openings else None)
            found = None if windows == 0 else _read_written(folder, text, tokenizer)
        answers = _answer(loaded, folder, found.ids, form, machine.batch_size) if found else None
        keys, sample = (parent.checkpoint.key, tokenizer_key(tokenizer)), found.sample if found else None
        return TeachResult(model, *keys, written, sample, answers), where(machine, dtype)

    return run_stage("teach", out, inputs, TeachResult, work)


def _check(parent: ModelFolder, windows: int | None, top_k: int, hidden: tuple[int, ...], writing: Writing) -> None:
    """Refuse what cannot be had before any work is done."""
    if top_k >= parent.config.vocab_size:
        raise UserError(f"--top-k {top_k}: the vocabulary has {parent.config.vocab_size:,} tokens; take fewer")
    if max(hidden, default=0) >= parent.num_layers:
        raise UserError(f"--hidden {max(hidden)}: the parent's layers are 0 to {parent.num_layers - 1}")
    if windows == 0 and not writing.write:
        raise UserError("--windows 0 stores nothing; it goes with --write")
    if writing.opening and not writing.write:
        raise UserError(f"--opening {writing.opening} is of documents that the parent writes; it goes with --write")
    if windows and writing.write:
        raise UserError(f"--windows {windows}: of the text that --write makes, all is answered (or none: --windows 0)")


@dataclass(frozen=True)
class _Progress:
    """How far the writing has come: batches, what they left in text.jsonl, and how many of the last left nothing."""

    batches: int = 0
    documents: int = 0
    num_bytes: int = 0
    fruitless: int = 0
    rejected: dict[str, int] = field(default_factory=dict)


def _write(author: Author, folder: StageFolder, count: int) -> Written:
    """Let the parent write `count` documents into text.jsonl, from where a killed run was."""
    done = _Progress(**(folder.load(PROGRESS) or {}))
    path = folder.path / TEXT
    with path.open("ab") as file:
        file.truncate(done.num_bytes)
    known = {Document(row["text"], row.get("messages", [])).key for row in _rows(path)}
    for _ in track(_new(author, folder, known, count), "teach: documents written", count - done.documents):
        pass
    done = _Progress(**folder.load(PROGRESS))
    return Written(done.documents, author.chat, done.rejected)


def _new(author: Author, folder: StageFolder, known: set[str], count: int) -> Iterator[Document]:
    """Documents that were not there before, each batch on disk before it is given out."""
    done = _Progress(**(folder.load(PROGRESS) or {}))
    while done.documents < count:
        documents, rejected = author.batch(done.batches, known)
        documents = documents[: count - done.documents]
        known |= {document.key for document in documents}
        lines = "".join(json.dumps(_row(document), ensure_ascii=False) + "\n" for document in documents).encode()
        with (folder.path / TEXT).open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        done = _Progress(
            done.batches + 1,
            done.documents + len(documents),
            done.num_bytes + len(lines),
            0 if documents else done.fruitless + 1,
            dict(Counter(done.rejected) + rejected),
        )
        folder.save(PROGRESS, asdict(done))
        if done.fruitless >= MOST_FRUITLESS:
            raise UserError(
                f"the parent wrote {done.documents} documents and then nothing new in {MOST_FRUITLESS} batches "
                f"({', '.join(sorted(rejected))}); ask for fewer with --write, or raise --prompt-temperature"
            )
        yield from documents


def _row(document: Document) -> dict[str, Any]:
    return document._asdict() if document.messages else {"text": document.text}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def _read_written(folder: StageFolder, text: Text, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """All windows of what the parent wrote."""
    own = replace(text, text=(str(folder.path / TEXT),), column="text")
    windows = read_windows(own, tokenizer, None, "fit")
    return replace(windows, sample=replace(windows.sample, sources=[TEXT]))


def _answer(model: PreTrainedModel, folder: StageFolder, ids: Tensor, form: Form, batch_size: int) -> Answers:
    """Write the shards that are not there yet."""
    done: list[tuple[int, float]] = folder.load(SHARDS) or []
    size = windows_per_shard(form, batch_size)
    left = ids[len(done) * size :].split(batch_size)
    asked = track((ask(model, batch, form) for batch in left), "teach: batches answered", len(left))
    while len(done) * size < len(ids):
        path = folder.path / SHARD.format(len(done))
        done.append(write_shard(path, islice(asked, size // batch_size), form))
        folder.save(SHARDS, done)
    num_bytes, mass = map(sum, zip(*done, strict=True))
    return Answers(form, len(ids), size, num_bytes, mass / ids.numel())
