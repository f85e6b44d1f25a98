"""Target `hf`: the student folder as it is. Its nemotron-nas layout is what most engines read."""

import shutil
from pathlib import Path

from ffn_fusion.core.layout import is_linear
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving.folded import is_folded
from ffn_fusion.serving.mlx import is_mlx

IGNORANT = ("vllm", "SGLang")
"""Engines that build an ordinary sublayer where `block_configs` ask for a linear layer."""


def why_not(_student: ModelFolder) -> str | None:
    """Nothing: every student is such a folder."""
    return None


def why_not_in(student: ModelFolder, engine: str) -> str | None:
    """Why an engine that reads student folders would not compute this one, or None."""
    if not any(is_linear(block.attention) or is_linear(block.ffn) for block in student.config.block_configs):
        return None
    if engine in IGNORANT and not is_folded(student):
        return f"{engine} ignores replace_with_linear in silence; export it --to folded, which vllm runs"
    if engine == "mlx-lm" and not is_mlx(student):
        return "mlx-lm has names of its own for linear layers; export it --to mlx"
    if engine == "ExLlamaV3":
        return "ExLlamaV3 refuses replace_with_linear"
    return None


def check_engine(model: ModelFolder, engine: str) -> None:
    """`UserError` if an engine would load a model folder, a student or what `export` made of one, as something else."""
    obstacle = why_not_in(model, engine)
    if obstacle:
        raise UserError(f"{model.folder} cannot be run as it is: {obstacle}")


def write(student: ModelFolder, folder: Path, _dtype: str) -> None:
    """Copy the student, its record of how it was made excepted; the copy is checked like any model."""
    for path in student.folder.iterdir():
        if path.is_file() and path.name != RECORD and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    ModelFolder(folder).check()
