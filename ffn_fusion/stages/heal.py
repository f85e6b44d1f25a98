"""`heal`: parent, student, text → the student trained back to its parent, by a recipe of stages."""

from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import cattrs
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.curriculum import Curriculum, Source
from ffn_fusion.core.heal_records import HealResult, best_of
from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.healing.course import Course, finish
from ffn_fusion.healing.domains import read_domains
from ffn_fusion.healing.feeds import check_cache
from ffn_fusion.healing.given import Habits, Material, Pair
from ffn_fusion.healing.ranks import Ranks, joined
from ffn_fusion.healing.teacher_cache import open_cache
from ffn_fusion.hf.checkpoint import fingerprint
from ffn_fusion.hf.machine import pick_device, pick_training_dtype, where
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.settings import Above0, Machine, NotNegative, Positive, TwoOrMore

RECIPES = files("ffn_fusion.healing") / "recipes"


def heal(
    parent: str,
    student: str,
    *,
    out: Path,
    stages: str = "quick",
    scale: Above0 = 1.0,
    length: TwoOrMore | None = None,
    text: tuple[str, ...] = (),
    column: str = "text",
    seed: int = 0,
    teacher: Path | None = None,
    domain: tuple[str, ...] = (),
    domain_windows: TwoOrMore = 8,
    domain_length: TwoOrMore = 512,
    check_ups: Positive = 4,
    save_minutes: Above0 = 10.0,
    patience: NotNegative = 2,
    compile: bool | None = None,
    gradient_checkpointing: bool = False,
    machine: Machine = Machine(),  # noqa: B008, frozen
) -> Record[HealResult] | None:
    """Train a student back to its parent: distillation, further pretraining, any stages in a row.

    One process, or any number of GPUs under torchrun. The new folder is a student like the one that came in, with the
    weights of the best check-up; a killed run goes on where it stopped, also on another number of ranks.

    Parameters
    ----------
    parent
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    student
        A folder that `fuse` or `heal` made of it.
    out
        New student folder.
    stages
        quick, paper, local-first, cpt, long-context, or a YAML file of stages (docs/formats.md).
    scale
        Times as many tokens as the recipe says.
    length
        Context of the first stage; later ones keep their ratio to it.
    text
        Text to train on in place of the recipe's, as for the other verbs, FILE=SHARE for a mix; again for each.
    column
        Column of JSONL, parquet and Hub datasets, of text or of chats; where there is no "text", "messages" is read.
    seed
        Seed of the order of text.
    teacher
        Answers that `teach` left, in place of the live parent; their windows are then the text, and the parent is in
        memory only to answer on the domains once.
    domain
        A held-out domain, NAME=TEXT, in place of the recipe's; again for each.
    domain_windows
        Windows of each domain.
    domain_length
        Tokens in such a window.
    check_ups
        How often in each stage the domains are measured, evenly spread.
    save_minutes
        Minutes between checkpoints, at most what a killed run loses; each check-up makes one too.
    patience
        Stop when a domain got worse at so many check-ups in a row while the loss fell; 0 never stops.
    compile
        Compile blocks and losses; by default on GPUs.
    gradient_checkpointing
        Keep no activations within blocks but compute them again: less memory, a third more work.
    """
    source, target = resolve_model(parent), resolve_model(student)
    recipe = read_recipe(stages).scaled(scale, length)
    if text:
        recipe = recipe.reading([_source(each, column) for each in text])
    if domain:
        recipe = replace(recipe, domains=dict(_domain(each) for each in domain))
    tokenizer = _common_tokenizer(source, target, machine.trust_remote_code)
    pair = Pair(source, target, _plan(source, target))
    _check(pair, recipe)
    dtype = pick_training_dtype(machine, target.checkpoint)
    compiled = pick_device(machine).type == "cuda" if compile is None else compile
    habits = Habits(
        dtype, machine.batch_size, check_ups, save_minutes, patience, compiled, gradient_checkpointing, seed
    )
    cache = open_cache(teacher, source, machine.trust_remote_code) if teacher else None
    if cache:
        for stage in recipe.stages:
            check_cache(cache, stage, pair.objective(stage).asked)
    domains = read_domains(recipe.domains, tokenizer, domain_windows, domain_length, column)
    texts = {source.text for stage in recipe.stages for source in recipe.sources(stage)}
    inputs = {
        "parent": source.fingerprint,
        "student": target.fingerprint,
        "recipe": asdict(recipe),
        "text": {name: _state_of(name) for name in sorted(texts)},
        "teacher": fingerprint(teacher.glob("*")) if teacher else None,
        "domains": {each.name: each.digest for each in domains},
        "dtype": str(dtype),
        "seed": seed,
        "check_ups": check_ups,
        "patience": patience,
    }

    def work(folder: StageFolder, ranks: Ranks) -> tuple[HealResult, Environment]:
        course = Course(pair, recipe, habits, Material(tokenizer, domains, cache), folder, ranks)
        try:
            course.run()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the device's memory is full with {machine.batch_size} windows at once; lower --batch-size, give "
                "--gradient-checkpointing, or shorten --length; the same command goes on from the last checkpoint"
            ) from None
        progress, measure = course.progress, course.measure
        result = HealResult(
            parent=parent,
            student=student,
            plan=str(pair.plan),
            recipe=stages,
            ranks=ranks.size,
            measure=measure,
            stages=progress.stages,
            check_ups=progress.check_ups,
            curve=progress.curve,
            best=best_of(progress.check_ups, measure),
            stopped=progress.stopped,
            earlier_texts=[*texts_behind(target), *(cache.sources if cache else ())],
        )
        if ranks.is_first:
            finish(folder.path, target, result)
        return result, where(machine, dtype)

    with joined(machine) as ranks:
        return _together(ranks, out, inputs, work)


