"""Runs a program that a language model wrote: in a process of its own, fenced in by the kernel, for a limited time.

The program may compute, start threads and read files. It cannot open a socket, start a process, signal one, or change
any file, whoever runs it; memory, processor time and open files are limited. The fence is in `sandbox_child.py`.

What is not defended against: a program that means to pass its own tests. It shares an interpreter with the code that
reports for it, so it can look for the nonce in the frames above its own. The nonce keeps out accidents: `sys.exit(0)`,
stray writes, code after which no test ran. Nor is reading limited, so a reason may quote a file of the user's.
"""

import math
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.sandbox_child import MACHINES

CHILD = Path(__file__).with_name("sandbox_child.py")
LONGEST_REPORT = 4096
LONGEST_REASON = 200
TRIAL = """
import os
try:
    os.kill(os.getpid(), 0)
except PermissionError:
    pass
else:
    raise OSError("the filter has no effect")
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `reason` is one short line, empty if it passed."""

    passed: bool
    reason: str


@cache
def why_no_sandbox() -> str | None:
    """One line on why generated programs cannot be run here; None if they can, which a trial has shown."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return f"generated code runs only on Linux on {' or '.join(MACHINES)}, where the kernel can fence it in"
    trial = _run(TRIAL, 10.0, 1024)
    return None if trial.passed else f"the kernel does not fence in generated code here: {trial.reason}"


def run_program(source: str, seconds: float = 10.0, memory_mib: int = 1024) -> Outcome:
    """Run Python source with the standard library; it passes if it reaches its end without an exception.

    `seconds` is time that passes, the interpreter's start included; `memory_mib` is address space. Hashes of strings
    are the same in every run. Several threads may call this at once. Raises `UserError` where `why_no_sandbox`.
    """
    if reason := why_no_sandbox():
        raise UserError(reason)
    return _run(source, seconds, memory_mib)


def _run(source: str, seconds: float, memory_mib: int) -> Outcome:
    nonce = secrets.token_hex()
    deadline = time.monotonic() + seconds
    with _child(f"{nonce}\n{source}".encode(errors="surrogatepass"), seconds, memory_mib) as (process, pipe):
        report = _read_line(pipe, deadline)
        if report == f"{nonce} passed\n":
            return Outcome(True, "")
        if report.startswith(f"{nonce} failed "):
            return Outcome(False, _one_line(report.removeprefix(f"{nonce} failed ")))
        try:
            status = process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            status = -signal.SIGXCPU
    if status == -signal.SIGXCPU:
        return Outcome(False, f"took longer than {seconds:g} s")
    return Outcome(False, f"killed by signal {-status}" if status < 0 else "ended before its tests")


@contextmanager
def _child(job: bytes, seconds: float, memory_mib: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process at work and the pipe on which it reports; both are gone afterwards, and its folder too."""
    with tempfile.TemporaryDirectory(prefix="ffn-fusion-") as folder, tempfile.TemporaryFile() as stdin:
        # A file, not a pipe: the parent never waits for the child to read.
        stdin.write(job)
        stdin.seek(0)
        receive, send = os.pipe()
        # Not -I, which would ignore the seed; there is no other variable, and -P and -S keep other folders out.
        command = [sys.executable, "-P", "-S", "-B", str(CHILD), str(send), str(seconds), str(memory_mib)]
        with open(receive, "rb", buffering=0):
            try:
                process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"PYTHONHASHSEED": "0"},
                    pass_fds=[send],
                    start_new_session=True,
                )
            finally:
                os.close(send)
            try:
                yield process, receive
            finally:
                process.kill()  # all there is: it cannot have started another
                process.wait()


def _read_line(pipe: int, deadline: float) -> str:
    """What comes down a pipe until a line ends, the pipe closes, too much has come or the time is up."""
    poll = select.poll()  # not select(), which fails above descriptor 1023
    poll.register(pipe, select.POLLIN)
    text = b""
    while len(text) < LONGEST_REPORT and not text.endswith(b"\n"):
        left = math.ceil(1000 * (deadline - time.monotonic()))
        if left <= 0 or not poll.poll(left):
            break
        chunk = os.read(pipe, LONGEST_REPORT)
        if not chunk:
            break
        text += chunk
    return text.decode(errors="replace")


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which a terminal would obey."""
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    return " ".join(words)[:LONGEST_REASON]
