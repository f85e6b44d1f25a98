"""The models that `bench` times: folders with weights, or the three steps of a shape without any."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ffn_fusion.core.cost import Cost
from ffn_fusion.core.shapes import Shape, shape_of, steps_of
from ffn_fusion.hf.checkpoint import read_json
from ffn_fusion.hf.model import ModelFolder, copy_companions, expected_specs, student_config
from ffn_fusion.hf.resolve import labels, read_plan


@dataclass(frozen=True)
class Entrant:
    """A model to be timed: its folder holds a configuration alone where the weights shall be random."""

    name: str
    step: str
    plan: str
    folder: ModelFolder


def named(models: Sequence[str], folders: Sequence[ModelFolder]) -> list[Entrant]:
    """A parent and its students, with their weights."""
    steps = ["parent", *["student"] * (len(folders) - 1)]
    rows = zip(labels(models), steps, folders, strict=True)
    return [Entrant(name, step, str(folder.plan), folder) for name, step, folder in rows]


def read_shape(name: str) -> Shape:
    """A named shape, or a config.json as one."""
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return Shape(read_json(path)) if path.is_file() else shape_of(name)


def of_shape(name: str, shape: Shape, plan: str | None, state: Path) -> list[Entrant]:
    """The parent of a shape, its student with nothing fused, and fused, as folders without weights."""
    parent = _folder(state / "parent", shape.config)
    wanted = plan or shape.plan
    steps = steps_of(parent.plan, read_plan(wanted, parent) if wanted else None)
    models = []
    for step, own in steps.items():
        folder = parent
        if step != "parent":
            folder = _folder(state / step, student_config(parent, own).to_dict())
            copy_companions(parent.folder, folder.folder)
        # A path is long, and all steps have the same.
        label = Path(name).name if Path(name).exists() else name
        models.append(Entrant(f"{label}, {step}", step, str(own), folder))
    return models


def _folder(path: Path, config: Mapping[str, Any]) -> ModelFolder:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return ModelFolder(path)


def cost_of(folder: ModelFolder, dtype: torch.dtype) -> Cost:
    """Counts of a model folder, which may hold a configuration alone."""
    sizes = {name: prod(shape) for name, shape in expected_specs(folder.config)[0].items()}
    embedding = 0 if folder.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    return Cost(folder.shapes, sum(sizes.values()), embedding, folder.head_dim, dtype.itemsize)