def _together(ranks: Ranks, out: Path, inputs: dict[str, Any], work: Any) -> Record[HealResult] | None:
    """The first rank keeps the stage's folder; the others follow it in, or learn that there is nothing to do."""
    if not ranks.is_first:
        path = ranks.tell(None)
        if path:
            work(StageFolder(Path(path)), ranks)
        return None
    told = False

    def lead(folder: StageFolder) -> tuple[HealResult, Environment]:
        nonlocal told
        told = bool(ranks.tell(str(folder.path)))
        found: tuple[HealResult, Environment] = work(folder, ranks)
        return found

    try:
        return run_stage("heal", out, inputs, HealResult, lead)
    finally:
        if not told:
            ranks.tell("")


def read_recipe(name: str) -> Curriculum:
    """A shipped recipe, or one in a file; `UserError` says what in it is wrong."""
    shipped = sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir() if path.name.endswith(".yaml"))
    if name not in shipped and not Path(name).is_file():
        raise UserError(f"no recipe {name!r}; there are {', '.join(shipped)}, or give a YAML file")
    text = (RECIPES / f"{name}.yaml" if name in shipped else Path(name)).read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
        return cattrs.Converter(forbid_extra_keys=True).structure(data, Curriculum)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except UserError:
        raise
    except Exception as error:
        reasons = "; ".join(cattrs.transform_error(error)) if isinstance(error, cattrs.BaseValidationError) else error
        raise UserError(f"{name} is no recipe: {reasons}") from None


def _source(text: str, column: str) -> Source:
    """TEXT or TEXT=SHARE."""
    name, _, share = text.rpartition("=")
    try:
        return Source(name, float(share), column) if name else Source(text, 1.0, column)
    except ValueError:
        return Source(text, 1.0, column)


def _domain(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise UserError(f"--domain {text}: expected NAME=TEXT")
    return name, source


def _state_of(text: str) -> str:
    """Changes when a local text does."""
    path = Path(text).expanduser()
    if not path.exists():
        return text
    return fingerprint(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _plan(parent: ModelFolder, student: ModelFolder) -> Plan:
    """How the student came of the parent; a model of the same shape without a plan is taken as the parent's own."""
    plan = student.made_by
    if plan:
        parent.check_plan(plan)
    elif student.shapes == parent.shapes:
        plan = parent.plan
    else:
        raise UserError(f"{student.folder} has no {PLAN_FILE}; heal a folder that `fuse` made")
    if len(plan.blocks) != student.num_layers:
        raise UserError(f"{student.folder} has {student.num_layers} blocks, its plan {len(plan.blocks)}")
    return plan


def _common_tokenizer(parent: ModelFolder, student: ModelFolder, trust: bool) -> PreTrainedTokenizerBase:
    if parent.config.vocab_size != student.config.vocab_size:
        raise UserError(
            f"the parent's vocabulary has {parent.config.vocab_size:,} entries, the student's "
            f"{student.config.vocab_size:,}; distillation needs the same tokens"
        )
    tokenizer = load_tokenizer(parent, trust)
    if tokenizer.get_vocab() != load_tokenizer(student, trust).get_vocab():
        raise UserError("parent and student have different tokenizers; distillation needs the same tokens")
    return tokenizer


def _check(pair: Pair, recipe: Curriculum) -> None:
    """`UserError` for stages that this pair cannot go through."""
    longest = pair.student.config.max_position_embeddings
    for stage in recipe.stages:
        longest = max(longest, stage.length if stage.rope else 0)
        if stage.length > longest:
            raise UserError(
                f"stage {stage.name}: windows of {stage.length:,} tokens are longer than the student's context of "
                f"{longest:,}; lower --length, or give the stage rope parameters"
            )
        if stage.trains != "all" and not pair.changed(stage):
            raise UserError(f"stage {stage.name} trains changed blocks, and the plan changed none")
    if not recipe.domains:
        raise UserError("a recipe needs held-out domains to be guarded by; name some with --domain NAME=TEXT")
    if not all(map(recipe.sources, recipe.stages)):
        raise UserError("a recipe needs text; name some with --text")
