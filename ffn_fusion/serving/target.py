"""What an export target is; the table of them is in `targets`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffn_fusion.hf.model import ModelFolder


@dataclass(frozen=True)
class Target:
    """A format that engines load.

    `engines` names those of the engine table that load it, the one to verify with first; `read_by` others that are
    said to. The first of `dtypes` is the default. `why_not(student)` is the reason why a student cannot be expressed,
    or None; `why_not_in(student, engine)` the reason why one of the engines that load the format would not compute this
    one. `write(student, folder, dtype)` writes it into an existing, empty folder.
    """

    name: str
    help: str
    engines: tuple[str, ...]
    read_by: tuple[str, ...]
    dtypes: tuple[str, ...]
    why_not: Callable[[ModelFolder], str | None]
    write: Callable[[ModelFolder, Path, str], None]
    why_not_in: Callable[[ModelFolder, str], str | None] = lambda _student, _engine: None
