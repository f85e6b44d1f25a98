"""Commands of the engines' own OpenAI-style servers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffn_fusion.errors import UserError
from ffn_fusion.serving.engines import ENGINES


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


def server_command(engine: str, python: str, serving: Serving, untested: bool) -> list[str]:
    """The command that serves the model in an engine; `UserError` if the engine cannot, is not there or is untested."""
    if serving.tensor_parallel > 1 and engine != "vllm":
        raise UserError(f"--tensor-parallel is for vllm; {engine} has another way, or none")
    llama_server = shutil.which("llama-server") if engine == "llama.cpp" else None
    if llama_server:
        command = [llama_server, *_llama_server(serving)]
    else:
        ENGINES[engine].version(python, untested)
        # As modules: an engine's own program starts another Python where the PATH has one first.
        command = [shutil.which(python) or python, "-m", *MODULES[engine](serving)]
    return [*command, "--host", serving.host, "--port", str(serving.port), *serving.extra]


def _vllm(serving: Serving) -> list[str]:
    command = ["vllm.entrypoints.openai.api_server", "--model", str(serving.model)]
    command += ["--served-model-name", serving.model.resolve().name]
    # For the configuration class alone, which gives block_configs attributes; vLLM runs its own model code.
    command.append("--trust-remote-code")
    command += ["--tensor-parallel-size", str(serving.tensor_parallel)] if serving.tensor_parallel > 1 else []
    command += ["--max-model-len", str(serving.max_model_len)] if serving.max_model_len else []
    if serving.draft:
        draft = {"method": "draft_model", "model": str(serving.draft), "num_speculative_tokens": serving.draft_tokens}
        command += ["--speculative-config", json.dumps(draft)]
    return command


def _llama_server(serving: Serving) -> list[str]:
    command = ["-m", _gguf(serving.model)]
    command += ["-c", str(serving.max_model_len)] if serving.max_model_len else []
    draft = ["-md", _gguf(serving.draft), "--draft-max", str(serving.draft_tokens)] if serving.draft else []
    return command + draft


def _llama_cpp(serving: Serving) -> list[str]:
    if serving.draft:
        raise UserError("--draft needs llama.cpp's own llama-server on the PATH: the Python server takes no draft")
    command = ["llama_cpp.server", "--model", _gguf(serving.model)]
    return command + (["--n_ctx", str(serving.max_model_len)] if serving.max_model_len else [])


def _mlx(serving: Serving) -> list[str]:
    command = ["mlx_lm.server", "--model", str(serving.model)]
    draft = ["--draft-model", str(serving.draft), "--num-draft-tokens", str(serving.draft_tokens)]
    return command + (draft if serving.draft else [])


MODULES: dict[str, Callable[[Serving], list[str]]] = {"vllm": _vllm, "llama.cpp": _llama_cpp, "mlx-lm": _mlx}
"""The module that is each engine's server, and its arguments."""


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
