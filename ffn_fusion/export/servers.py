"""Commands of the engines' own OpenAI-style servers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffn_fusion.errors import UserError
from ffn_fusion.export.engines import ENGINES


@dataclass(frozen=True)
class Serving:
    """What to serve and how. `draft` proposes tokens that `model` verifies; `extra` goes to the engine as it is."""

    model: Path
    host: str
    port: int
    max_model_len: int | None
    tensor_parallel: int
    draft: Path | None
    draft_tokens: int
    extra: tuple[str, ...]


def server_command(engine: str, python: str, serving: Serving) -> list[str]:
    """The command that serves the model in an engine; `UserError` if the engine cannot, or is not there."""
    if serving.tensor_parallel > 1 and engine != "vllm":
        raise UserError(f"--tensor-parallel is for vllm; {engine} has another way, or none")
    command = SERVERS[engine](python, serving)
    return [*command, "--host", serving.host, "--port", str(serving.port), *serving.extra]


def _vllm(python: str, serving: Serving) -> list[str]:
    program = _program(python, "vllm")
    if program is None:
        raise UserError(_missing("vllm", python))
    command = [program, "serve", str(serving.model), "--served-model-name", serving.model.resolve().name]
    # For the configuration class alone, which gives block_configs attributes; vLLM runs its own model code.
    command.append("--trust-remote-code")
    command += ["--tensor-parallel-size", str(serving.tensor_parallel)] if serving.tensor_parallel > 1 else []
    command += ["--max-model-len", str(serving.max_model_len)] if serving.max_model_len else []
    if serving.draft:
        draft = {"method": "draft_model", "model": str(serving.draft), "num_speculative_tokens": serving.draft_tokens}
        command += ["--speculative-config", json.dumps(draft)]
    return command


def _llama_cpp(python: str, serving: Serving) -> list[str]:
    path = _gguf(serving.model)
    program = _program(python, "llama-server")
    if program:
        command = [program, "-m", path]
        command += ["-c", str(serving.max_model_len)] if serving.max_model_len else []
        draft = ["-md", _gguf(serving.draft), "--draft-max", str(serving.draft_tokens)] if serving.draft else []
        return command + draft
    if serving.draft:
        raise UserError("--draft needs llama.cpp's own llama-server on the PATH: the Python server takes no draft")
    ENGINES["llama.cpp"].version(python, untested=True)
    command = [shutil.which(python) or python, "-m", "llama_cpp.server", "--model", path]
    return command + (["--n_ctx", str(serving.max_model_len)] if serving.max_model_len else [])


def _mlx(python: str, serving: Serving) -> list[str]:
    program = _program(python, "mlx_lm.server")
    if program is None:
        raise UserError(_missing("mlx-lm", python))
    command = [program, "--model", str(serving.model)]
    draft = ["--draft-model", str(serving.draft), "--num-draft-tokens", str(serving.draft_tokens)]
    return command + (draft if serving.draft else [])


SERVERS: dict[str, Callable[[str, Serving], list[str]]] = {"vllm": _vllm, "llama.cpp": _llama_cpp, "mlx-lm": _mlx}


def _program(python: str, name: str) -> str | None:
    """An executable beside an interpreter, or on the PATH."""
    return shutil.which(name, path=str(Path(shutil.which(python) or python).parent)) or shutil.which(name)


def _missing(engine: str, python: str) -> str:
    install = ENGINES[engine].install
    return f"there is no {engine} beside {python} or on the PATH; {install}, or name its Python with --engine-python"


def _gguf(model: Path) -> str:
    """The one GGUF file that a path is or holds."""
    if model.suffix == ".gguf" and model.is_file():
        return str(model)
    found = sorted(model.glob("*.gguf")) if model.is_dir() else []
    if len(found) != 1:
        raise UserError(
            f"{model} holds {len(found)} GGUF files, llama.cpp needs one: "
            f"ffn-fusion export {model} --to gguf --out {model}-gguf, then serve that"
        )
    return str(found[0])
