"""Writes a model folder with other weights: what training leaves is stored as the model was that it began with."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder, copy_tokenizer

CARD = "README.md"
COPIED = ("config.json", PLAN_FILE, "*.py")


def write_tuned(
    source: ModelFolder, weights: Iterable[tuple[str, Tensor]], out: Path, fields: Mapping[str, Any] | None = None
) -> None:
    """Write a folder like `source` with these weights, each rounded once to the dtype that it has there.

    `weights` are read one at a time. `fields` of the configuration differ from the source's.
    """
    specs = source.checkpoint.specs
    with ShardWriter(out, specs) as writer:
        for name, tensor in weights:
            writer.write(name, tensor.to(specs[name].dtype))
    copy_tokenizer(source.folder, out)
    for path in (path for pattern in COPIED for path in source.folder.glob(pattern)):
        shutil.copyfile(path, out / path.name)
    if fields:
        config = json.dumps({**source.raw_config, **fields}, indent=2) + "\n"
        (out / "config.json").write_text(config, encoding="utf-8")
    ModelFolder(out).check()


def write_card(source: ModelFolder, told: str, out: Path) -> None:
    """The source's model card with one more section."""
    card = source.folder / CARD
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {source.folder.name}\n"
    (out / CARD).write_text(f"{before}\n{told}", encoding="utf-8")
