"""Writes a model folder with other weights: what training leaves is stored as the model was that it began with."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder, copy_tokenizer

CARD = "README.md"
COPIED = ("config.json", PLAN_FILE, "*.py")


def write_tuned(source: ModelFolder, weights: Mapping[str, Tensor], out: Path, told: str) -> None:
    """Write a folder like `source` with these weights, each rounded once to the dtype that it has there.

    `told` is a section for the end of the model card.
    """
    specs = source.checkpoint.specs
    with ShardWriter(out, specs) as writer:
        for name, spec in specs.items():
            writer.write(name, weights[name].to(spec.dtype))
    copy_tokenizer(source.folder, out)
    for path in (path for pattern in COPIED for path in source.folder.glob(pattern)):
        shutil.copyfile(path, out / path.name)
    card = source.folder / CARD
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {source.folder.name}\n"
    (out / CARD).write_text(f"{before}\n{told}", encoding="utf-8")
    ModelFolder(out).check()
