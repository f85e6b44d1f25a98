"""`serve`: start an engine's own OpenAI-style server with the right flags; there is no server of ours."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving import folded, hf
from ffn_fusion.serving.parallel import check_tensor_parallel
from ffn_fusion.serving.servers import Serving, server_command
from ffn_fusion.settings import Positive


def serve(
    model: Path,
    *extra: Annotated[str, Parameter(allow_leading_hyphen=True)],
    engine: Literal["vllm", "llama.cpp", "mlx-lm"] = "vllm",
    host: str = "127.0.0.1",
    port: Positive = 8000,
    max_model_len: Positive | None = None,
    tensor_parallel: Positive = 1,
    draft: Path | None = None,
    draft_tokens: Positive = 4,
    engine_python: str = sys.executable,
    untested: bool = False,
    dry_run: bool = False,
) -> None:
    """Start an engine's own OpenAI-style server on a student, and show the command that does it.

    Parameters
    ----------
    model
        Student folder, or what `export` made of it: llama.cpp needs a GGUF.
    extra
        More arguments for the engine, after --.
    engine
        vllm, llama.cpp or mlx-lm.
    host
        Address to listen on.
    port
        Port to listen on.
    max_model_len
        Longest context, in tokens.
    tensor_parallel
        Devices to split the model over (vllm).
    draft
        Smaller model that proposes tokens for this one to verify; greedy output stays this one's.
    draft_tokens
        Tokens proposed at a time.
    engine_python
        Python that has the engine, if it is not this one.
    untested
        Go on with an engine version outside the tested range.
    dry_run
        Show the command only.
    """
    for path in (model, draft):
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if path.is_dir() and not (engine == "llama.cpp" and list(path.glob("*.gguf"))):
            _check(ModelFolder(path), engine, tensor_parallel)
    serving = Serving(model, host, port, max_model_len, tensor_parallel, draft, draft_tokens, extra)
    command = server_command(engine, engine_python, serving, untested)
    print(shlex.join(command), flush=True)
    if not dry_run:
        os.execv(command[0], command)


def _check(model: ModelFolder, engine: str, tensor_parallel: int) -> None:
    """An engine that would load something else, or fail late, is refused here; a quantised student is welcome."""
    check_tensor_parallel(model, tensor_parallel)
    ours = "auto_map" in model.raw_config and model.arch.class_name != "DeciLMForCausalLM"
    if engine == "vllm" and ours and not folded.is_folded(model):
        raise UserError(
            f"vllm has no model code for {model.arch.class_name}: "
            f"ffn-fusion export {model.folder} --to folded --out {model.folder}-folded, then serve that"
        )
    if engine == "mlx-lm" and ours:
        raise UserError(f"mlx-lm has no model code for {model.arch.class_name}; of students it loads nemotron-nas ones")
    hf.check_engine(model, engine)
