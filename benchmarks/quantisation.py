"""Do the gains of fusing and of quantising add up? Parent and student through the quantisers people use.

    python benchmarks/quantisation.py make OUT --student STUDENT [--compressor PYTHON] [--llama PYTHON]
    python benchmarks/quantisation.py quality OUT [--vllm PYTHON] [--compressor PYTHON] [--llama PYTHON]
    python benchmarks/quantisation.py speed OUT ...                     on a machine with nothing else to do
    python benchmarks/quantisation.py table OUT

PYTHONs have llm-compressor with torchao, vLLM, or llama-cpp-python. The parent is fused with the plan that changes
nothing, so that both go the same way. Every result is a file in OUT/records, and one that is there is not made again;
OUT/models can be deleted when all are. KL is to the parent in float32 in transformers, on the same held-out windows.
Engines obey OMP_NUM_THREADS. Where others work on the machine too, vLLM's threads wait for each other at length, unless
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffn_fusion import Fusion, Text, fuse
from ffn_fusion.core.engine_records import QUESTION
from ffn_fusion.core.losses import Reference, kl_to, nll, reference
from ffn_fusion.core.stats import Estimate, estimate
from ffn_fusion.folder import environment, write_atomically
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import Windows, read_windows

ENGINE = Path(__file__).with_name("quantisation_engine.py")
MODELS = ("parent", "student")
LENGTH, WINDOWS = 256, 8
CALIBRATION = Text(length=LENGTH)
CALIBRATION_WINDOWS = 64
PROMPT, NEW_TOKENS = 16, 64
QUIET = 0.05
"""Share of the cores that others may use while times are taken."""


@dataclass(frozen=True)
class Format:
    """A way to store weights: the engine that runs it, the plain format it is compared with, and who makes it."""

    name: str
    engine: str
    plain: str
    maker: str
    scheme: str = ""


FORMATS = {
    each.name: each
    for each in (
        Format("vllm-bf16", "vllm", "vllm-bf16", "none"),
        Format("fp8", "vllm", "vllm-bf16", "compressor", "FP8_DYNAMIC"),
        Format("w8a8", "vllm", "vllm-bf16", "compressor", "W8A8"),
        Format("w4a16", "vllm", "vllm-bf16", "compressor", "W4A16"),
        Format("w4a16-gptq", "vllm", "vllm-bf16", "compressor", "W4A16-gptq"),
        Format("bf16", "transformers", "bf16", "none"),
        Format("torchao-int8", "transformers", "bf16", "compressor", "torchao"),
        Format("gguf-f16", "llama.cpp", "gguf-f16", "gguf", "f16"),
        Format("gguf-q8_0", "llama.cpp", "gguf-f16", "gguf", "q8_0"),
        Format("gguf-q4_k_m", "llama.cpp", "gguf-f16", "gguf", "q4_k_m"),
    )
}


def python_of(engine: str, options: argparse.Namespace) -> str:
    pythons = {"vllm": options.vllm, "transformers": options.compressor, "llama.cpp": options.llama}
    return str(pythons[engine])


def model_folder(out: Path, model: str, form: Format) -> Path:
    return out / "models" / model / ("plain" if form.maker == "none" else form.name)


def save(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --- make ---------------------------------------------------------------------------------------------------------


def make(options: argparse.Namespace) -> None:
    out: Path = options.out
    plain = {model: out / "models" / model / "plain" for model in MODELS}
    parent = resolve_model(options.parent)
    fuse(options.parent, plan=str(parent.plan), out=plain["parent"], fusion=Fusion(calibrate="none"))
    plain["student"].parent.mkdir(exist_ok=True)
    if not plain["student"].exists():
        plain["student"].symlink_to(options.student.resolve())
    text = out / "calibration.json"
    ids = read_windows(CALIBRATION, load_tokenizer(parent), CALIBRATION_WINDOWS, "fit").ids
    save(text, ids.tolist())
    for model in MODELS:
        for form in chosen(options):
            folder = model_folder(out, model, form)
            if not folder.exists():
                print(f"make: {model} as {form.name}", flush=True)
                make_one(plain[model], folder, form, text, options)


def make_one(source: Path, folder: Path, form: Format, text: Path, options: argparse.Namespace) -> None:
    """Quantise into a hidden folder and rename it: a folder that is there is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    if form.maker == "compressor":
        command = [options.compressor, str(ENGINE), "make", form.scheme, str(source), str(partial), str(text)]
        checked(command, options.out / "logs" / f"make-{source.parent.name}-{form.name}.log", {})
        partial.rename(folder)
        return
    command = [sys.executable, "-m", "ffn_fusion", "export", str(source), "--to", "gguf", "--dtype", form.scheme]
    programs = quantiser(options.out / "programs", options.llama)
    paths = {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
    log = options.out / "logs" / f"make-{source.parent.name}-{form.name}.log"
    checked([*command, "--out", str(folder)], log, paths)


def quantiser(folder: Path, python: str) -> Path:
    """A folder with a `llama-quantize` that is llama-cpp-python's, where the exporting Python lacks it."""
    code = (
        "import sys, ctypes, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
        "p.ftype = getattr(l, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3]); "
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
    )
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "llama-quantize"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} -c {shlex.quote(code)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return folder


def checked(command: Sequence[str], log: Path, variables: dict[str, str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, env=os.environ | variables)


# --- a model in its engine ----------------------------------------------------------------------------------------


class EngineError(Exception):
    """An engine that would not start or answer; the message is the last error line of its log."""


class Worker:
    """A model in its engine, in a process of its own that answers one request at a time."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.version = self.answer()["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            lines = [line.strip() for line in self.log.read_text(errors="replace").split("\n")]
            errors = [line for line in lines if "Error" in line] or lines
            raise EngineError(errors[-1])
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def worker(options: argparse.Namespace, model: str, form: Format) -> Iterator[Worker]:
    log = options.out / "logs" / f"{model}-{form.name}.log"
    folder = model_folder(options.out, model, form)
    command = [python_of(form.engine, options), str(ENGINE), "run", form.engine, str(folder)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        yield Worker(process, log)
    finally:
        process.kill()
        process.communicate()


# --- quality ------------------------------------------------------------------------------------------------------


@cache
def tokenizer_of(parent: str) -> Any:
    return load_tokenizer(resolve_model(parent))


@cache
def held_out(parent: str) -> Windows:
    return read_windows(Text(text=("builtin:novels",), length=LENGTH), tokenizer_of(parent), WINDOWS)


@cache
def references(parent: str) -> list[Reference]:
    """What the parent in float32 predicts for each window."""
    model = resolve_model(parent).load(torch.float32, "cpu")
    with torch.no_grad():
        return [reference(model(input_ids=ids[None], use_cache=False).logits[0, :-1]) for ids in held_out(parent).ids]


def quality(options: argparse.Namespace) -> None:
    for form in chosen(options):
        for model in MODELS:
            path = options.out / "records" / "quality" / f"{model}-{form.name}.json"
            folder = model_folder(options.out, model, form)
            if path.is_file() or not folder.exists():
                continue
            try:
                with worker(options, model, form) as loaded:
                    record = measured(loaded, options)
            except EngineError as error:
                record = {"error": str(error)}
            size = sum(file.stat().st_size for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}"))
            about = {"model": model, "format": form.name, "engine": form.engine, "weight_bytes": size}
            save(path, about | record)
            print(f"quality: {model} as {form.name}: {record.get('error') or record['answer']}", flush=True)


def measured(loaded: Worker, options: argparse.Namespace) -> dict[str, Any]:
    """Sums of each window, and the answer to a question."""
    windows, tokenizer = held_out(options.parent), tokenizer_of(options.parent)
    kls, nlls = [], []
    rows = options.out / "logits.npy"
    for ids, ref in zip(windows.ids, references(options.parent), strict=True):
        loaded.ask(do="score", ids=ids.tolist(), to=str(rows))
        logits = torch.from_numpy(np.load(rows))[:, : ref.probabilities.shape[1]]
        kls.append(float(kl_to(ref, logits).sum()))
        nlls.append(float(nll(logits, ids[1:]).sum()))
    rows.unlink()
    question = [{"role": "user", "content": QUESTION}]
    prompt = list(tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"])
    tokens = loaded.ask(do="decode", prompt=prompt, new_tokens=24)["tokens"]
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return {
        "version": loaded.version,
        "text": asdict(windows.sample),
        "environment": asdict(environment("cpu", "see format")),
        "kl_sums": kls,
        "nll_sums": nlls,
        "answer": tokenizer.decode(tokens[:end]).strip(),
    }


# --- speed --------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Parent and student, plain and quantised, four processes that take turns."""
    for form in chosen(options):
        path = options.out / "records" / "speed" / f"{form.name}.json"
        if form.name == form.plain or path.is_file():
            continue
        keys = [(model, each) for each in (FORMATS[form.plain], form) for model in MODELS]
        try:
            with ExitStack() as stack:
                workers = {
                    f"{model}-{each.name}": stack.enter_context(worker(options, model, each)) for model, each in keys
                }
                record = timed(workers, options)
        except EngineError as error:
            record = {"error": str(error)}
        save(path, {"format": form.name, "engine": form.engine} | record)
        print(f"speed: {form.name}: others used {record.get('others', 0):.0%} of the cores", flush=True)


def timed(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each repeat, after one untimed, and what other processes used of the machine meanwhile."""
    prompt = held_out(options.parent).ids[0, :PROMPT].tolist()
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for repeat in range(options.repeats + 1):
        if repeat == 1:
            started, before = time.perf_counter(), others(workers)
        for name, loaded in workers.items():
            took = loaded.ask(do="decode", prompt=prompt, new_tokens=NEW_TOKENS)["seconds"]
            seconds[name] += [took] if repeat else []
    elapsed = time.perf_counter() - started
    return {
        "version": next(iter(workers.values())).version,
        "environment": asdict(environment("cpu", "see format")),
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "VLLM_CPU_"))},
        "seconds": seconds,
        "others": (others(workers) - before) / elapsed / (os.cpu_count() or 1),
    }


def others(workers: dict[str, Worker]) -> float:
    """Core seconds that all processes but the workers have used since the machine started (Linux)."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    own = 0
    for loaded in workers.values():
        fields = Path(f"/proc/{loaded.process.pid}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    return (user + nice + system + irq + softirq - own) / ticks


# --- table --------------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> None:
    records = options.out / "records"
    found = {
        (model, form.name): record
        for form in FORMATS.values()
        for model in MODELS
        if (record := read(records / "quality" / f"{model}-{form.name}.json"))
    }
    print("\n".join([*quality_rows(found), "", *kl_rows(found), "", *speed_rows(records / "speed")]))


def quality_rows(found: dict[tuple[str, str], Any]) -> Iterator[str]:
    yield "| format | parent: MB | KL | perplexity | says Paris | student: MB | KL | perplexity | says Paris |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for form in FORMATS.values():
        cells = [cell for model in MODELS for cell in quality_cells(found.get((model, form.name)))]
        if any(cells):
            yield f"| {form.name}, {form.engine} | {' | '.join(cells)} |"


def quality_cells(record: Any) -> list[str]:
    if record is None or "error" in record:
        return ["", record["error"] if record else "", "", ""]
    size, perplexity = record["weight_bytes"] / 1e6, exp(per_token(record["nll_sums"]).mean)
    paris = "yes" if "Paris" in record["answer"] else "no"
    return [f"{size:.1f}", str(per_token(record["kl_sums"])), f"{perplexity:.1f}", paris]


def per_token(sums: Sequence[float]) -> Estimate:
    return estimate(sums, [LENGTH - 1] * len(sums))


def kl_rows(found: dict[tuple[str, str], Any]) -> Iterator[str]:
    """What quantising costs parent and student, and the joint KL against the sum of the two; paired by window."""
    yield "| format | KL of fusing | KL of quantising | their sum | KL of both | both - sum |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for form in FORMATS.values():
        keys = (("student", form.plain), ("parent", form.name), ("student", form.name))
        three = [found.get(key) for key in keys]
        if form.name == form.plain or any(record is None or "error" in record for record in three):
            continue
        fused, quantised, both = (np.array(record["kl_sums"]) for record in three if record)
        cells = [fused, quantised, fused + quantised, both, both - fused - quantised]
        yield f"| {form.name} | {' | '.join(str(per_token(cell.tolist())) for cell in cells)} |"


def speed_rows(folder: Path) -> Iterator[str]:
    yield (
        "| format | tokens/s: parent plain | student plain | parent quantised | student quantised "
        "| fused x quantised | both | both / product, range | others |"
    )
    yield f"| {' | '.join(['---'] * 9)} |"
    for form in FORMATS.values():
        record = read(folder / f"{form.name}.json")
        if record and "error" in record:
            yield f"| {form.name} | {record['error']} | | | | | | | |"
        elif record:
            yield f"| {form.name} | {' | '.join(speed_cells(record))} |"


def speed_cells(record: Any) -> list[str]:
    seconds = [np.array(values) for values in record["seconds"].values()]
    rates = [f"{record['new_tokens'] / statistics.median(values):.1f}" for values in seconds]
    parent, student, parent_quantised, student_quantised = seconds
    # Ratios within a round: what slowed the machine down slowed all four.
    product = parent / student * (parent / parent_quantised)
    joint = parent / student_quantised
    share = joint / product
    spread = f"{np.median(share):.2f} ({share.min():.2f} to {share.max():.2f})"
    noise = f"{record['others']:.0%}" + ("" if record["others"] < QUIET else ", under load")
    factors = f"{np.median(parent / student):.2f} x {np.median(parent / parent_quantised):.2f}"
    return [*rates, f"{factors} = {np.median(product):.2f}", f"{np.median(joint):.2f}", spread, noise]


# --- command line -------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[Format]:
    return [FORMATS[name] for name in options.formats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"make": make, "quality": quality, "speed": speed, "table": table}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parent", default="builtin:smollm2-135m")
    parser.add_argument("--student", type=Path, help="folder that fuse made (make)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--compressor", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--llama", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (speed)")
    options = parser.parse_args()
    if options.verb == "make" and not options.student:
        parser.error("make needs --student")
    verbs[options.verb](options)


if __name__ == "__main__":
    main()
