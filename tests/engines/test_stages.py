"""The user's commands in real engines: export --verify, serve, speculate, with the fused builtin model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import needs, python_of

from ffn_fusion.core.engine_records import SpeculateResult
from ffn_fusion.core.plan import Plan
from ffn_fusion.folder import read_record
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.settings import Machine, Text
from ffn_fusion.stages.export import export
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.stages.speculate import speculate

PARENT = "builtin:smollm2-135m"
PLAN = (
    "A0F0 A1F1 A2F2 A3F3 A4F4 A5F5 A6F6 A7F7 A8F8 A9F9 A10F10 A11F11 A12F12 A13F13 A14F14 A15F15 A16F16+17 A18F18 "
    "A19F19+20 A21F21 A22F22 A23F23 A24F24 -F25+26 A27F27 A28F28+29"
)
SMALLER = Plan.parse(PLAN).without_attention([19, 28])
EXPORTS = [
    ("hf", "as the student", "transformers"),
    ("hf", "as the student", "vllm"),
    ("hf", "as the student", "mlx-lm"),
    ("folded", "as the student", "vllm"),
    ("gguf", "f32", "llama.cpp"),
    ("onnx", "f32", "onnxruntime-genai"),
    ("openvino", "f32", "openvino"),
]
"""Target, dtype, engine; transformers is the oldest one supported."""
pytestmark = pytest.mark.skipif("FFN_FUSION_ENGINES" not in os.environ, reason="FFN_FUSION_ENGINES is not set")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _student(Plan.parse(PLAN), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def smaller_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _student(SMALLER, tmp_path_factory.mktemp("smaller"))


def _student(plan: Plan, folder: Path) -> Path:
    fuse(PARENT, plan=str(plan), out=folder / "it", fit_windows=8, text=Text(length=512))
    return folder / "it"


@pytest.mark.parametrize(("target", "dtype", "engine"), EXPORTS)
def test_the_fused_builtin_model_is_exported_and_verified(
    target: str, dtype: str, engine: str, student: Path, tmp_path: Path
) -> None:
    if not python_of(engine):
        pytest.skip(f"there is no {engine} in FFN_FUSION_ENGINES")
    out = tmp_path / "export"
    record = export(
        str(student), to=target, out=out, dtype=dtype, verify=True, engine=engine, engine_python=python_of(engine)
    )
    assert not isinstance(record, str)
    (check,) = record.result.checks
    print(check)
    assert check.max_logit_error < 1e-3
    assert check.divergence is None or check.divergence.lead < 1e-3
    assert check.same_tokenizer
    assert "Paris" in check.answer


@needs("vllm")
def test_vllm_serves_the_folder(student: Path) -> None:
    with _served(student, "vllm", "--max-model-len", "256", "--", "--enforce-eager", "--dtype", "float32") as url:
        assert "Paris" in _ask(url, student.name)


@needs("mlx-lm")
def test_mlx_serves_the_folder(student: Path) -> None:
    with _served(student, "mlx-lm") as url:
        assert "Paris" in _ask(url, "default_model")


@needs("llama.cpp")
def test_llama_cpp_serves_the_export(student: Path, tmp_path: Path) -> None:
    export(str(student), to="gguf", out=tmp_path / "gguf", dtype="q8_0")
    with _served(tmp_path / "gguf", "llama.cpp", "--max-model-len", "256") as url:
        assert "Paris" in _ask(url, "gguf")


@contextmanager
def _served(model: Path, engine: str, *more: str) -> Iterator[str]:
    """The URL of a server that `ffn-fusion serve` started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ffn_fusion", "serve", str(model), "--engine", engine, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--engine-python", python_of(engine), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Or vLLM would take most of the memory for its cache; in GB.
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait(url, process)
        yield url
    finally:
        # The whole group: servers have workers, and some of them outlive a polite signal.
        subprocess.run(["kill", "-s", str(int(signal.SIGKILL)), "--", f"-{process.pid}"], check=False)
        process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert process.poll() is None, "the server ended by itself"
        try:
            _get(f"{url}/models")
            return
        except OSError:
            time.sleep(1)
        except ValueError:  # mlx-lm lists what is in a Hub cache, and nothing where there is none
            return
    raise TimeoutError(url)


def _get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def _ask(url: str, model: str) -> str:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    return str(_get(f"{url}/chat/completions", body)["choices"][0]["message"]["content"])


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_student_drafts_for_its_parent_and_the_output_stays_the_parents(
    engine: Any, student: Path, tmp_path: Path
) -> None:
    _speculate(engine, PARENT, student, tmp_path)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_smaller_student_drafts_for_the_student(
    engine: Any, student: Path, smaller_student: Path, tmp_path: Path
) -> None:
    _speculate(engine, str(student), smaller_student, tmp_path)


def _speculate(engine: Any, target: str, draft: Path, folder: Path) -> None:
    if not python_of(engine):
        pytest.skip(f"there is no {engine} in FFN_FUSION_ENGINES")
    text = Text(text=("builtin:novels",), length=32)
    speculate(
        target,
        str(draft),
        out=folder / "out",
        engine=engine,
        windows=2,
        new_tokens=24,
        engine_python=python_of(engine),
        text=text,
        machine=Machine(device="cpu", dtype="fp32"),
    )
    result = read_record(folder / "out", SpeculateResult).result
    print(result.summary())
    assert result.equal_prompts == result.num_prompts == 2
    assert 0 < result.acceptance < 1
    assert ModelFolder(draft).num_layers < 30


@needs("megatron")
def test_megatron_core_reads_the_layer_file(student: Path, tmp_path: Path) -> None:
    export(str(student), to="megatron", out=tmp_path / "megatron")
    program = (
        "import sys; from megatron.core.transformer.heterogeneous.heterogeneous_config import "
        "HeterogeneousTransformerConfig as C; c = C(num_layers=27, hidden_size=576, num_attention_heads=9, "
        "heterogeneous_layers_config_path=sys.argv[1]); "
        "print([(b.attention.num_query_groups, b.mlp.ffn_hidden_size) for b in c.per_block_parameters])"
    )
    command = [python_of("megatron"), "-c", program, str(tmp_path / "megatron" / "heterogeneous.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    config = ModelFolder(student).config
    kv_heads = [None if b.attention.no_op else 3 for b in config.block_configs]
    assert done.stdout.strip() == str(list(zip(kv_heads, config.ffn_widths, strict=True)))
