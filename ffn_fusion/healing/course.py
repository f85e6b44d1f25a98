"""A recipe from its first step to its last: stages in a row, check-ups between them, always ready to be killed."""

import gc
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cattrs
import numpy as np
from safetensors.torch import load_file, save

from ffn_fusion.core.curriculum import Curriculum, TrainingStage
from ffn_fusion.core.heal_records import (
    CheckUp,
    HealResult,
    Measure,
    StageOutcome,
    TrainingPoint,
    best_of,
    regression,
)
from ffn_fusion.folder import StageFolder, write_atomically
from ffn_fusion.healing import checkpoints
from ffn_fusion.healing.corpus import build_corpus, drawn, repeated
from ffn_fusion.healing.domains import Answers, ask_parent
from ffn_fusion.healing.feeds import CachedFeed, Feed, LiveFeed, head_of, needs_parent
from ffn_fusion.healing.flops import matrix_flops, training_flops
from ffn_fusion.healing.footprint import peak_gb, start_peak, suggestion
from ffn_fusion.healing.given import Habits, Material, Pair
from ffn_fusion.healing.journal import Journal
from ffn_fusion.healing.loop import Done, Objective, Training, evenly
from ffn_fusion.healing.ranks import Ranks
from ffn_fusion.healing.sharded import Form, Model, load, whole_weights
from ffn_fusion.healing.tuned import write_card, write_tuned
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.surgery import LAYER
from ffn_fusion.progress import track

STUDENTS = "students"
POSITIONS = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings")
PROGRESS = "progress.json"
TOKENS = "tokens-{}"
POINTS = 200
"""Points of the curve in a stage, at most."""


@dataclass
class Progress:
    """How far it has come. Everything before `step` of stage number `stage` is in `checkpoint`."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    warm_seconds: float = 0.0
    """Without the first steps of each process, which compile and fill caches, and `warm_steps` were made in them."""
    warm_steps: int = 0
    checkpoint: str = ""
    stages: list[StageOutcome] = field(default_factory=list)
    check_ups: list[CheckUp] = field(default_factory=list)
    curve: list[TrainingPoint] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Steps and mean loss of each stretch since the last check-up."""
    stopped: str = ""


