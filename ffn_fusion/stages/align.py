"""`align`: instruction tuning and preference optimisation: model and chat or preference files → model folder."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import torch
from cyclopts import Parameter
from cyclopts.validators import Number
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.align_records import AlignResult, Course, Method, Records, Sums, scores
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, Environment, Record, StageFolder, run_stage, state_of
from ffn_fusion.healing.answers import log_probability
from ffn_fusion.healing.examples import Example, digest, read_examples, split
from ffn_fusion.healing.tuned import write_card, write_tuned
from ffn_fusion.hf.machine import device_map, pick_device, pick_training_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine, TwoOrMore
from ffn_fusion.settings_training import Tuning

if TYPE_CHECKING:
    from ffn_fusion.healing.alignment import Trained

LENGTH = 1024
LEARNING_RATES = {"sft": (2e-5, 2e-4), "dpo": (1e-6, 1e-5)}
"""Of all weights, and of adapters, which start from nothing."""


def align(
    model: str,
    *,
    method: Method,
    data: tuple[Path, ...],
    out: Path,
    hold_out: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.1,
    length: TwoOrMore | None = None,
    seed: int = 0,
    tuning: Tuning = Tuning(),  # noqa: B008, frozen
    machine: Machine = Machine(),  # noqa: B008
) -> Record[AlignResult] | None:
    """Tune a student to instructions (sft) or to preferences (dpo), and score it before and after on held-out records.

    The result is a folder like the student's own. Under torchrun, every process trains on a share of each step.

    Parameters
    ----------
    model
        Student or any other model: folder, GGUF file, Hub id or builtin:smollm2-135m.
    method
        sft for chat files, dpo for preference files.
    data
        JSONL or parquet files, whose records have messages, or prompt and completion (sft), or prompt, chosen and
        rejected (dpo); give the option again for each.
    out
        New model folder.
    hold_out
        Share of the prompts that is never trained on.
    length
        Longest record, in tokens; longer ones are left out and counted. Without it, 1,024 or the model's context.
    seed
        Seed that chooses the held-out records, the order of the others, and adapters.
    """
    source = resolve_model(model)
    dtype = pick_training_dtype(machine, source.checkpoint)
    context = int(source.config.max_position_embeddings)
    length = length or min(LENGTH, context)
    if length > context:
        raise UserError(f"--length {length:,} is longer than the model's context of {context:,} tokens")
    _check_device(machine)
    machine = _own_device(machine)
    tokenizer = load_tokenizer(source, machine.trust_remote_code)
    found = read_examples(data, method, tokenizer)
    fitting = [example for example in found if example.length <= length]
    if len(fitting) < len(found):
        print(
            f"align: {len(found) - len(fitting):,} of {len(found):,} records are longer than --length {length:,} "
            "and left out",
            file=sys.stderr,
        )
    if not fitting:
        raise UserError(f"all {len(found):,} records are longer than --length {length:,}")
    trained_on, held_out = split(fitting, hold_out, seed)
    course = Course(
        method=method,
        lora=tuning.lora,
        epochs=tuning.epochs,
        learning_rate=tuning.learning_rate or LEARNING_RATES[method][bool(tuning.lora)],
        beta=tuning.beta,
        batch_size=machine.batch_size,
        accumulate=tuning.accumulate,
        ranks=int(os.environ.get("WORLD_SIZE", 1)),
        gradient_checkpointing=tuning.gradient_checkpointing,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
    )
    records = Records(
        sources=list(map(str, data)),
        num_trained=len(trained_on),
        num_held_out=len(held_out),
        num_too_long=len(found) - len(fitting),
        num_tokens=sum(answer.num_learnt for example in trained_on for answer in example.answers),
        length=length,
        digest=digest([*trained_on, *held_out]),
    )
    inputs = {"model": source.fingerprint, "seed": seed, "course": asdict(course), "hold_out": hold_out}
    inputs |= {"records": records.digest}
    job = _Job(source, tokenizer, course, dtype, machine)
    alignment = _alignment()
    if int(os.environ.get("RANK", 0)):
        if not (out / RECORD).is_file():
            job.train(alignment, trained_on, state_of(out))
        return None

    def work(folder: StageFolder) -> tuple[AlignResult, Environment]:
        before = folder.remember("before", list[list[float]], lambda: job.score(source, held_out, "before"))
        if not tuning.lora and not (folder.state / alignment.CHECKPOINTS).is_dir():
            _check_disk(source, folder.path)
        trained = job.train(alignment, trained_on, folder.state)
        # A head that is tied to the embeddings is not stored.
        stored = ((name, trained.weights[name]) for name in source.checkpoint.specs)
        write_tuned(source, stored, folder.path)
        write_card(source, _told(course, records), folder.path)
        trained.weights.clear()  # the model is loaded again below, as it is stored
        after = job.score(ModelFolder(folder.path), held_out, "after")
        counts = [[answer.num_learnt for answer in example.answers] for example in held_out]
        result = AlignResult(
            model=model,
            course=course,
            records=records,
            trained_parameters=trained.num_parameters,
            losses=trained.losses,
            scores=scores(before, after, counts),
            texts=[*texts_behind(source), *records.sources],
        )
        here = where(machine, dtype)
        return result, replace(here, versions=here.versions | {name: version(name) for name in ("trl", "peft")})

    return run_stage("align", out, inputs, AlignResult, work)


@dataclass(frozen=True)
class _Job:
    """A model, and how it is trained and scored."""

    source: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    course: Course
    dtype: torch.dtype
    machine: Machine

    def train(self, alignment: ModuleType, examples: Sequence[Example], state: Path) -> "Trained":
        """Train on all ranks, from the last checkpoint in `state` on."""
        # What trains is float32; under adapters the weights are frozen, and stay as they are stored.
        model = self.source.load(self.dtype if self.course.lora else torch.float32, device_map(self.machine))
        with _explained():
            trained: Trained = alignment.train(model, self.tokenizer, examples, self.course, state)
        return trained

    def score(self, model: ModelFolder, examples: Sequence[Example], when: str) -> Sums:
        """Log-probability of each answer of each example, in the arithmetic and with the weights that a user gets."""
        loaded = model.load(self.dtype, device_map(self.machine))
        with _explained():
            return [
                [log_probability(loaded, answer) for answer in example.answers]
                for example in track(examples, f"align: held-out records, {when}", len(examples))
            ]


def _check_device(machine: Machine) -> None:
    if pick_device(machine).index not in (None, 0):
        raise UserError("align trains on the first GPU that it sees; choose it with CUDA_VISIBLE_DEVICES")


def _check_disk(source: ModelFolder, path: Path) -> None:
    """Room for the folder and for two checkpoints, weights and two moments in float32: the newer is written first."""
    specs = source.checkpoint.specs.values()
    needed = sum(spec.num_bytes + 2 * 12 * torch.Size(spec.shape).numel() for spec in specs)
    free = shutil.disk_usage(path).free
    if needed > free:
        raise UserError(
            f"{path.parent} has {free / 1e9:.1f} GB free; checkpoints and the result need {needed / 1e9:.1f} GB "
            "(far less with --lora)"
        )


def _own_device(machine: Machine) -> Machine:
    """Under torchrun, each process its own GPU."""
    if "LOCAL_RANK" not in os.environ or pick_device(machine).type == "cpu":
        return machine
    return replace(machine, device=f"cuda:{os.environ['LOCAL_RANK']}")


def _alignment() -> ModuleType:
    try:
        from ffn_fusion.healing import alignment  # an extra, and slow to import
    except ImportError as error:
        raise UserError(f"align needs {error.name}: pip install 'ffn-fusion[align]'") from None
    return alignment


@contextmanager
def _explained() -> Iterator[None]:
    """A device out of memory, in terms of the options."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU is out of memory; lower --batch-size (and raise --accumulate) or --length, "
            "or use --gradient-checkpointing or --lora"
        ) from None


def _told(course: Course, records: Records) -> str:
    """Section of the model card."""
    how = f"adapters of rank {course.lora} on every linear layer, merged" if course.lora else "all weights trained"
    name = {"sft": "Instruction tuning", "dpo": "Direct preference optimisation"}[course.method]
    files = ", ".join(Path(source).name for source in records.sources)
    return f"""## Alignment

{name} on {records.num_trained:,} records of {files}; {how}. `record.json` is that of this step: held-out scores before
and after.
"""
