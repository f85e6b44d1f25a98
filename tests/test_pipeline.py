"""The whole command line on a tiny model: the main job, its folders, its refusals, and being killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_parent, tiny_tokenizer
from test_cost import values
from texts import write_text
from transformers import AutoModelForCausalLM

from ffn_fusion import cli
from ffn_fusion.core.block_records import BldResult
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import AnalyzeResult, EvalResult, FuseResult
from ffn_fusion.core.search_records import SearchResult
from ffn_fusion.folder import read_record
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.speed import timing

SMALL = ["--length", "32", "--windows", "4", "--batch-size", "2"]
PLAN = "A0F0 A1F1+2 -F3 A4F4 A5F5"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder, "calibration", 0, documents=200), write_text(folder, "held-out", 1, documents=200)


@pytest.fixture(scope="session")
def finished(
    tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The main job, run once."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--remove-attention", 2, "--text", texts[0], "--eval-text", texts[1], "--eval-windows", 4]
    assert call("run", tiny_parent("llama"), "--out", out, *options, "--fit-windows", 16, *SMALL) == 0
    return out


def test_the_main_job_leaves_a_student_records_and_a_page(finished: Path, tiny_parent: Callable[[str], Path]) -> None:
    found = read_record(finished / "search", SearchResult).result
    plan = Plan.parse(found.plan)
    assert len(plan.attention_layers) == 4
    assert Plan.from_json((finished / "student" / "plan.json").read_text()) == plan
    assert (finished / "report.html").stat().st_size > 10_000
    scores = read_record(finished / "eval", EvalResult).result.scores
    assert [Path(score.model).name for score in scores[1:]] == ["attention-removed", "fused-not-calibrated", "student"]
    assert scores[0].kl is None
    assert all(score.kl.mean > 0 for score in scores[1:] if score.kl)
    assert not list(finished.rglob("state")), "resumable state is gone when a stage is done"
    parent = ModelFolder(tiny_parent("llama"))
    assert read_record(finished / "student", FuseResult).result.parent == str(parent.folder)


def test_the_main_job_builds_a_plan_with_sizes(
    tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The step that is not calibrated has the same channels as the student, and so the same input projections."""
    plan, out = "A0F0 A1/1F1:64+2 -F3:40 A4/1F4 A5F5", tmp_path / "run"
    options = ["--plan", plan, "--text", texts[0], "--eval-text", texts[1], "--eval-windows", 2]
    assert call("run", tiny_parent("llama"), "--out", out, *options, "--fit-windows", 8, *SMALL) == 0
    assert read_record(out / "search", SearchResult).result.plan == plan
    results = [read_record(out / name, FuseResult).result for name in ("student", "steps/fused-not-calibrated")]
    assert [cut.width for cut in results[0].cuts] == [64, 40]
    assert results[0].cuts == results[1].cuts
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        a, b = (ModelFolder(out / name).checkpoint for name in ("student", "steps/fused-not-calibrated"))
        assert torch.equal(a.read(name), b.read(name))


def test_a_finished_run_is_not_done_again(
    finished: Path, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("record.json")}
    options = ["--remove-attention", 2, "--text", texts[0], "--eval-text", texts[1], "--eval-windows", 4]
    assert call("run", tiny_parent("llama"), "--out", finished, *options, "--fit-windows", 16, *SMALL) == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("record.json")}


