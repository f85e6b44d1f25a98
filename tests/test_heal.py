"""`heal` end to end on tiny models: what is learned, what stays, kills, ranks, guards and bad input."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILIES, STUDENT_PLAN, save_tiny_parent
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ffn_fusion import cli
from ffn_fusion.core.distill import Losses
from ffn_fusion.core.heal_records import CheckUp, DomainScore, HealResult, regression
from ffn_fusion.core.records import EvalResult
from ffn_fusion.core.stats import Estimate
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Record, read_record
from ffn_fusion.healing import corpus
from ffn_fusion.healing.corpus import Corpus
from ffn_fusion.healing.course import Course
from ffn_fusion.healing.domains import Answers
from ffn_fusion.healing.feeds import CachedFeed, LiveFeed, head_of, spans
from ffn_fusion.healing.footprint import suggestion
from ffn_fusion.healing.loop import Objective, Training
from ffn_fusion.healing.ranks import joined
from ffn_fusion.healing.sharded import Form, Model, load
from ffn_fusion.healing.teacher_cache import open_cache
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import read_plan
from ffn_fusion.hf.text import shuffled_pieces
from ffn_fusion.settings import Machine, Text
from ffn_fusion.stages.evaluate import evaluate
from ffn_fusion.stages.heal import heal
from ffn_fusion.stages.teach import teach

CPU = Machine(device="cpu", dtype="fp32", batch_size=2)
GLOBAL = {"name": "global", "tokens": 768, "length": 32, "step_tokens": 128, "learning_rate": 3e-3, "losses": {"kl": 1}}
LOCAL = GLOBAL | {"name": "local", "tokens": 512, "trains": "changed", "local": True, "losses": {"mse": 1}}
RANKED = str(Path(__file__).parent / "ranked_heal.py")
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two files in languages of few words."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, letters in (("one", "abcdefgh"), ("two", "mnopqrst")):
        words = ["".join(rng.choices(letters, k=4)) for _ in range(30)]
        lines = [" ".join(rng.choices(words, k=10)) for _ in range(4000)]
        (folder / name).with_suffix(".txt").write_text("\n".join(lines))
    return str(folder / "one.txt"), str(folder / "two.txt")


@pytest.fixture
def healed(tiny_parent: Tiny, tiny_student: Tiny, tmp_path: Path, texts: tuple[str, str]) -> Callable[..., Any]:
    """Runs `heal` with these stages into tmp_path/name."""

    def run(*stages: dict[str, Any], name: str = "out", family: str = "llama", **options: Any) -> Record[HealResult]:
        recipe = {"domains": dict(zip(("one", "two"), texts, strict=True)), "stages": list(stages)}
        recipe |= {"text": [{"text": texts[0]}, {"text": texts[1], "share": 0.5}]}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        parent, student = str(tiny_parent(family)), str(tiny_student(family))
        settings = {"domain_windows": 2, "domain_length": 32, "check_ups": 2, "machine": CPU} | options
        record = heal(parent, student, out=tmp_path / name, stages=str(path), **settings)
        assert record is not None
        return record

    return run


def losses_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ({"kl": 1, "cosine": 1}, "mean KL to the parent over the domains"),
        ({"kl": 1, "cosine": 1, "lm": 0.1}, "mean negative log-likelihood over the domains"),
    ],
)
def test_a_student_comes_nearer_to_its_parent(
    losses: dict[str, float],
    named: str,
    healed: Callable[..., Any],
    tiny_parent: Tiny,
    tiny_student: Tiny,
    tmp_path: Path,
    texts: tuple[str, str],
) -> None:
    both = GLOBAL | {"tokens": 4096, "losses": losses}
    result = healed(LOCAL, both).result
    first, best = result.check_ups[0], result.check_ups[result.best]
    assert best.mean("kl") < 0.9 * first.mean("kl")
    assert best.mean(result.measure) == min(check_up.mean(result.measure) for check_up in result.check_ups)
    assert [stage.num_steps for stage in result.stages] == [4, 32]
    assert result.curve[-1].losses.keys() == losses.keys()
    assert {drawn.text: drawn.num_tokens for drawn in result.stages[1].drawn} == {texts[0]: 2720, texts[1]: 1376}
    folder = tmp_path / "out"
    assert (folder / "plan.json").read_text() == (tiny_student("llama") / "plan.json").read_text()
    assert not list(folder.glob("state*")) + list(folder.glob("students"))
    assert named in (folder / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert loaded.dtype == torch.float32
    scores = evaluate(
        str(tiny_parent("llama")), str(folder), windows=4, machine=CPU, out=tmp_path / "eval"
    ).result.scores
    assert scores[1].kl is not None
    assert named in result.summary()


def test_compiled_it_learns_the_same(healed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    both = GLOBAL | {"losses": {"kl": 1, "cosine": 1}}
    plain = healed(both, name="plain", domain_windows=3).result
    graphs, score = [], Answers.score

    def compiled(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def measured(self: Answers, student: Model) -> dict[str, DomainScore]:
        before = len(graphs)
        found = score(self, student)
        assert len(graphs) == before, "a check-up was compiled"
        return found

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiled))
    monkeypatch.setattr(Answers, "score", measured)
    result = healed(both, name="compiled", compile=True, domain_windows=3).result
    # The parent's block; the student's with and without attention, all as wide at this size; two losses.
    assert len(graphs) == 5
    for found, wanted in zip(result.curve, plain.curve, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-3)
    assert result.check_ups[-1].mean("kl") == pytest.approx(plain.check_ups[-1].mean("kl"), rel=1e-3)


def test_a_local_stage_moves_changed_blocks_only(
    healed: Callable[..., Any], tiny_student: Tiny, tmp_path: Path
) -> None:
    healed(LOCAL)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_student("llama"), tmp_path / "out"))
    moved = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    # A0F0 A1F1+2 -F3 A4 A5F5: the second block to the fourth.
    assert moved == {"1", "2", "3"}


@pytest.mark.parametrize(("save_minutes", "optimizer"), [(1e-9, "adamw"), (10.0, "adamw"), (1e-9, "muon")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    save_minutes: float, optimizer: str, healed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at every step, or at check-ups only, which come after every second or third: the rest is made again."""
    stages = (LOCAL, GLOBAL | {"optimizer": optimizer})
    healed(*stages)
    step, victims, made, tokenised = Training._step, (2, 3, 5), [], []

    def read(text: Text, *arguments: Any) -> list[str]:
        tokenised.append(text)
        return shuffled_pieces(text, *arguments)

    monkeypatch.setattr(corpus, "shuffled_pieces", read)

    def counted(self: Training, number: int) -> torch.Tensor:
        made.append(number)
        return step(self, number)

    for victim in victims:
        calls = []

        def dying(self: Training, number: int, victim: int = victim, calls: list[int] = calls) -> torch.Tensor:
            calls.append(number)
            if len(calls) == victim:
                raise KeyboardInterrupt
            return counted(self, number)

        monkeypatch.setattr(Training, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            healed(*stages, name="killed", save_minutes=save_minutes)
    monkeypatch.setattr(Training, "_step", counted)
    with (tmp_path / ".killed.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "trai')
    healed(*stages, name="killed")
    assert (len(made) == 4 + 6) == (save_minutes < 1)
    assert len(tokenised) == 2 * 2, "both texts of each stage once"
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_students_that_are_to_be_kept_outlive_a_kill(
    healed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that goes on may find to be the best is there until its progress says otherwise."""
    save, calls = Course._save_progress, []

    def dying(self: Course) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(Course, "_save_progress", dying)
    with pytest.raises(KeyboardInterrupt):
        healed(GLOBAL)
    students = tmp_path / ".out.partial" / "students"
    assert {path.name for path in students.iterdir()} == {"step-3", "step-6"}


@pytest.mark.parametrize(
    ("program", "optimizer"),
    [(["-m", "ffn_fusion"], "adamw"), ([RANKED], "adamw"), ([RANKED], "muon")],
    ids=["one group", "many groups", "muon"],
)
def test_two_ranks_go_on_from_one_and_learn_the_same(
    program: list[str],
    optimizer: str,
    healed: Callable[..., Any],
    tiny_parent: Tiny,
    tiny_student: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = (LOCAL, GLOBAL | {"optimizer": optimizer})
    healed(*stages)
    step = Training._step

    def dying(self: Training, number: int) -> torch.Tensor:
        if self.stage.name == "global" and number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        healed(*stages, name="two")
    # Of two ranks that were killed, one had kept the parent's answers: both must ask again.
    (tmp_path / ".two.partial" / "state" / "answers-0-of-2.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*program, "heal", str(tiny_parent("llama")), str(tiny_student("llama"))]
    command += ["--out", str(tmp_path / "two"), "--stages", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    command += ["--dtype", "fp32", "--domain-windows", "2", "--domain-length", "32", "--check-ups", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "taking up" in done.stderr
    assert done.stdout.count("mean KL to the parent over the domains") == 1
    one, two = (losses_of(tmp_path / name) for name in ("out", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for ours, theirs in zip(two, one, strict=True):
        if ours["kind"] == "training":
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "out")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_copy_of_the_parent_has_nothing_to_learn(family: str, tiny_parent: Tiny) -> None:
    """Logits are those of the family's own model, and every loss against the parent vanishes, its gradient too."""
    folder = ModelFolder(tiny_parent(family))
    losses = Losses(kl=1.0, reverse_kl=1.0, jsd=1.0, cosine=1.0, mse=1.0)
    ids = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    with joined(CPU) as ranks:
        head = head_of(folder, ranks.device, torch.float32)
        parent = load(folder, folder.config, Form(torch.float32), ranks)
        student = load(folder, folder.config, Form(torch.float32, trains=lambda _: True), ranks)
        objective = Objective(losses, spans(folder.plan), None)
        corpus = Corpus(ids.numpy(), torch.arange(2).numpy(), [])
        batch = LiveFeed(corpus, losses, objective.asked, parent, head, ranks.device).batch([0, 1])
        assert batch.predictions is not None
        logits = batch.predictions(slice(0, 32))
        total, sums = objective(student, batch)
        total.backward()
        gradients = [p.grad.full_tensor().abs().max() for p in student.parameters() if p.grad is not None]
    wanted = AutoModelForCausalLM.from_pretrained(folder.folder)(ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert float(sums.abs().max()) < 1e-3
    assert len(gradients) > 20
    assert float(max(gradients)) < 1e-3


def test_a_loss_that_is_not_a_number_keeps_the_best_weights(healed: Callable[..., Any], tmp_path: Path) -> None:
    result = healed(GLOBAL, GLOBAL | {"name": "wild", "learning_rate": 1e30, "max_norm": 1e30}).result
    assert result.stopped.startswith("the loss is not a number at step 2 of stage wild")
    assert [check_up.stage for check_up in result.check_ups] == ["global"] * 3
    assert [(stage.name, stage.num_steps) for stage in result.stages] == [("global", 6), ("wild", 1)]
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    assert "stopped: the loss" in result.summary()


def test_a_domain_that_is_being_lost_stops_the_run(healed: Callable[..., Any], texts: tuple[str, str]) -> None:
    """Trained on nothing but the text of one domain, the model forgets the other."""
    stage = GLOBAL | {"tokens": 8192, "learning_rate": 1e-2, "schedule": "constant", "losses": {"lm": 1}}
    result = healed(stage | {"text": [{"text": texts[0]}]}, check_ups=8).result
    assert result.measure == "nll"
    assert result.stopped.startswith("two regressed while the loss fell")
    assert len(result.check_ups) < 9
    ended = [check_up.domains["two"].nll.mean for check_up in result.check_ups]
    assert ended[-1] > ended[0]
    (stage,) = result.stages
    assert (stage.num_steps, stage.num_tokens) == (result.check_ups[-1].step, result.check_ups[-1].num_tokens)
    assert [drawn.num_tokens for drawn in stage.drawn] == [stage.num_tokens]
    assert result.texts == [texts[0]]


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        # Wikipedia on an H200 at a rate of 1e-3: the first steps cost what the next ones win back.
        ([0.699, 0.995, 0.822, 0.733], False),
        ([0.699, 0.650, 0.750, 0.845], True),
        ([0.699, 0.650, 0.800, 0.799], True),
    ],
)
def test_a_domain_that_recovers_stops_nothing(values: list[float], stops: bool) -> None:
    def examined(step: int, value: float) -> CheckUp:
        found = Estimate(value, 0.01, value - 0.02, value + 0.02, 8)
        return CheckUp(step, step, "global", 1.0 - step / 10 if step else None, {"one": DomainScore(found, found, 1.0)})

    check_ups = [examined(step, value) for step, value in enumerate(values)]
    seen = range(3, len(check_ups) + 1)
    assert any(regression(check_ups[:count], "kl", 2) for count in seen) == stops


def test_longer_contexts_come_with_the_rope_that_they_were_trained_with(
    healed: Callable[..., Any], tmp_path: Path
) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0}
    long = GLOBAL | {
        "name": "long",
        "length": 512,
        "step_tokens": 512,
        "tokens": 1024,
        "losses": {"lm": 1},
        "rope": rope,
    }
    result = healed(long).result
    assert result.best > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "yarn"
    # What is stretched is the context that the model came with.
    assert config["rope_parameters"]["original_max_position_embeddings"] == 256
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.model.rotary_emb.rope_type == "yarn"


@pytest.fixture
def answers(tiny_parent: Tiny, tmp_path: Path, texts: tuple[str, str]) -> Path:
    """All tokens but one of the parent's predictions, and the streams behind every layer that a block ends with."""
    text = Text(text=(texts[0],), length=32)
    options: dict[str, Any] = {"windows": 24, "top_k": 127, "hidden": (0, 2, 3, 4, 5), "text": text, "machine": CPU}
    teach(str(tiny_parent("llama")), out=tmp_path / "answers", **options)
    return tmp_path / "answers"


def test_cached_answers_are_those_of_the_live_parent(answers: Path, tiny_parent: Tiny, tiny_student: Tiny) -> None:
    parent, student = (ModelFolder(tiny("llama")) for tiny in (tiny_parent, tiny_student))
    losses, cache = Losses(kl=1.0, cosine=1.0, mse=1.0), open_cache(answers, parent)
    places, order = [3, 0, 7], np.arange(cache.num_windows)
    corpus = Corpus(cache.read(order.tolist()).ids.numpy(), order, [])
    plan = read_plan(str(student.folder), parent)
    with joined(CPU) as ranks:
        objective = Objective(losses, spans(plan), None)
        live = LiveFeed(
            corpus,
            losses,
            objective.asked,
            load(parent, parent.config, Form(torch.float32), ranks),
            head_of(parent, ranks.device, torch.float32),
            ranks.device,
        )
        cached = CachedFeed(cache, order, losses, ranks.device)
        model = load(student, student.config, Form(torch.float32), ranks)
        with torch.no_grad():
            sums = [objective(model, feed.batch(places))[1] for feed in (live, cached)]
    torch.testing.assert_close(sums[1], sums[0], rtol=2e-3, atol=1e-3)


def test_a_student_learns_from_cached_answers(
    healed: Callable[..., Any], answers: Path, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = GLOBAL | {"tokens": 2048, "losses": {"kl": 1, "cosine": 0.5}}
    monkeypatch.setattr(LiveFeed, "batch", None)
    result = healed(stage, teacher=answers).result
    assert result.curve[-1].losses["kl"] < result.curve[0].losses["kl"]
    assert str(result.stages[0].drawn[0]) == f"2,048 tokens of {answers}, read 2.7 times"
    assert result.texts == [texts[0], str(answers)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 64}, "windows of 64 tokens, the cached answers of 32"),
        ({"losses": {"jsd": 1}}, "need the live parent"),
        ({"losses": {"kl": 1, "temperature": 2.0}}, "temperature 2, the cached answers 1"),
        (LOCAL | {"trains": "neighbours"}, "streams behind layers embeddings, which the cached answers lack"),
    ],
)
def test_answers_that_do_not_serve_a_stage(
    healed: Callable[..., Any], answers: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        healed(GLOBAL | change, teacher=answers)


def test_a_finished_run_is_not_run_again(healed: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    first = healed(GLOBAL)
    assert healed(GLOBAL) == first
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with other recipe"):
        healed(GLOBAL | {"learning_rate": 1e-4})


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (GLOBAL | {"length": 512, "step_tokens": 512}, "longer than the student's context of 256"),
        (GLOBAL | {"losses": {}}, "no loss has a weight"),
        (GLOBAL | {"speed": 3}, "extra fields found \\(speed\\)"),
        (GLOBAL | {"step_tokens": 8}, "step_tokens 8 is below 32"),
        (LOCAL | {"trains": "all"}, "losses on the stream only, and trains changed blocks"),
        (GLOBAL | {"text": [{"text": "/nowhere.txt"}]}, "nowhere"),
    ],
)
def test_recipes_that_cannot_be_followed(healed: Callable[..., Any], stage: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        healed(stage)


def test_another_tokenizer_is_refused(tiny_parent: Tiny, tiny_student: Tiny, tmp_path: Path) -> None:
    parent = shutil.copytree(tiny_parent("llama"), tmp_path / "parent")
    tokenizer = json.loads((parent / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (parent / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="different tokenizers"):
        heal(str(parent), str(tiny_student("llama")), out=tmp_path / "out", machine=CPU)
    larger = save_tiny_parent("llama", tmp_path / "larger", vocab_size=160)
    with pytest.raises(UserError, match="the parent's vocabulary has 160 entries, the student's 128"):
        heal(str(larger), str(tiny_student("llama")), out=tmp_path / "out", machine=CPU)


def test_a_plan_of_another_parent_is_refused(tiny_student: Tiny, tmp_path: Path) -> None:
    shallow = save_tiny_parent("llama", tmp_path / "parent", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"which .* does not have"):
        heal(str(shallow), str(tiny_student("llama")), out=tmp_path / "out", machine=CPU)


def test_full_memory_names_what_helps(healed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Training, "_step", full)
    with pytest.raises(UserError, match="with 2 windows at once; lower --batch-size, give --gradient-checkpointing"):
        healed(GLOBAL)


@pytest.mark.parametrize(
    ("at_once", "share", "used", "better"),
    [(4, 16, 0.1, 16), (4, 16, 0.3, 8), (4, 16, 0.5, None), (4, 6, 0.1, 6), (16, 16, 0.01, None)],
)
def test_a_gpu_that_has_room_is_given_more_at_once(
    at_once: int, share: int, used: float, better: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000 * used)
    said = suggestion(at_once, share, torch.device("cuda"))
    assert (said.rpartition(" ")[2] if said else None) == (str(better) if better else None)


def test_activations_computed_again_change_nothing(healed: Callable[..., Any], tmp_path: Path) -> None:
    healed(GLOBAL | {"losses": {"kl": 1, "mse": 1}})
    healed(GLOBAL | {"losses": {"kl": 1, "mse": 1}}, name="again", gradient_checkpointing=True)
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "out")


def test_a_healed_student_can_be_healed_again(
    healed: Callable[..., Any], tiny_parent: Tiny, tmp_path: Path, texts: tuple[str, str]
) -> None:
    first = healed(GLOBAL).result
    options: dict[str, Any] = {"domain_windows": 2, "domain_length": 32, "check_ups": 1, "machine": CPU}
    again = heal(
        str(tiny_parent("llama")),
        str(tmp_path / "out"),
        out=tmp_path / "more",
        stages=str(tmp_path / "recipe.yaml"),
        **options,
    )
    assert again is not None
    start, before = again.result.check_ups[0], first.check_ups[first.best]
    assert start.mean("kl") == pytest.approx(before.mean("kl"), rel=1e-5)


def test_the_main_job_heals_what_it_fused(tiny_parent: Tiny, tmp_path: Path, texts: tuple[str, str]) -> None:
    recipe = {"domains": {"one": texts[0]}, "stages": [GLOBAL | {"tokens": 2048, "learning_rate": 1e-3}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["run", tiny_parent("llama"), "--plan", STUDENT_PLAN, "--out", tmp_path / "run", "--no-steps"]
    command += ["--heal", tmp_path / "recipe.yaml", "--heal-scale", 0.5, "--text", texts[0], "--eval-text", texts[1]]
    command += ["--length", 32, "--windows", 2, "--eval-windows", 2, "--fit-windows", 8, "--dtype", "fp32"]
    with pytest.raises(SystemExit) as done:
        cli.main(list(map(str, command)))
    assert done.value.code == 0
    healed = read_record(tmp_path / "run" / "student", HealResult).result
    assert healed.stages[0].num_tokens == 1024
    assert healed.texts == [texts[0]]
    scores = read_record(tmp_path / "run" / "eval", EvalResult).result.scores
    assert [Path(score.model).name for score in scores[1:]] == ["fused", "student"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Healing</h2>" in page
    assert "fig-domains" in page


def test_too_little_text_is_named(healed: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match=r"short.txt has only 0 tokens in its 'fit' part; a window has 32"):
        healed(GLOBAL | {"text": [{"text": str(tmp_path / "short.txt")}]})
