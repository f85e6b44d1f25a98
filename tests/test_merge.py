"""The average of students, against the average of what their files hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import STUDENT_PLAN
from reference import one_line
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ffn_fusion import cli
from ffn_fusion.folder import RECORD
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.settings import Fusion, Machine, Text
from ffn_fusion.stages.evaluate import evaluate
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.stages.merge import merge

Tiny = Callable[[str], Path]
WEIGHTS = "model.safetensors"


def changed(student: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A copy that went its own way."""
    shutil.copytree(student, folder)
    (folder / RECORD).unlink()
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def ways(tiny_student: Tiny, tmp_path: Path) -> list[str]:
    return [str(changed(tiny_student("llama"), tmp_path / name, seed)) for seed, name in enumerate(("a", "b", "c"))]


def test_the_average_is_that_of_each_tensor(ways: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = merge(*ways, weight=(1.0, 2.0, 5.0), out=out).result
    parts, found = [load_file(Path(way) / WEIGHTS) for way in ways], load_file(out / WEIGHTS)
    wanted = {name: (parts[0][name] + 2 * parts[1][name] + 5 * parts[2][name]) / 8 for name in parts[0]}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    assert [each.share for each in result.students] == [1 / 8, 2 / 8, 5 / 8]
    norm = sum(float(t.square().sum()) for t in wanted.values()) ** 0.5
    for part, each in zip(parts, result.students, strict=True):
        far = sum(float((part[name] - tensor).square().sum()) for name, tensor in wanted.items()) ** 0.5
        assert each.distance == pytest.approx(far / norm, rel=1e-4)
    assert result.plan == STUDENT_PLAN
    assert f"62.5% {ways[2]}" in result.summary()
    assert f"62.5% {ways[2]}" in (out / "README.md").read_text()


def test_it_is_a_student_like_the_first(tiny_parent: Tiny, tiny_student: Tiny, ways: list[str], tmp_path: Path) -> None:
    half = str(changed(tiny_student("llama"), tmp_path / "half", 7, torch.bfloat16))
    out = tmp_path / "merged"
    assert cli._status(["merge", ways[0], half, "--out", str(out)]) == 0
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.float32}
    assert (out / "plan.json").read_text() == (tiny_student("llama") / "plan.json").read_text()
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    machine = Machine(device="cpu", dtype="fp32")
    scores = evaluate(str(tiny_parent("llama")), str(out), windows=2, machine=machine, out=tmp_path / "e").result.scores
    assert scores[1].kl is not None


def test_every_text_behind_any_of_them_is_behind_it(tiny_parent: Tiny, tmp_path: Path) -> None:
    students, texts = [], []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.txt"
        path.write_text(f"The river {name} falls and the old bird sings. " * 1500)
        text = Text(text=(str(path),), length=24)
        machine = Machine(device="cpu", dtype="fp32")
        student = tmp_path / name
        fuse(str(tiny_parent("llama")), plan=STUDENT_PLAN, out=student, fit_windows=2, text=text, machine=machine)
        students.append(str(student))
        texts.append(str(path))
    merge(*students, out=tmp_path / "merged")
    assert texts_behind(ModelFolder(tmp_path / "merged")) == texts


def test_what_has_no_average_is_refused(ways: list[str], tiny_parent: Tiny, tiny_student: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    one_line(lambda: merge(ways[0], out=out), "two students")
    one_line(lambda: merge(*ways, weight=(1.0, 2.0), out=out), "--weight", "2 times", "3 students")
    other = tmp_path / "other"
    fuse(str(tiny_parent("llama")), plan="A0F0 A1F1+2 A3F3 A4 A5F5", out=other, fusion=Fusion(calibrate="none"))
    one_line(lambda: merge(ways[0], str(other), out=out), "different plans")
    one_line(lambda: merge(ways[0], str(tiny_parent("llama")), out=out), "different plans")
    config = json.loads((Path(ways[1]) / "config.json").read_text())
    (Path(ways[1]) / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1, "transformers_version": "0"}))
    one_line(lambda: merge(ways[0], ways[1], out=out), "differ in rms_norm_eps")
    tensors = load_file(Path(ways[2]) / WEIGHTS)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, Path(ways[2]) / WEIGHTS, metadata={"format": "pt"})
    one_line(lambda: merge(ways[0], ways[2], out=out), "model.norm.weight", "NaN")
    assert not out.exists()