class Course:
    """The whole of a healing run on this rank."""

    def __init__(
        self, pair: Pair, recipe: Curriculum, habits: Habits, material: Material, folder: StageFolder, ranks: Ranks
    ) -> None:
        self.pair, self.recipe, self.habits, self.material = pair, recipe, habits, material
        self.folder, self.ranks = folder, ranks
        self.progress = cattrs.structure(folder.load(PROGRESS) or {}, Progress)
        self.head = head_of(pair.parent, ranks.device, habits.dtype)
        asks = any(map(needs_parent, recipe.stages))
        # What the recipe is after in the end: the text itself costs some nearness to the parent.
        self.measure: Measure = "nll" if recipe.stages[-1].losses.lm else "kl"
        self.parent = self._ask() if asks and material.cache is None else None
        self.answers = self._answers()
        self.journal = Journal(folder.path, self.progress.curve, ranks.is_first)

    def run(self) -> None:
        """Go on from where `progress` is to the end, or to where a guard stops it."""
        for number in range(self.progress.stage, len(self.recipe.stages)):
            if not self.progress.stopped:
                self._stage(number, self.recipe.stages[number])

    def _stage(self, number: int, stage: TrainingStage) -> None:
        # The model of the stage before holds itself in cycles.
        gc.collect()
        start_peak(self.ranks.device)
        progress, habits = self.progress, self.habits
        moving = self.pair.changed(stage)
        objective = self.pair.objective(stage, habits.compiled)
        feed, order, sources = self._feed(number, stage, objective)
        form = Form(habits.dtype, habits.compiled, _chooser(stage, moving), habits.checkpointed)
        student = load(self.pair.student, self._config(number), form, self.ranks)
        training = Training(student, stage, objective, feed, self.ranks, habits.batch_size)
        if progress.checkpoint:
            own = training.optimizers if progress.step else []
            checkpoints.restore(student, own, self.folder.state, progress.checkpoint)
        if not progress.check_ups:
            self._check_up(student, stage)
        self._train(stage, training, student)
        steps = self._steps_made()
        if not steps:
            self._save_progress()
            return
        live = self.pair.parent if self.parent and needs_parent(stage) else None
        flops = training_flops(live, self.pair.student, stage)
        speed = self._tokens_per_second(stage)
        share = flops * speed / self.ranks.size / matrix_flops(habits.dtype, self.ranks.device) if flops else None
        outcome = StageOutcome(
            stage.name,
            steps,
            steps * stage.windows_per_step * stage.length,
            stage.length,
            training.num_trained,
            round(progress.seconds, 2),
            round(speed, 1),
            share,
            peak_gb(self.ranks.device),
            drawn(order[: steps * stage.windows_per_step], sources, stage.length),
        )
        progress.stages.append(outcome)
        progress.stage, progress.step = number + 1, 0
        progress.seconds, progress.warm_seconds, progress.warm_steps = 0.0, 0.0, 0
        self._save_progress()
        if self.ranks.is_first:
            (self.folder.state / TOKENS.format(number)).unlink(missing_ok=True)

    def _feed(
        self, number: int, stage: TrainingStage, objective: Objective
    ) -> tuple[Feed, np.ndarray, list[tuple[str, int]]]:
        """What the stage learns from, the order of its windows, and how many are of each text."""
        count, seed = stage.num_steps * stage.windows_per_step, self.habits.seed + number
        cache = self.material.cache
        if cache:
            order = repeated(count, cache.num_windows, np.random.default_rng(seed))
            cached = CachedFeed(cache, order, stage.losses, self.ranks.device)
            return cached, order, [(str(cache.folder), cache.num_windows)]
        kept = (self.folder, TOKENS.format(number), self.ranks.is_first)
        corpus = build_corpus(self.recipe.sources(stage), self.material.tokenizer, stage.length, count, seed, *kept)
        parent = self.parent if needs_parent(stage) else None
        feed = LiveFeed(corpus, stage.losses, objective.asked, parent, self.head, self.ranks.device)
        return feed, corpus.order, corpus.sources

    def _train(self, stage: TrainingStage, training: Training, student: Model) -> None:
        progress, habits = self.progress, self.habits
        done_before = sum(outcome.num_steps for outcome in progress.stages)
        tokens_before = sum(outcome.num_tokens for outcome in progress.stages)
        examined = evenly(stage.num_steps, habits.check_ups)
        every = max(1, stage.num_steps // POINTS)
        stops = sorted({*range(every, stage.num_steps, every), *examined})
        stops = [stop for stop in stops if stop > progress.step]
        since, before = time.monotonic(), progress.step
        saved, cold = since, True
        speed = partial(self._speed, stage)
        for done in track(training.run(progress.step, stops), f"heal: {stage.name}", len(stops), speed):
            if done.broken is not None:
                where = f"step {done.broken + 1:,} of stage {stage.name}"
                progress.stopped = f"the loss is not a number at {where}; lower its learning_rate"
                return
            self._note(done, done_before, tokens_before)
            better = cold and self.ranks.is_first and suggestion(training.at_once, training.share, self.ranks.device)
            if better:
                print(f"heal: {better}", file=sys.stderr)
            step = done.point.step
            elapsed = time.monotonic() - since
            progress.seconds += elapsed
            progress.warm_seconds += elapsed * (not cold)
            progress.warm_steps += (step - before) * (not cold)
            cold, before = False, step
            # Of clocks that disagree the first rank's counts: all save or none does.
            due = self.ranks.tell(time.monotonic() - saved >= 60 * habits.save_minutes)
            if due or step in examined:
                progress.step = step
                name = checkpoints.save(student, training.optimizers, self.folder.state, done_before + step, self.ranks)
                progress.checkpoint = name
                if step in examined:
                    self._check_up(student, stage)
                if progress.stopped:
                    return
                self._save_progress()
                checkpoints.forget(self.folder.state, name, self.ranks)
                self._forget_students()
                saved = time.monotonic()
            since = time.monotonic()

    def _speed(self, stage: TrainingStage) -> str:
        """Loss and tokens a second so far, for the progress bar."""
        progress = self.progress
        loss = f"loss {progress.losses[-1][1]:.3f}, " if progress.losses else ""
        return f"{loss}{self._tokens_per_second(stage):,.0f} tokens/s"

    def _tokens_per_second(self, stage: TrainingStage) -> float:
        """So far in this stage, over all ranks."""
        progress = self.progress
        steps, seconds = progress.warm_steps, progress.warm_seconds
        if not steps:
            steps, seconds = self._steps_made(), progress.seconds
        return steps * stage.windows_per_step * stage.length / seconds

    def _steps_made(self) -> int:
        """So far in this stage."""
        curve = self.progress.curve
        return (curve[-1].step if curve else 0) - sum(outcome.num_steps for outcome in self.progress.stages)

    def _note(self, done: Done, steps_before: int, tokens_before: int) -> None:
        point = done.point
        last = self.progress.curve[-1].step if self.progress.curve else 0
        whole = replace(point, step=steps_before + point.step, num_tokens=tokens_before + point.num_tokens)
        self.progress.losses.append((whole.step - last, done.loss))
        self.progress.curve.append(whole)
        self.journal.add(whole)

    def _check_up(self, student: Model, stage: TrainingStage) -> None:
        """Measure the domains, keep the weights in the ordinary format, and stop if a domain is being lost."""
        progress = self.progress
        step, tokens = (progress.curve[-1].step, progress.curve[-1].num_tokens) if progress.curve else (0, 0)
        steps = sum(count for count, _ in progress.losses)
        loss = sum(count * value for count, value in progress.losses) / steps if steps else None
        found = CheckUp(step, tokens, stage.name, loss, self.answers.score(student))
        progress.check_ups.append(found)
        progress.losses = []
        self.journal.add_check_up(found)
        if step:
            self._write_student(student, step)
            progress.stopped = regression(progress.check_ups, self.measure, self.habits.patience)

    def _write_student(self, student: Model, step: int) -> None:
        out = self.folder.path / STUDENTS / f"step-{step}"
        if self.ranks.is_first:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
        weights = whole_weights(student, self.pair.student.checkpoint.specs)
        if not self.ranks.is_first:
            deque(weights, maxlen=0)
        else:
            config = self._config(self.progress.stage).to_dict()
            fields = {name: value for name, value in config.items() if name in POSITIONS}
            write_tuned(self.pair.student, weights, out, fields)

    def _forget_students(self) -> None:
        """Delete all but the best and the latest, by the progress on disk: a killed run measures again what came later,
        and may find another best."""
        found = self.progress.check_ups
        kept = {f"step-{check_up.step}" for check_up in (found[best_of(found, self.measure)], found[-1])}
        if self.ranks.is_first:
            for path in (self.folder.path / STUDENTS).glob("*"):
                if path.name not in kept:
                    shutil.rmtree(path)

    def _config(self, number: int) -> Any:
        """The student's configuration from stage number `number` on."""
        config = ModelFolder(self.pair.student.folder).config
        for stage in self.recipe.stages[: number + 1]:
            if stage.rope:
                config.rope_parameters = config.rope_parameters | stage.rope
                # Notes which context is stretched, before it is longer.
                config.standardize_rope_params()
                config.max_position_embeddings = max(config.max_position_embeddings, stage.length)
        return config

    def _ask(self) -> Model:
        """The parent, live."""
        form = Form(self.habits.dtype, self.habits.compiled)
        return load(self.pair.parent, self.pair.parent.config, form, self.ranks).eval()

    def _answers(self) -> Answers:
        domains, together = self.material.domains, (self.ranks, self.habits.batch_size)
        path = self.folder.state / f"answers-{self.ranks.rank}-of-{self.ranks.size}.safetensors"
        # A parent that is spread over ranks is asked by all of them or by none.
        held = all(self.ranks.gather(path.is_file()))
        hidden = load_file(path) if held else ask_parent(domains, self.parent or self._ask(), *together)
        if not held:
            write_atomically(path, save(hidden))
        return Answers(domains, hidden, self.head, *together)

    def _save_progress(self) -> None:
        if self.ranks.is_first:
            self.folder.save(PROGRESS, asdict(self.progress))
        self.ranks.wait()


def finish(folder: Path, student: ModelFolder, result: HealResult) -> None:
    """Put the student of the best check-up where a student folder has it; at step 0 it is the one that came in."""
    step = result.check_ups[result.best].step
    kept = folder / STUDENTS / f"step-{step}"
    if step:
        # A run that was killed here has moved some of it, or all.
        for path in kept.iterdir() if kept.is_dir() else ():
            path.rename(folder / path.name)
    else:
        held = student.checkpoint
        write_tuned(student, ((name, held.read(name)) for name in held.specs), folder)
    shutil.rmtree(folder / STUDENTS, ignore_errors=True)
    tokens = sum(stage.num_tokens for stage in result.stages)
    told = f"Healed by ffn-fusion, recipe {result.recipe}, {tokens:,} tokens: {result.verdict}."
    write_card(student, f"## Healing\n\n{told}\n", folder)


def _chooser(stage: TrainingStage, moving: frozenset[int]) -> Callable[[str], bool]:
    """Whether a parameter trains in a stage, by its name."""
    prefixes = tuple(LAYER.format(index) for index in moving)
    return lambda name: stage.trains == "all" or name.startswith(prefixes)
