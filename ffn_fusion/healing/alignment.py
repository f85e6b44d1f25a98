"""Instruction tuning and preference optimisation through TRL and PEFT (extra `align`), which nothing else imports.

Weights that train are float32 under bf16 autocast: steps of 1e-6 are lost where weights are bf16.
"""

import gc
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ffn_fusion.core.align_records import Course, StepLoss
from ffn_fusion.errors import UserError
from ffn_fusion.healing.examples import IGNORED, Example
from ffn_fusion.hf.model import quiet_transformers
from ffn_fusion.progress import track

WARM_UP = 0.05
CHECKPOINTS = "checkpoints"
SAVED, LOGGED = 0.1, 0.01
"""Shares of the steps after which a checkpoint is written and a loss is noted."""
PATIENCE = 24 * 3600
"""Seconds that other ranks wait for the first one, which scores the model alone."""


@dataclass(frozen=True)
class Trained:
    """Weights as they came out of training, by the names of the model, adapters merged, on the host."""

    weights: dict[str, Tensor]
    num_parameters: int
    losses: list[StepLoss]


@contextmanager
def _without_a_trace() -> Iterator[None]:
    """Around a call of a trainer: nothing is printed, and no memory stays taken."""
    with quiet_transformers(), warnings.catch_warnings():
        # Names that transformers 5.17 needs and 5.23 has others for.
        warnings.simplefilter("ignore", FutureWarning)
        yield
    # Trainer and optimizer refer to each other, and would hold the device's memory until somebody looked.
    gc.collect()


@_without_a_trace()
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    course: Course,
    state: Path,
) -> Trained:
    """Train a model in place, from the last whole checkpoint in `state` on if there is one.

    Under torchrun every rank calls this; the first one writes.
    """
    num_steps = course.num_steps(len(examples))
    config = _config(course, num_steps, state / CHECKPOINTS, cpu=model.device.type == "cpu")
    datasets.disable_progress_bars()
    with config.main_process_first(local=False):
        dataset = _on_disk(examples, state / "records")
    trainer_class: Any = {"sft": _Sft, "dpo": _Dpo}[course.method]
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[_Progress()],
        peft_config=_adapters(course.lora) if course.lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    num_parameters = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    trainer.train(resume_from_checkpoint=_last_checkpoint(state / CHECKPOINTS))
    trained = trainer.model
    if course.lora:
        # In float32, so that weight and update are added before they are rounded.
        trained = trained.float().merge_and_unload()
    losses = [StepLoss(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: weight.cpu() for name, weight in trained.state_dict().items()}
    return Trained(weights, num_parameters, losses)


def _config(course: Course, num_steps: int, checkpoints: Path, cpu: bool) -> SFTConfig | DPOConfig:
    shared: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": course.batch_size,
        "gradient_accumulation_steps": course.accumulate,
        "num_train_epochs": course.epochs,
        "learning_rate": course.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARM_UP,
        "gradient_checkpointing": course.gradient_checkpointing,
        "bf16": course.dtype == "bfloat16",
        "use_cpu": cpu,
        "max_length": None,
        "seed": course.seed,
        "save_steps": math.ceil(SAVED * num_steps),
        "save_total_limit": 1,
        "logging_steps": math.ceil(LOGGED * num_steps),
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "ddp_timeout": PATIENCE,
    }
    if course.method == "sft":
        config = SFTConfig(**shared)
    else:
        config = DPOConfig(**shared, beta=course.beta, precompute_ref_log_probs=True)
    if config.n_gpu > 1:
        # Of the GPUs that one process sees it uses the first: the trainer would spread the batch over all.
        config._n_gpu = 1
    return config


def _adapters(rank: int) -> LoraConfig:
    """Adapters on every linear layer but the head, whatever its width and the blocks' kinds."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _row(example: Example) -> dict[str, Any]:
    """A record in the columns that TRL's trainers make of theirs."""
    if len(example.answers) == 1:
        (answer,) = example.answers
        return {"input_ids": answer.ids, "labels": answer.labels}
    chosen, rejected = example.answers
    start = chosen.labels.count(IGNORED)
    return {"prompt_ids": chosen.ids[:start], "chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}


def _on_disk(examples: Sequence[Example], path: Path) -> Dataset:
    """The records as a dataset in a folder, where all ranks, and a run that goes on, find the reference's answers."""
    if not path.is_dir():
        partial = path.with_name(f".{path.name}.tmp")
        Dataset.from_list([_row(example) for example in examples]).save_to_disk(partial)
        partial.rename(path)
    return datasets.load_from_disk(path)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, which is the trainer's state."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


class _Progress(TrainerCallback):  # type: ignore[misc]
    """The project's progress bar in place of the trainer's."""

    def __init__(self) -> None:
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = state.max_steps - state.global_step
        if state.is_world_process_zero and left:
            self._bar = track(range(left), "align: steps", left)
            next(self._bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        next(self._bar, None)


class _Ours:
    """What both trainers do our way."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """Records come as token ids: what is trained on is what is scored."""
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not math.isfinite(float(loss)):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise UserError(f"the loss is {float(loss)} at step {step}; lower --learning-rate")
        return loss


class _Sft(_Ours, SFTTrainer):  # type: ignore[misc]
    pass


class _Dpo(_Ours, DPOTrainer):  # type: ignore[misc]
    pass
