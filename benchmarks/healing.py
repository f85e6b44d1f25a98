"""Tokens a second and peak memory of `heal`'s loop against others, on the same pair, batch and device.

python3 benchmarks/healing.py PARENT STUDENT [--windows 16] [--length 1024] [--steps 10] [--batch-size 16]

The plain loop is what one would write first: both models from transformers, float32 weights under bf16 autocast, whole
logits in float32, `kl_div`, AdamW. Where TRL is installed its GKD trainer runs too, on given text (lmbda 0) with the
forward KL (beta 0). Rounds of all take turns, so that drift of the machine hits all alike.
"""

import argparse
import gc
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.core.distill import Losses
from ffn_fusion.healing.corpus import Corpus
from ffn_fusion.healing.feeds import LiveFeed, head_of, spans
from ffn_fusion.healing.loop import Objective, Training
from ffn_fusion.healing.ranks import joined
from ffn_fusion.healing.sharded import Form, load
from ffn_fusion.hf.model import PLAN_FILE
from ffn_fusion.hf.resolve import read_plan, resolve_model
from ffn_fusion.settings import Machine

WARM_UP, ROUNDS = 3, 5
Loop = Callable[[int], float]
"""Makes so many optimizer steps and returns the seconds that one took."""


def ours(arguments: argparse.Namespace, ids: np.ndarray, compiled: bool) -> Loop:
    parent, student = resolve_model(arguments.parent), resolve_model(arguments.student)
    losses = Losses(kl=1.0)
    objective = Objective(losses, spans(read_plan(str(student.folder / PLAN_FILE), parent)), None, compiled)
    tokens = arguments.windows * arguments.length
    stage = TrainingStage("timed", tokens, arguments.length, tokens, 1e-5, losses, schedule="constant")
    head = head_of(parent, arguments.ranks.device, torch.bfloat16)
    teacher = load(parent, parent.config, Form(torch.bfloat16, compiled), arguments.ranks)
    pupil = load(student, student.config, Form(torch.bfloat16, compiled, trains=lambda _: True), arguments.ranks)
    corpus = Corpus(ids, np.arange(len(ids)), [])
    feed = LiveFeed(corpus, losses, objective.asked, teacher, head, arguments.ranks.device)
    training = Training(pupil, stage, objective, feed, arguments.ranks, arguments.batch_size)
    return timed(lambda: next(iter(training.run(0, [1]))), arguments.ranks.device)


def pair(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and pupil as transformers has them."""
    device = arguments.ranks.device
    parent, student = (str(resolve_model(name).folder) for name in (arguments.parent, arguments.student))
    teacher = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).to(device)
    pupil = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, trust_remote_code=True).to(device)
    return teacher, pupil


def plain(arguments: argparse.Namespace, ids: np.ndarray, _: bool) -> Loop:
    device = arguments.ranks.device
    teacher, pupil = pair(arguments)
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=1e-5)
    batches = torch.from_numpy(ids.astype(np.int64)).split(arguments.batch_size)

    def step() -> None:
        for batch in batches:
            batch = batch.to(device)
            with torch.no_grad():
                wanted = teacher(batch).logits.float().log_softmax(-1)
            with torch.autocast(device.type, torch.bfloat16):
                logits = pupil(batch).logits
            loss = kl_div(logits.float().log_softmax(-1), wanted, log_target=True, reduction="sum") / batch.numel()
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, device)


def gkd(arguments: argparse.Namespace, ids: np.ndarray, _: bool) -> Loop:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    device = arguments.ranks.device
    teacher, pupil = pair(arguments)
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            synchronize(device)
            moments.append(time.perf_counter())

    def batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        read = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": read, "attention_mask": torch.ones_like(read), "labels": read}

    size = min(arguments.batch_size, arguments.windows)
    config = GKDConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=arguments.windows // size,
        max_steps=1,
        learning_rate=1e-5,
        bf16=True,
        lmbda=0.0,
        beta=0.0,
        gradient_checkpointing=False,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.parent).folder)
    text = Dataset.from_dict({"input_ids": ids.astype(np.int64).tolist()})
    trainer = GKDTrainer(
        pupil, teacher, config, data_collator=batch, train_dataset=text, processing_class=tokenizer, callbacks=[Clock()]
    )

    def run(steps: int) -> float:
        # Its own loop, from the end of the first step, in which it sets itself up.
        trainer.args.max_steps = steps + 1
        moments.clear()
        trainer.train()
        return (moments[-1] - moments[0]) / steps

    return run


def timed(step: Callable[[], object], device: torch.device) -> Loop:
    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parent")
    parser.add_argument("student")
    for name, value in (("windows", 16), ("length", 1024), ("steps", 10), ("batch-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with joined(Machine()) as ranks:
        arguments.ranks = ranks
        vocab_size = resolve_model(arguments.parent).config.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab_size, (arguments.windows, arguments.length), dtype=np.uint32)
        on_gpu = ranks.device.type == "cuda"
        makers = {"plain": (plain, False), "heal, eager": (ours, False)}
        makers |= {"heal, compiled": (ours, True)} if on_gpu else {}
        makers |= {"TRL GKD": (gkd, False)} if importlib.util.find_spec("trl") else {}
        times: dict[str, list[float]] = {name: [] for name in makers}
        memory: dict[str, float | None] = {}
        for name, (make, compiled) in makers.items():
            # Each alone in memory for its peak, and then again in turns for its time.
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loop = make(arguments, ids, compiled)
            loop(WARM_UP)
            memory[name] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
            del loop
        loops = {name: make(arguments, ids, compiled) for name, (make, compiled) in makers.items()}
        for loop in loops.values():
            loop(1)
        for _ in range(ROUNDS):
            for name, loop in loops.items():
                times[name].append(loop(arguments.steps))
        tokens = arguments.windows * arguments.length
        rows = [
            {
                "loop": name,
                "tokens_per_second": tokens / median(times[name]),
                "spread": [tokens / max(times[name]), tokens / min(times[name])],
                "times_plain": median(times["plain"]) / median(times[name]),
                "peak_memory_gb": memory[name],
            }
            for name in makers
        ]
        device = torch.cuda.get_device_name() if on_gpu else "CPU"
        result = {"device": device, "torch": torch.__version__, "tokens_a_step": tokens, "rows": rows}
        text = json.dumps(result | {"length": arguments.length, "batch_size": arguments.batch_size}, indent=1)
        print(text)
        if arguments.out:
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
