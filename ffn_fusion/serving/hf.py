"""Target `hf`: the student folder as it is. Its nemotron-nas layout is what most engines read."""

import shutil
from pathlib import Path

from ffn_fusion.folder import RECORD
from ffn_fusion.hf.model import ModelFolder


def why_not(_student: ModelFolder) -> str | None:
    """Nothing: every student is such a folder."""
    return None


def write(student: ModelFolder, folder: Path, _dtype: str) -> None:
    """Copy the student, its record of how it was made excepted; the copy is checked like any model."""
    for path in student.folder.iterdir():
        if path.is_file() and path.name != RECORD and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    ModelFolder(folder).check()