def test_the_measured_kl_of_the_search_is_that_of_the_student_it_describes(
    finished: Path, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A plan without calibration, built in memory by the search and on disk by fuse, must score alike."""
    plan = read_record(finished / "search", SearchResult).result.plan
    parent = tiny_parent("llama")
    common = ["--text", texts[0], "--calibrate", "none"]
    options = ["--analysis", finished / "analysis", "--plan", plan, "--fit-windows", 4]
    assert call("search", parent, "--out", tmp_path / "search", *options, *common, *SMALL) == 0
    measured = read_record(tmp_path / "search", SearchResult).result.kl.mean
    assert call("fuse", parent, "--plan", plan, "--out", tmp_path / "student", *common) == 0
    from ffn_fusion.core.losses import kl_to, reference
    from ffn_fusion.hf.text import read_windows
    from ffn_fusion.settings import Text

    text = Text(text=(str(texts[0]),), length=32)
    ids = read_windows(text, tiny_tokenizer(), 4, "measure").ids
    teacher = ModelFolder(parent).load(torch.float32, "cpu")
    student = ModelFolder(tmp_path / "student").load(torch.float32, "cpu")
    with torch.no_grad():
        ref = reference(teacher(input_ids=ids).logits.flatten(0, 1))
        kl = kl_to(ref, student(input_ids=ids).logits.flatten(0, 1)).mean()
    assert measured == pytest.approx(float(kl), rel=1e-4)


def test_the_dependency_matrix_is_upper_triangular_and_agrees_with_removing_a_block_by_hand(
    finished: Path, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path]
) -> None:
    from ffn_fusion.hf.probe import record
    from ffn_fusion.hf.text import read_windows
    from ffn_fusion.settings import Text

    found = read_record(finished / "analysis", AnalyzeResult).result
    matrix = torch.tensor(found.block_dependency)
    assert torch.equal(matrix, matrix.triu(1))
    ids = read_windows(Text(text=(str(texts[0]),), length=32), tiny_tokenizer(), 4, "measure").ids
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    clean = record(model, ids)
    layers = model.model.layers
    hook = layers[2].register_forward_hook(lambda _, args, __: args[0])  # the block hands its input on
    dropped = record(model, ids)
    hook.remove()
    cos = torch.nn.functional.cosine_similarity(clean.contribution(4), dropped.contribution(4), dim=-1)
    assert found.block_dependency[2][4] == pytest.approx(float((1 - cos).mean()), abs=1e-4)


def test_a_student_loads_with_its_own_code_in_stock_transformers(finished: Path) -> None:
    """Dynamic and static caches give the same tokens, and saving it again loses nothing."""
    folder = finished / "student"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ours = ModelFolder(folder).load(torch.float32, "cpu")
    ids = torch.randint(4, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    dynamic = model.generate(ids, **options)
    assert torch.equal(dynamic, model.generate(ids, **options, use_cache=False))
    assert torch.equal(dynamic, model.generate(ids, **options, cache_implementation="static"))


def test_config_of_a_student_is_what_engines_read(finished: Path) -> None:
    config = json.loads((finished / "student" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    attention, ffn = config["block_configs"][0]["attention"], config["block_configs"][0]["ffn"]
    assert set(ffn) == {"no_op", "replace_with_linear", "ffn_mult", "sparsify"}
    assert isinstance(ffn["ffn_mult"], float)
    assert set(attention) == {
        *("no_op", "replace_with_linear", "n_heads_in_group", "sparsify", "num_sink_tokens", "unshifted_sink"),
        *("use_prefill_window_in_sink_attention", "window_length"),
    }


def test_a_student_can_be_a_parent_again(finished: Path, tmp_path: Path) -> None:
    student = finished / "student"
    plan = ModelFolder(student).plan
    assert call("fuse", student, "--plan", str(plan), "--out", tmp_path / "again", "--calibrate", "none") == 0
    ids = torch.randint(4, 128, (1, 12))
    with torch.no_grad():
        a, b = (
            ModelFolder(path).load(torch.float32, "cpu")(input_ids=ids).logits for path in (student, tmp_path / "again")
        )
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("plan", "saved"), [(PLAN, "calibration.json"), ("A0/1F0:64 A1F1:40+2 A3F3:90 A5F5", "contributions.safetensors")]
)
def test_a_killed_fuse_continues_and_gives_the_same_student(
    plan: str, saved: str, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ffn_fusion", "fuse", str(tiny_parent("llama")), "--plan", plan]
    command += ["--text", str(texts[0]), "--length", "32", "--fit-windows", "16"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    state = tmp_path / ".killed.partial" / "state" / saved
    process = subprocess.Popen([*command, "--out", tmp_path / "killed"], stderr=subprocess.DEVNULL)
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    done = subprocess.run([*command, "--out", tmp_path / "killed"], check=True, capture_output=True, text=True)
    assert "taking up" in done.stderr
    names = ("model.safetensors", "plan.json", "config.json")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in names)


def test_ctrl_c_is_one_line_and_status_130(
    tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    # A shell lets what it starts in the background ignore the signal, and so would the child.
    endless = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    endless += "from ffn_fusion import cli; from ffn_fusion.stages import analyze\n"
    endless += "analyze._measure = lambda *_: (print('measuring', flush=True), time.sleep(600)); cli.main()"
    command = [sys.executable, "-c", endless, "analyze", tiny_parent("llama"), "--out", tmp_path / "a"]
    command += ["--text", texts[0], "--length", "16", "--windows", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(list(map(str, command)), text=True, **pipes)
    assert process.stdout
    assert process.stdout.readline() == "measuring\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ffn_fusion", "plan", "A0F0 A1F1+2", "--layers", "3"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_a_full_disk_is_one_line(
    tiny_parent: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28), "student.safetensors")

    monkeypatch.setattr("ffn_fusion.hf.checkpoint.ShardWriter.write", full)
    out = tmp_path / "s"
    assert call("fuse", tiny_parent("llama"), "--plan", PLAN, "--out", out, "--calibrate", "none") == 2
    assert "disk is full" in capsys.readouterr().err
    assert not out.exists()


def start_options(finished: Path, texts: tuple[Path, Path]) -> list[object]:
    return ["--analysis", finished / "analysis", "--text", texts[0], "--fit-windows", 8, *SMALL]


def test_a_search_can_begin_with_what_another_tool_dropped(
    finished: Path, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    dropped = tmp_path / "config.json"
    dropped.write_text(json.dumps({"drop_attn_list": [3, 4], "drop_mlp_list": [1], "num_hidden_layers": 6}))
    out, parent = tmp_path / "search", tiny_parent("llama")
    options = [*start_options(finished, texts), "--start", dropped, "--fusion-slack", 1e9]
    assert call("search", parent, "--out", out, *options) == 0
    record = read_record(out, SearchResult)
    assert record.inputs["start"] == "A0F0 A1 A2F2 -F3 -F4 A5F5"
    result = record.result
    assert result.plan == "A0F0 A1 A2F2+3+4 A5F5", "with no limit all that may be fused is fused"
    assert [step.action for step in result.steps[:2]] == ["begin with the plan given", "calibrate, nothing fused"]
    assert result.unfused_kl == result.steps[0].kl
    assert result.unfused_kl.mean > 0
    # A limit that nothing fused can keep leaves the plan as it began.
    strict = [*start_options(finished, texts), "--start", dropped, "--max-kl", 0]
    assert call("search", parent, "--out", tmp_path / "strict", *strict) == 0
    assert read_record(tmp_path / "strict", SearchResult).result.plan == record.inputs["start"]


def test_a_search_that_began_elsewhere_is_another_one(
    finished: Path,
    tiny_parent: Callable[[str], Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*start_options(finished, texts), "--out", tmp_path / "search", "--trials", 1]
    assert call("search", tiny_parent("llama"), *options, "--start", "A0F0 A1F1 -F2+3 A4F4 A5F5") == 0
    begun = read_record(tmp_path / "search", SearchResult).inputs["start"]
    assert begun == "A0F0 A1F1 -F2 -F3 A4F4 A5F5", "groups are taken apart and found anew"
    capsys.readouterr()
    assert call("search", tiny_parent("llama"), *options, "--start", "A0F0 A1F1 A2F2 -F3 A4F4 A5F5") == 2
    assert "other start" in capsys.readouterr().err
    assert "start" not in read_record(finished / "search", SearchResult).inputs, "earlier results stay valid"


def test_the_main_job_can_begin_with_another_tools_plan(
    finished: Path, tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    slices = "slices: [{sources: [{model: x, layer_range: [0, 3]}]}, {sources: [{model: x, layer_range: [4, 6]}]}]"
    (tmp_path / "merge.yaml").write_text(f"{slices}\nmerge_method: passthrough\n")
    options = ["--start", tmp_path / "merge.yaml", "--text", texts[0], "--eval-text", texts[1], "--eval-windows", 2]
    out = tmp_path / "run"
    assert call("run", tiny_parent("llama"), "--out", out, *options, "--fit-windows", 8, "--no-steps", *SMALL) == 0
    assert str(Plan.from_json((out / "student" / "plan.json").read_text())) == "A0F0 A1F1 A2F2 A4F4 A5F5"


def test_the_main_job_takes_a_plan_with_an_attention_alone(
    tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, out = "A0F0 A1 A2F2+3 A5F5", tmp_path / "run"
    options = ["--text", texts[0], "--eval-text", texts[1], "--eval-windows", 2, "--fit-windows", 8, "--no-steps"]
    assert call("run", tiny_parent("llama"), "--out", out, "--plan", plan, *options, *SMALL) == 0
    assert f"<code>{plan}</code>" in (out / "report.html").read_text()


def test_another_tools_plan_can_be_built_in_one_command(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    """The same student from the tool's file, from our plan of it, and from the line it stands for."""
    dropped = tmp_path / "llm-drop"
    dropped.mkdir()
    (dropped / "config.json").write_text(json.dumps({"drop_attn_list": [False, False, True, True, False, False]}))
    assert call("plan", dropped, "--layers", 6, "--out", tmp_path / "plan.json") == 0
    plans = (dropped / "config.json", dropped, tmp_path / "plan.json", "A0F0 A1F1 -F2 -F3 A4F4 A5F5")
    written = []
    for number, plan in enumerate(plans):
        out = tmp_path / str(number)
        assert call("fuse", tiny_parent("llama"), "--plan", plan, "--out", out, "--calibrate", "none") == 0
        written.append([(out / name).read_bytes() for name in ("model.safetensors", "plan.json", "config.json")])
    assert written[1:] == written[:1] * 3


def test_the_plan_verb_says_what_a_plan_holds(
    finished: Path, tiny_parent: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tiny_parent("llama")
    assert call("plan", "A0F0 A1 -F2+3", "--parent", parent) == 0
    shown = capsys.readouterr().out
    counts = ["4 source layers", "3 blocks", "2 attentions", "2 FFNs", "4 sequential sublayers", "fused groups: 2-3"]
    assert shown.splitlines()[0] == "A0F0 A1 -F2+3"
    assert [word for word in counts if word not in shown] == []
    assert call("plan", parent) == 0
    assert capsys.readouterr().out.startswith("A0F0 A1F1 A2F2 A3F3 A4F4 A5F5\n6 source layers, 6 blocks")
    assert call("plan", finished / "student") == 0
    made = Plan.from_json((finished / "student" / "plan.json").read_text())
    assert capsys.readouterr().out.splitlines()[0] == str(made), "its plan, not its own blocks"
    entries = [
        {
            "attention": {"no_op": not kv, "num_key_value_heads": kv or None},
            "ffn": {"no_op": not width, "intermediate_size": width or None},
        }
        for kv, width in ((2, 512), (0, 0), (0, 1024), (4, 256))
    ]
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 128_000, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"block_configs": entries}))
    assert call("plan", tmp_path, "--layers", 5, "--groups", "1-3", "--out", tmp_path / "new" / "p.json") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "A0F0 -F1+2+3 A4F4"
    assert "4 slots, 1 of them padding, 1.1 B parameters, fused FFNs 1,024 wide" in shown
    assert str(Plan.from_json((tmp_path / "new" / "p.json").read_text())) == "A0F0 -F1+2+3 A4F4"
    assert call("plan", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "A0F0 -F2 A3F3"
    assert "widest FFN 1,024" in shown


def test_the_plan_verb_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    out.write_text("mine")
    assert call("plan", "A0F0 -F1", "--out", out) == 2
    assert capsys.readouterr().err == f"ffn-fusion: {out} exists; choose another --out\n"
    assert out.read_text() == "mine"


def test_the_main_job_meets_a_speedup(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and costs are made on the way; the student is what the search took."""
    monkeypatch.setattr(timing, "elapsed_ms", values)
    out, few = tmp_path / "run", ["--widths", 0.5, "--trials", 2, "--fit-windows", 8, "--no-steps"]
    options = ["--speedup", 1.2, "--objective", "nll", "--text", texts[0], "--eval-text", texts[1], "--eval-windows", 2]
    parent = save_tiny_parent("llama", tmp_path / "parent", num_hidden_layers=3)
    assert call("run", parent, "--out", out, *options, *few, *SMALL) == 0
    found = read_record(out / "search", SearchResult).result
    (taken,) = found.front
    assert found.parent_ms
    assert taken.predicted_ms <= found.parent_ms / 1.2 * 1.003
    assert (found.objective, len(found.candidates)) == ("nll", 2)
    assert read_record(out / "student", FuseResult).result.plan == found.plan == taken.plan
    made = read_record(out / "search", SearchResult).inputs
    assert made["scores"] == digest(out / "scores")
    assert made["costs"] == digest(out / "costs")
    assert "Search under a budget" in (out / "report.html").read_text()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()[:16]


REFUSED = [
    (["fuse", "{parent}", "--plan", "A0F0 A0F1", "--out", "{out}"], "twice"),
    (["fuse", "{parent}", "--plan", "A1F0 A2F2", "--out", "{out}"], "layer 0"),
    (["fuse", "{parent}", "--plan", "A0F0 A9F9", "--out", "{out}"], "attention 9"),
    (["fuse", "{parent}", "--plan", "nonsense", "--out", "{out}"], "nonsense"),
    (["fuse", "{parent}", "--plan", "missing.json", "--out", "{out}"], "missing.json"),
    (["fuse", "{parent}", "--plan", PLAN, "--out", "{out}", "--text", "{short}"], "tokens"),
    (["fuse", "{parent}", "--plan", PLAN, "--out", "{parent}", "--calibrate", "none"], "exists"),
    (["fuse", "{parent}", "--plan", PLAN, "--out", "{out}", "--nrom", "last"], "--nrom"),
    (["fuse", "{parent}", "--plan", PLAN, "--out", "{out}", "--norm", "first"], "first"),
    (["fuse", "{empty}", "--plan", PLAN, "--out", "{out}"], "config.json"),
    (["fuse", "{short}.bin", "--plan", PLAN, "--out", "{out}"], "pickle"),
    (["fuse", "builtin:nothing", "--plan", PLAN, "--out", "{out}"], "smollm2-135m"),
    (["run", "{parent}", "--out", "{out}"], "--max-kl"),
    (["run", "{parent}", "--out", "{out}"], "--start"),
    (["run", "{parent}", "--out", "{out}", "--start", PLAN, "--plan", PLAN], "--plan"),
    (["run", "{parent}", "--out", "{out}", "--plan", PLAN, "--heal", "nothing"], "no recipe 'nothing'"),
    (["run", "{parent}", "--out", "{out}", "--plan", PLAN, "--heal", "quick", "--dtype", "fp16"], "float16"),
    (["run", "{parent}", "--out", "{out}", "--plan", PLAN, "--bld-epochs", "1", "--dtype", "fp16"], "float16"),
    (["run", "{parent}", "--out", "{out}", "--start", PLAN, "--remove-attention", "2"], "--remove-attention"),
    (["run", "{parent}", "--out", "{out}", "--start", "A0F0 A9F9"], "attention 9"),
    (["run", "{parent}", "--out", "{out}", "--start", "{short}.yaml"], "short.yaml"),
    (["plan", "A0F0 A9F9", "--parent", "{parent}", "--out", "{out}"], "attention 9"),
    (["plan", PLAN, "--parent", "{parent}", "--layers", "6", "--out", "{out}"], "--layers"),
    (["plan", PLAN, "--layers", "6", "--groups", "1-2", "--out", "{out}"], "block_configs"),
    (["plan", "{parent}", "--groups", "1-2", "--out", "{out}"], "--layers N"),
    (["plan", "{parent}", "--layers", "6", "--groups", "1-2", "--out", "{out}"], "no plan"),
    (["plan", "{short}", "--out", "{out}"], "not JSON"),
    (["plan", "{empty}", "--out", "{out}"], "config.json"),
    (["plan", PLAN, "--out", "{short}/out"], "cannot write"),
    (["run", "{parent}", "--out", "{out}", "--max-kl", "1", "--eval-text", "x", "--text", "x"], "held-out"),
    (["analyze", "{parent}", "--out", "{out}", "--device", "cuda"], "GPU"),
    (["report", "{empty}", "--out", "{out}.html"], "record"),
    (["bench", "--out", "{out}"], "name models to time"),
    (["analyze", "{parent}", "--out", "{out}", "--windows", "0"], "--windows"),
    (["fuse", "{parent}", "--plan", PLAN, "--out", "{out}", "--fit-windows", "1"], "--fit-windows"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    arguments: list[str],
    says: str,
    tiny_parent: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.mkdir()
    short.write_text("too short")
    places = {"parent": tiny_parent("llama"), "out": tmp_path / "out", "empty": empty, "short": short}
    before = {path.name: path.stat().st_mtime_ns for path in tiny_parent("llama").iterdir()}
    capsys.readouterr()  # of making the parent
    assert call(*[argument.format(**places) for argument in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert says.lower() in err.lower()
    assert err.count("\n") == 0, err
    assert not (tmp_path / "out").exists()
    assert before == {path.name: path.stat().st_mtime_ns for path in tiny_parent("llama").iterdir()}


def test_what_a_run_will_cost_counts_what_it_trains(
    tiny_parent: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for training in ([], ["--heal", "quick", "--bld-epochs", 1]):
        command = ["run", tiny_parent("llama"), "--out", tmp_path / "run", "--max-kl", 1, "--dry-run"]
        assert call(*command, *training) == 0
        shown.append(capsys.readouterr().out)
    assert [("heal " in text, "--bld-epochs" in text) for text in shown] == [(False, False), (True, True)]
    assert ["3 student(s)" in shown[0], "4 student(s)" in shown[1]] == [True, True]
    assert not (tmp_path / "run").exists()


def test_the_main_job_trains_the_blocks_of_its_plan_before_it_fits_them(
    tiny_parent: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    held_out = ["--eval-text", texts[1], "--eval-windows", 2]
    options = ["--text", texts[0], "--fit-windows", 8, "--no-steps", *held_out, *SMALL]
    training = ["--bld-epochs", 1, "--bld-windows", 16, "--plan", PLAN]
    assert call("run", tiny_parent("llama"), "--out", tmp_path / "run", *training, *options) == 0
    units = read_record(tmp_path / "run" / "library", BldResult).result.units
    assert [unit.block for unit in units] == ["A1F1+2", "-F3"]
    assert read_record(tmp_path / "run" / "student", FuseResult).inputs["library"]
