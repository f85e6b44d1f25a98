"""The command line: parses, dispatches, prints results and errors; nothing else."""

import errno
import os
import sys
from typing import Any

from cyclopts import App, CycloptsError

from ffn_fusion.errors import UserError

VERBS = {
    "run": ("run", "The main job: turn a model into a fused one, all stages with one dial."),
    "analyze": ("analyze", "Score every sublayer and measure the pairwise dependency of blocks."),
    "score": ("score", "Score every variant of every layer, replaced alone in the parent."),
    "search": ("search", "Find a plan: which attentions to remove and which FFNs to fuse."),
    "bld": ("bld", "Blockwise local distillation: train variants of blocks on the parent's own activations."),
    "teach": ("teach", "Store a parent's answers on a text, for distillation; it can write the text itself."),
    "plan": ("plan", "Say what a plan holds, another tool's included, and write its plan.json."),
    "fuse": ("fuse", "Build the student of a plan."),
    "heal": ("heal", "Train a student back to its parent: distillation, further pretraining, on any number of GPUs."),
    "merge": ("merge", "Average students that were healed in different ways."),
    "align": ("align", "Tune a student to instructions or preferences, scored before and after."),
    "eval": ("evaluate", "Compare models with their parent: held-out text and benchmark tasks."),
    "bench": ("bench", "Time prefill and decode of a parent and its students, in torch, vLLM or llama.cpp."),
    "ffn": ("ffn", "Time FFNs in sequence against the same number fused."),
    "latency": ("latency", "Fit a latency model to benches, and predict what they did not measure."),
    "cost": ("cost", "Time every variant of a sublayer on this device, and check that the times add up."),
    "export": ("export", "Turn a student into what an engine loads, and try it there."),
    "serve": ("serve", "Start an engine's own server on a model."),
    "speculate": ("speculate", "Decode with a draft model: acceptance, speed, and whether the output is the same."),
    "report": ("report", "One self-contained HTML page from the records."),
    "generate": ("generate", "Ask a parent or a student something, or chat with it."),
}

app = App(
    name="ffn-fusion",
    help="Turn a causal language model into one with far fewer sequential steps.",
    suppress_keyboard_interrupt=False,
)
for _verb, (_function, _help) in VERBS.items():
    app.command(f"ffn_fusion.stages.{_function}:{_function}", name=_verb, help=_help)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit status 0, 2 for what the user can mend (one line on standard error), 130 for Ctrl-C."""
    sys.exit(_status(sys.argv[1:] if arguments is None else arguments))


def _status(arguments: list[str]) -> int:
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(" ".join(str(error).split()) + " See ffn-fusion --help.")
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(
            f"the disk is full ({error.filename or error.strerror}); free some space, the same command continues"
        )
    except Exception as error:
        # Known by where it comes from: importing its classes would make every command slower.
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        go_without = "it needs a C++ compiler, or go without: heal --no-compile, bench --compile off"
        return _fail(f"torch.compile failed: {reason}; {go_without}")
    _show(result)
    return 0


def _show(result: Any) -> None:
    record = getattr(result, "result", None)
    text = record.summary() if record is not None else result
    if text is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough (`| head`); Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"ffn-fusion: {message}", file=sys.stderr)
    return 2
