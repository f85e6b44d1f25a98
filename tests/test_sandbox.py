"""Generated programs: what passes, how failures read, and that each fenced-off act would work without the fence."""

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from ffn_fusion.errors import UserError
from ffn_fusion.tasks import sandbox, sandbox_child
from ffn_fusion.tasks.sandbox import Outcome, run_program, why_no_sandbox

pytestmark = pytest.mark.skipif(why_no_sandbox() is not None, reason=str(why_no_sandbox()))

SOCKET = {"x86_64": 41, "aarch64": 198}
# Each ends without an exception unless something stops it. FOLDER holds a file `kept` and an empty folder `empty`.
ACTS = {
    "socket": "import socket; socket.socket()",
    "socketpair": "import socket; socket.socketpair()",
    "socket by number": f"import ctypes; assert ctypes.CDLL(None).syscall({SOCKET}[os.uname().machine], 1, 1, 0) >= 0",
    "fork": "if os.fork() == 0: os._exit(0)",
    "system": "assert os.system('true') == 0",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "multiprocessing": "import multiprocessing as m; p = m.get_context('fork').Process(target=id); p.start(); p.join()",
    "signal": "os.kill(os.getppid(), 0)",
    "priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))",
    "parent's limits": "import resource as r; r.prlimit(os.getppid(), r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))",
    "signal by pipe": "import fcntl; fcntl.fcntl(os.pipe()[0], 10, 9)",
    "create": "open('new', 'w')",
    "create elsewhere": "open('FOLDER/new', 'x')",
    "create without writing": "os.open('FOLDER/new', os.O_RDONLY | os.O_CREAT)",
    "append": "open('FOLDER/kept', 'a')",
    "update": "open('FOLDER/kept', 'r+')",
    "empty by opening": "os.open('FOLDER/kept', os.O_RDONLY | os.O_TRUNC)",
    "truncate": "os.truncate('FOLDER/kept', 0)",
    "delete": "os.unlink('FOLDER/kept')",
    "rename": "os.rename('FOLDER/kept', 'FOLDER/new')",
    "link": "os.link('FOLDER/kept', 'FOLDER/new')",
    "symlink": "os.symlink('FOLDER/kept', 'FOLDER/new')",
    "mkdir": "os.mkdir('FOLDER/new')",
    "rmdir": "os.rmdir('FOLDER/empty')",
    "mkfifo": "os.mkfifo('FOLDER/new')",
    "chmod": "os.chmod('FOLDER/kept', 0o777)",
    "chown": "os.chown('FOLDER/kept', os.getuid(), os.getgid())",
    "utime": "os.utime('FOLDER/kept', (0, 0))",
    "nameless file": "os.memfd_create('new')",
}
# System calls that must stay shut, with their numbers on x86_64 and aarch64 (no such call: None).
SHUT = {
    "execve": (59, 221),
    "vfork": (58, None),
    "fork": (57, None),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "connect": (42, 203),
    "ioctl": (16, 29),
    "creat": (85, None),
    "unlinkat": (263, 35),
    "renameat2": (316, 276),
    "setxattr": (188, 5),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "prlimit64": (302, 261),
    "shmget": (29, 194),
    "mq_open": (240, 180),
    "openat2": (437, 437),
    "clone3": (435, 435),
    "fchmodat2": (452, 452),
    "read with x32 numbers": (1 << 30, None),
    "getpid with x32 numbers": ((1 << 30) + 39, None),
}


