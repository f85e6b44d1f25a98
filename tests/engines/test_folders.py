"""Student folders, as they are and folded, in unmodified engines: every layout, every family."""

import subprocess
from pathlib import Path

import pytest
from conftest import save_tiny_parent
from layouts import LAYOUTS, save_layout
from running import NEWEST, Found, assert_same, needs, python_of, run_probe

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.arch import ARCHS
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student
from ffn_fusion.serving import folded

RUNNING = [name for name in LAYOUTS if name != "first"]
"""Layouts that our plans can have: layer 0 keeps its attention."""
FAMILIES = [name for name in ARCHS if name != "nemotron-nas"]
PLAN = Plan.parse("A0F0 A1F1+2 -F3 A4F4+5")
SIZES = {"hidden_size": 256, "intermediate_size": 512}
Students = dict[str, ModelFolder]


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """A student of each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    return {name: ModelFolder(save_layout(name, folder / name)) for name in RUNNING}


@pytest.fixture(scope="session")
def folded_students(students: Students, tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The folded form of each layout that it has a place for."""
    folder = tmp_path_factory.mktemp("folded")
    return {name: fold(student, folder / name) for name, student in students.items() if not folded.why_not(student)}


@pytest.fixture(scope="session")
def folded_families(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The folded student of a tiny parent of each family, wide enough for the engines' attention kernels."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for family in FAMILIES:
        more = {"head_dim": 64} if family in ("qwen3", "gemma") else {}
        parent = ModelFolder(save_tiny_parent(family, folder / f"{family}-parent", **SIZES, **more))
        student = folder / f"{family}-student"
        student.mkdir()
        write_student(parent, PLAN, student, "folded", {}, {})
        made[family] = fold(ModelFolder(student), folder / family)
    return made


def fold(student: ModelFolder, folder: Path) -> ModelFolder:
    folder.mkdir()
    folded.write(student, folder, "")
    return ModelFolder(folder)


def probed(engine: str, probe: str, models: Students, folder: Path) -> dict[str, Found]:
    # On a GPU vLLM gives memory back late; tiny models need little of it.
    options = {"engine": {"gpu_memory_utilization": 0.08}} if engine == "vllm" else {}
    return run_probe(engine, probe, {name: model.folder for name, model in models.items()}, folder, options=options)


@pytest.fixture(scope="session")
def in_vllm(students: Students, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return probed("vllm", "vllm", students, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def folded_in_vllm(folded_students: Students, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return probed("vllm", "vllm", folded_students, tmp_path_factory.mktemp("vllm-folded"))


@pytest.fixture(scope="session")
def in_mlx(students: Students, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return probed("mlx-lm", "mlx", students, tmp_path_factory.mktemp("mlx"))


@pytest.fixture(scope="session", params=["transformers", NEWEST])
def in_transformers(
    request: pytest.FixtureRequest, students: Students, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    return probed(request.param, "transformers", students, tmp_path_factory.mktemp("transformers"))


@needs("vllm")
@pytest.mark.parametrize("name", RUNNING)
def test_vllm_runs_every_layout_with_its_own_class(name: str, students: Students, in_vllm: dict[str, Found]) -> None:
    assert_same(in_vllm[name], students[name])


@needs("vllm")
def test_vllm_runs_every_folded_layout(students: Students, folded_in_vllm: dict[str, Found]) -> None:
    assert len(folded_in_vllm) == len(RUNNING) - 1  # one has attentions of different kv heads
    for name, found in folded_in_vllm.items():
        assert_same(found, students[name])


@needs("vllm")
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_runs_every_folded_family(family: str, folded_families: Students, tmp_path: Path) -> None:
    found = probed("vllm", "vllm", {family: folded_families[family]}, tmp_path)
    # Multipliers of embeddings and residuals make float32 noise larger than in the layouts.
    assert_same(found[family], folded_families[family], tolerance=5e-4)


@needs("mlx-lm")
@pytest.mark.parametrize("name", RUNNING)
def test_mlx_runs_every_layout(name: str, students: Students, in_mlx: dict[str, Found]) -> None:
    assert_same(in_mlx[name], students[name])


@needs("transformers")
@pytest.mark.parametrize("name", RUNNING)
def test_transformers_runs_every_layout_from_its_folder(
    name: str, students: Students, in_transformers: dict[str, Found]
) -> None:
    assert_same(in_transformers[name], students[name])


@needs("vllm")
def test_vllm_splits_a_student_over_two_ranks(
    students: Students, folded_students: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NCCL's own all-reduce: the others need NVLink multicast, which not every host has.
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself it wants a NUMA node for each rank
    plain = {"disable_custom_all_reduce": True}
    models = {"one kv head": students["fusion"], "folded": folded_students["wideattn"]}
    for name, model in models.items():
        options = {"tensor_parallel": 2, "engine": plain}
        found = run_probe("vllm", "vllm", {name: model.folder}, tmp_path, options=options)
        assert_same(found[name], model)


@needs("transformers-4")
def test_transformers_4_reads_the_configuration(students: Students) -> None:
    """Engines that pin it read `block_configs` by attribute and run model code of their own."""
    student = students["fusion"]
    program = (
        "import sys; from transformers import AutoConfig; "
        "c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "blocks = [(b.attention.no_op, b.attention.n_heads_in_group, b.ffn.ffn_mult) for b in c.block_configs]; "
        "print(blocks, c.rope_theta)"
    )
    command = [python_of("transformers-4"), "-c", program, str(student.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    blocks = [(b.attention.no_op, b.attention.n_heads_in_group, b.ffn.ffn_mult) for b in student.config.block_configs]
    assert done.stdout.strip() == f"{blocks} {student.config.rope_parameters['rope_theta']}"
