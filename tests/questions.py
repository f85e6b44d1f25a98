"""Small question sets for tests: rows of the Hub's form, in files of every kind that a user or the cache may hold."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Rows = list[dict[str, Any]]

ARC: Rows = [
    {
        "id": f"arc-{number}",
        "question": f"What {verb} in the river of stone number {number}?",
        "choices": {"text": ["a bird", f"an old light {number}", "the quiet one"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number, verb in enumerate(("sings", "falls", "turns", "shines", "sleeps", "waits", "sinks", "ends"))
]
PIQA: Rows = [
    {
        "goal": f"{goal} the door {number}",
        "sol1": f"use the {tool}",
        "sol2": f"use no {tool} at all",
        "label": number % 2,
    }
    for number, (goal, tool) in enumerate((("open", "key"), ("close", "bolt"), ("paint", "brush"), ("oil", "can")))
]
MMLU: Rows = [
    {"question": f"Which bone {number}?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": number % 4}
    for number in range(7)
]


def write_rows(path: Path, rows: Rows) -> Path:
    """Rows as JSON lines, parquet or an arrow stream, by the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        path.write_bytes(arrow(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arrow(rows: Rows) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def without(rows: Rows, column: str) -> Rows:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@cache
def harness_tasks() -> Any:
    """The harness' index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def cut_off(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """No Hub and no packages, and what is kept is kept in `folder`; returns the folder of fetched question sets."""
    import datasets
    from huggingface_hub import constants

    from ffn_fusion.tasks import catalog

    monkeypatch.setenv("FFN_FUSION_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(catalog, "_offline_if_cut_off", lambda: None)
    monkeypatch.setattr(catalog, "TaskManager", harness_tasks)
    return folder / "cache" / "tasks"