@pytest.fixture
def unfenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child without the one line that installs the filter."""
    lines = sandbox.CHILD.read_text(encoding="utf-8").splitlines()
    without = [line for line in lines if not line.strip().startswith("install(")]
    assert len(without) == len(lines) - 1
    child = tmp_path / "child.py"
    child.write_text("\n".join(without), encoding="utf-8")
    monkeypatch.setattr(sandbox, "CHILD", child)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "empty").mkdir(parents=True)
    (path / "kept").write_text("text", encoding="utf-8")
    return path


def snapshot(folder: Path) -> list[tuple[str, int, int, int]]:
    entries = [(path, path.lstat()) for path in sorted(folder.iterdir())]
    return [(path.name, stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in entries]


def children(pid: int | str = "self") -> set[str]:
    return {child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def act(name: str, folder: Path) -> Outcome:
    return run_program("import os\n" + ACTS[name].replace("FOLDER", str(folder)))


@pytest.mark.parametrize("name", ACTS)
def test_the_fence_stops(name: str, folder: Path) -> None:
    before = snapshot(folder)
    outcome = act(name, folder)
    assert not outcome.passed
    assert re.match("PermissionError|AssertionError" if "assert" in ACTS[name] else "PermissionError", outcome.reason)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.usefixtures("unfenced")
def test_without_the_fence_it_would_work(name: str, folder: Path) -> None:
    assert act(name, folder) == Outcome(True, "")


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    return x + 1\n\nassert f(1) == 2",
        "import threading\nthreads = [threading.Thread(target=print) for _ in range(20)]\n"
        "for t in threads:\n    t.start()\nfor t in threads:\n    t.join()",
        "from concurrent.futures import ThreadPoolExecutor as E\nassert list(E(3).map(abs, [-1, -2])) == [1, 2]",
        "import os\nfor _ in range(1000):\n    os.write(1, b'x' * 65536)",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\nassert P(1).x == 1",
        "import collections, datetime, hashlib, heapq, itertools, math, random, re, statistics, string, time, typing\n"
        "hashlib.sha256(b'').hexdigest(), datetime.datetime.now(), random.random(), time.sleep(0.01)",
        "text = 'é'\nassert len(text) == 1",
        "import threading\nthreading.Thread(target=threading.Event().wait).start()",
        "if __name__ == '__main__':\n    raise SystemExit",
        "import builtins, os\nprint = builtins.len = os.write = os._exit = None",
        "import os, sys\nassert sys.stdin.read() == '' and os.lseek(0, 0, 0) == 0 and os.read(0, 9) == b''",
    ],
)
def test_a_right_program_passes(source: str) -> None:
    with at_most(5):
        assert run_program(source) == Outcome(True, "")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 + 1 == 3, 'two'", "AssertionError: two"),
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("f()", "NameError: name 'f' is not defined"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise SystemExit(0)", "ended before its tests"),
        ("import os; os._exit(0)", "ended before its tests"),
        ("import os; os.closerange(0, 4096)", "ended before its tests"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import catalog", "ModuleNotFoundError: No module named 'catalog'"),
        ("raise Exception('one\\n\\x1b[2Jtwo')", "Exception: one [2Jtwo"),
        ("raise Exception('x' * 10**6)", "Exception: " + "x" * (sandbox.LONGEST_REASON - 11)),
        ("raise Exception('\\ud800')", "Exception: \\ud800"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
        ("raise type('', (Exception,), {})", ""),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("'\ud800'", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 1"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: [Errno 1] Operation not permitted"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_failure_has_its_reason(source: str, reason: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) <= sandbox.LONGEST_REASON


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import os, time\nos.closerange(0, 4096)\ntime.sleep(100)",
        "import os\nfd = next(fd for fd in range(3, 4096) if os.path.exists(f'/proc/self/fd/{fd}'))\n"
        "while True: os.write(fd, b'x' * 4096)",
        "import threading\nfor _ in range(3): threading.Thread(target=exec, args=('while True: pass',)).start()\n"
        "while True: pass",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
    ],
)
def test_time_is_limited(source: str) -> None:
    with at_most(2.5):
        assert run_program(source, seconds=1) == Outcome(False, "took longer than 1 s")


def test_memory_is_limited() -> None:
    assert run_program("x = bytearray(300 << 20)", memory_mib=512).passed
    limited = Outcome(False, "used more than 256 MiB")
    assert run_program("x = bytearray(300 << 20)", memory_mib=256) == limited
    assert run_program("x = []\nwhile True: x.append([])", memory_mib=256) == limited


def test_a_report_cannot_be_written_by_accident() -> None:
    for text in ("passed\\n", "\\n", "x" * 10000 + "\\n"):
        source = f"import os\nfor fd in range(3, 4096):\n    try: os.write(fd, b'{text}')\n    except OSError: pass\n"
        assert not run_program(f"{source}os._exit(0)").passed


def test_a_flooded_pipe_is_not_read_to_its_end() -> None:
    receive, send = os.pipe()
    with open(receive, "rb"), open(send, "wb", buffering=0) as flood, at_most(2):
        flood.write(b"x" * 3 * sandbox.LONGEST_REPORT)
        assert len(sandbox._read_line(receive, time.monotonic() + 5)) < 2 * sandbox.LONGEST_REPORT


def test_files_can_be_read_and_stay(folder: Path) -> None:
    assert run_program(f"import os\nassert open('{folder}/kept').read() == 'text' and not os.listdir()").passed
    assert not run_program(f"import shutil; shutil.rmtree('{folder}')").passed
    assert (folder / "kept").exists()


def test_strings_hash_alike_in_every_run() -> None:
    assert run_program("raise Exception(hash('a'))") == run_program("raise Exception(hash('a'))")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors, processes = len(os.listdir("/proc/self/fd")), children()
    for source in (
        "",
        "assert False",
        "import os; os._exit(0)",
        "while True: pass",
        "import os; os.closerange(0, 4096)",
    ):
        run_program(source, seconds=0.5)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert children() == processes
        assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_the_program() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, old = children(), signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with at_most(5), pytest.raises(KeyboardInterrupt):
            run_program("while True: pass", seconds=60)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert children() == before


def test_the_program_ends_with_its_parent(tmp_path: Path) -> None:
    code = "from ffn_fusion.tasks import sandbox; sandbox._run('while True: pass', 60, 1024)"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as parent:
        deadline = time.monotonic() + 30
        fenced: list[Path] = []
        while not fenced and time.monotonic() < deadline:
            time.sleep(0.05)
            found = [Path(f"/proc/{child}") for child in children(parent.pid)]
            fenced = [child for child in found if "Seccomp:\t2" in (child / "status").read_text()]
        parent.kill()
    assert fenced
    while fenced[0].exists() and "State:\tZ" not in (fenced[0] / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_at_once() -> None:
    sources = [f"assert {i} % 3, {i}" for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(run_program, sources))
    assert outcomes == [Outcome(True, "") if i % 3 else Outcome(False, f"AssertionError: {i}") for i in range(24)]


def test_elsewhere_it_says_why_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    why_no_sandbox.cache_clear()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    try:
        with pytest.raises(UserError, match="only on Linux on x86_64 or aarch64"):
            run_program("")
    finally:
        why_no_sandbox.cache_clear()


@pytest.mark.usefixtures("unfenced")
def test_a_fence_without_effect_is_noticed() -> None:
    why_no_sandbox.cache_clear()
    try:
        assert "the filter has no effect" in str(why_no_sandbox())
    finally:
        why_no_sandbox.cache_clear()


def verdict(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter says, by an interpreter of the instructions it uses."""
    program, at = sandbox_child.fence(machine), 0
    words = {0: number, 4: architecture or sandbox_child.MACHINES[machine][1]}
    words |= {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate((*arguments, 0, 0, 0)[:3])}
    tests = {0x15: int.__eq__, 0x25: int.__gt__, 0x35: int.__ge__, 0x45: lambda a, b: a & b != 0}
    value = 0
    while True:
        operation, if_true, if_false, constant = program[at]
        at += 1
        if operation == 0x06:
            return constant
        if operation == 0x20:
            value = words[constant]
        else:
            at += if_true if tests[operation](value, constant) else if_false


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


