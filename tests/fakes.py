"""Stand-ins for engines: executables that are found but not meant to be run for what they compute."""

import json
from collections.abc import Mapping
from pathlib import Path


def executable(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def python_with(folder: Path, distributions: Mapping[str, str], script: str = "exit 0") -> str:
    """A Python that says it has these distributions, and runs a shell script in place of every probe."""
    found = json.dumps([[None, None], *distributions.items()])
    return str(executable(folder / "python", f"if [ \"$1\" = -c ]; then echo '{found}'; exit 0; fi\n{script}"))
