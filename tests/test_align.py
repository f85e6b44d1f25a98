"""Tuning students through TRL and PEFT: they learn, come back as ordinary folders, and can be killed on the way."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from peft import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ffn_fusion import Fusion, Machine, Plan, Text, Tuning, UserError
from ffn_fusion.core.align_records import Course, scores
from ffn_fusion.core.stats import Estimate
from ffn_fusion.folder import read_record
from ffn_fusion.healing import alignment
from ffn_fusion.healing.answers import log_probability
from ffn_fusion.healing.examples import read_examples, split
from ffn_fusion.healing.tuned import write_tuned
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.stages.align import AlignResult, align
from ffn_fusion.stages.evaluate import evaluate
from ffn_fusion.stages.fuse import fuse

CPU = Machine(device="cpu", dtype="fp32", batch_size=4)
LINEAR_PLAN = "A0F0 A1LF1+2 -F3L A4 A5/1F5"


def tokenized(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tiny_parent: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a fused FFN, an attention alone and linear layers, that can chat."""
    folder = tmp_path_factory.mktemp("align") / "student"
    fuse(str(tiny_parent("llama")), plan=LINEAR_PLAN, out=folder, fusion=Fusion(calibrate="none"))
    return tokenized(folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers follow a rule: twice the letter asked for."""
    rows = [
        {"messages": [{"role": "user", "content": chr(97 + n % 26) * (1 + n // 26)}, answer(chr(97 + n % 26) * 2)]}
        for n in range(40)
    ]
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} or {n + 1}"}],
            "chosen": [answer("yes yes")],
            "rejected": [answer("no, no")],
        }
        for n in range(24)
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(4, 128, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_a_tuned_student_knows_more_and_is_an_ordinary_student(student: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    tuning = Tuning(epochs=4, learning_rate=3e-3)
    result = align(str(student), method="sft", data=(chats,), out=out, hold_out=0.2, tuning=tuning, machine=CPU).result
    (loss,) = result.scores
    assert loss.after.mean < loss.before.mean - 1
    assert loss.verdict == "better"
    assert (result.records.num_trained, result.records.num_held_out, result.num_steps) == (32, 8, 32)
    assert read_record(out, AlignResult).result == result
    assert Plan.from_json((out / "plan.json").read_text()) == Plan.parse(LINEAR_PLAN)
    assert "sft" in result.summary()
    assert "Instruction tuning on 32 records of chats.jsonl" in (out / "README.md").read_text()

    ours = ModelFolder(out).load(torch.float32, "cpu")
    shipped = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(shipped))
    assert not torch.equal(logits(ours), logits(ModelFolder(student).load(torch.float32, "cpu")))
    novels = Text(text=(str(write_text(tmp_path)),), length=32)
    assert texts_behind(ModelFolder(out)) == [str(chats)]
    measured = evaluate(str(student), str(out), out=tmp_path / "eval", windows=2, text=novels, machine=CPU)
    assert measured.result.scores[1].kl.mean > 0

    before = (out / "record.json").stat().st_mtime_ns
    align(str(student), method="sft", data=(chats,), out=out, hold_out=0.2, tuning=tuning, machine=CPU)
    assert (out / "record.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made with other course"):
        align(str(student), method="sft", data=(chats,), out=out, hold_out=0.2, machine=CPU)


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("The river falls and the old bird sings. " * 40)
    return path


def test_a_bf16_student_trains_in_float32_and_is_scored_as_it_is_stored(
    student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, out = tmp_path / "half", tmp_path / "tuned"
    shutil.copytree(student, half)
    weights = load_file(student / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, half / "model.safetensors")
    trained: list[torch.dtype] = []

    def watched(source: ModelFolder, weights: Iterator[tuple[str, torch.Tensor]], *rest: Any) -> None:
        kept = list(weights)
        trained.extend(weight.dtype for _, weight in kept)
        write_tuned(source, kept, *rest)

    monkeypatch.setattr("ffn_fusion.stages.align.write_tuned", watched)
    machine = Machine(device="cpu", batch_size=4)
    result = align(str(half), method="sft", data=(chats,), out=out, machine=machine).result
    assert result.course.dtype == "bfloat16"
    assert set(trained) == {torch.float32}
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}

    loaded = ModelFolder(out).load(torch.bfloat16, "cpu")
    _, held_out = split(read_examples([chats], "sft", tokenizer_of(student)), 0.1, 0)
    sums = [log_probability(loaded, example.answers[0]) for example in held_out]
    counts = [example.answers[0].num_learnt for example in held_out]
    assert result.scores[0].after.mean == pytest.approx(-sum(sums) / sum(counts), abs=1e-9)


def test_preferences_move_the_margin(student: Path, pairs: Path, tmp_path: Path) -> None:
    tuning = Tuning(epochs=3, learning_rate=1e-3)
    result = align(
        str(student), method="dpo", data=(pairs,), out=tmp_path / "tuned", hold_out=0.25, tuning=tuning, machine=CPU
    ).result
    preferred, margin, _ = result.scores
    assert margin.change.low > 0
    assert preferred.after.mean == 1
    assert result.losses[0].loss == pytest.approx(0.6931, abs=1e-3)  # log 2: at first the model is its own reference
    assert result.losses[-1].loss < 0.6


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_merged_adapters_give_the_logits_of_the_adapted_model(
    method: Any, student: Path, chats: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    merge = LoraModel.merge_and_unload

    def looked_at(self: Any) -> Any:
        seen.append(logits(self))
        return merge(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", looked_at)
    out = tmp_path / "tuned"
    tuning = Tuning(lora=2, learning_rate=1e-2, gradient_checkpointing=method == "dpo")
    data = chats if method == "sft" else pairs
    result = align(str(student), method=method, data=(data,), out=out, tuning=tuning, machine=CPU).result
    merged = ModelFolder(out).load(torch.float32, "cpu")
    torch.testing.assert_close(logits(merged), seen[0], rtol=1e-4, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Every linear layer of every kind: attentions, fused, linear ones; nothing else.
    linear = {name for name, tensor in before.items() if tensor.dim() == 2 and "layers" in name}
    empty = {name for name in linear if "layers.3.mlp" in name}  # the zeros behind the attention that stands alone
    assert changed == linear - empty
    assert any("linear_attn" in name for name in linear)
    assert any("linear_mlp" in name for name in linear)
    assert result.trained_parameters == sum(2 * sum(before[name].shape) for name in linear)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("method", "lora", "family"), [("sft", None, "gemma"), ("dpo", 2, "llama")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    method: Any,
    lora: int | None,
    family: str,
    tiny_student: Callable[[str], Path],
    chats: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = tokenized(shutil.copytree(tiny_student(family), tmp_path / "student"))  # Gemma's has a tied head
    data = chats if method == "sft" else pairs
    tuning = Tuning(lora=lora, learning_rate=1e-3)

    def run(name: str) -> AlignResult:
        return align(str(student), method=method, data=(data,), out=tmp_path / name, tuning=tuning, machine=CPU).result

    whole = run("whole")
    step_end = alignment._Progress.on_step_end
    steps: list[int] = []

    def dies(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        step_end(self, args, state, control, **options)
        steps.append(state.global_step)
        if state.global_step == 3:
            raise Killed

    monkeypatch.setattr(alignment._Progress, "on_step_end", dies)
    with pytest.raises(Killed):
        run("killed")
    broken = tmp_path / ".killed.partial" / "state" / "checkpoints" / "checkpoint-99"
    broken.mkdir()  # a checkpoint that was being written
    monkeypatch.setattr(alignment._Progress, "on_step_end", lambda *_, **__: steps.append(-1))
    again = run("killed")
    assert 0 < steps.count(-1) < whole.num_steps
    assert again == whole
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "killed" / "model.safetensors")[name]), name


def test_two_ranks_do_what_one_does_with_batches_twice_as_large(student: Path, chats: Path, tmp_path: Path) -> None:
    options = ["--method", "sft", "--data", str(chats), "--learning-rate", "1e-3", "--device", "cpu", "--dtype", "fp32"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verb = ["-m", "ffn_fusion", "align", str(student), *options, "--batch-size", "2", "--out", str(tmp_path / "two")]
    subprocess.run([*ranks, *verb], check=True, capture_output=True, timeout=300)
    tuning = Tuning(learning_rate=1e-3)
    align(str(student), method="sft", data=(chats,), out=tmp_path / "one", tuning=tuning, machine=CPU)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(student / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    assert any((tensor - before[name]).abs().max() > 1e-3 for name, tensor in one.items())
    assert read_record(tmp_path / "two", AlignResult).result.course.ranks == 2


def test_a_loss_that_is_no_number_stops_the_run(student: Path, chats: Path, tmp_path: Path) -> None:
    tuning = Tuning(epochs=4, learning_rate=1e30)
    with pytest.raises(UserError, match=r"the loss is nan at step \d+; lower --learning-rate"):
        align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", tuning=tuning, machine=CPU)
    assert not (tmp_path / "tuned").exists()


def test_trl_trains_on_the_loss_that_we_score(student: Path, chats: Path, tmp_path: Path) -> None:
    model = ModelFolder(student).load(torch.float32, "cpu")
    examples = read_examples([chats], "sft", tokenizer_of(student))[:4]
    sums = sum(log_probability(model, example.answers[0]) for example in examples)
    count = sum(example.answers[0].num_learnt for example in examples)
    course = Course("sft", None, 1, 1e-9, 0.1, 4, 1, 1, True, "float32", 0)
    trained = alignment.train(model, tokenizer_of(student), examples, course, tmp_path)
    assert trained.losses[0].loss == pytest.approx(-sums / count, rel=1e-4)


def test_nobody_is_told(student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: Any, **__: Any) -> None:
        raise AssertionError("TRL sent something")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", told)
    align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", machine=CPU)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 300}, "--length 300 is longer than the model's context of 256 tokens"),
        ({"length": 10}, "all 40 records are longer than --length 10"),
        ({"machine": replace(CPU, dtype="fp16")}, "float16"),
        ({"hold_out": 0.01}, "--hold-out 0.01 of 40 different prompts is 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    options: dict[str, Any], said: str, student: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", **({"machine": CPU} | options))


def test_what_the_machine_lacks_is_said_in_terms_of_options(
    student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def run() -> None:
        align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", machine=CPU)

    with monkeypatch.context() as patch:
        patch.setattr(alignment, "train", full)
        with pytest.raises(UserError, match="lower --batch-size"):
            run()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=3_000_000))
    with pytest.raises(UserError, match=r"0\.0 GB free; checkpoints and the result need 0\.0 GB"):
        run()


def test_a_missing_extra_is_named(student: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ffn_fusion.healing.alignment")
    monkeypatch.delattr("ffn_fusion.healing.alignment")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"align needs trl: pip install 'ffn-fusion\[align\]'"):
        align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", machine=CPU)


def test_long_records_are_left_out_and_counted(
    student: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = align(str(student), method="sft", data=(chats,), out=tmp_path / "tuned", length=24, machine=CPU).result
    assert 0 < result.records.num_too_long < 40
    assert f"align: {result.records.num_too_long} of 40 records are longer than --length 24" in capsys.readouterr().err
    assert "left out" in result.summary()


def test_scores_say_when_it_got_worse() -> None:
    before, counts = [[-1.0], [-2.0], [-1.5]], [[1], [1], [1]]
    (worse,) = scores(before, [[-3.0], [-4.1], [-3.4]], counts)
    assert worse.verdict == "WORSE than before"
    (same,) = scores(before, [[-1.2], [-1.8], [-1.5]], counts)
    assert same.verdict.startswith("no change")
    pairs = [[-3.0, -2.0], [-4.0, -3.5], [-1.0, -2.0]]
    after = [[-2.0, -4.0], [-3.0, -4.5], [-1.0, -3.0]]
    preferred, margin, chosen = scores(pairs, after, [[2, 3]] * 3)
    assert (preferred.before.mean, preferred.after.mean) == (pytest.approx(1 / 3), 1)
    assert (margin.before.mean, margin.after.mean) == (pytest.approx(-1 / 6), pytest.approx(11 / 6))
    assert isinstance(margin.change, Estimate)
    assert (chosen.before.mean, chosen.after.mean) == (pytest.approx(8 / 6), 1)