@pytest.mark.parametrize("machine", sandbox_child.MACHINES)
def test_the_filter_of_either_machine(machine: str) -> None:
    numbers = sandbox_child.call_numbers(machine)
    plain = [name for name in numbers if name not in sandbox_child.CONDITIONS]
    assert {verdict(machine, numbers[name]) for name in plain} == {ALLOW}
    assert verdict(machine, numbers["read"], architecture=0x40000003) == KILL
    for name, both in SHUT.items():
        number = both[sandbox_child.MACHINES[machine][0] - 1]
        if number is not None:
            assert verdict(machine, number) == (EPERM if number < 424 else ENOSYS), name
    for flags in range(1 << 12):
        harmless = flags & 0o1103 == 0
        assert verdict(machine, numbers["openat"], 0, 0, flags) == (ALLOW if harmless else EPERM)
    assert verdict(machine, numbers["clone"], 0x3D0F00) == ALLOW  # pthread_create of glibc
    assert verdict(machine, numbers["clone"], 0x7D0F00) == ALLOW  # of musl
    assert verdict(machine, numbers["clone"], 0x1200011) == EPERM  # fork
    assert verdict(machine, numbers["clone"], 0x3D0F00 | 0x40000000) == EPERM  # a thread in a network of its own
    commands = {command for command in range(2000) if verdict(machine, numbers["fcntl"], 0, command) == ALLOW}
    assert commands == {0, 1, 2, 3, 4, 1030}


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_call_numbers_are_the_kernels(machine: str, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text(encoding="utf-8"))
    kernel = {"newfstatat" if name == "fstatat" else name: int(number) for name, number in found}
    assert sandbox_child.call_numbers(machine).items() <= kernel.items()
    column = sandbox_child.MACHINES[machine][0] - 1
    ours = {name: both[column] for name, both in SHUT.items() if name in kernel}
    assert ours == {name: kernel[name] for name in ours}
