"""The process of one generated program: it limits itself, has the kernel fence it in, runs the program, reports.

`sandbox.py` starts this file by its path, without site-packages, so it imports the standard library only. The fence
is a seccomp filter: the kernel asks it before every system call, and no process can take its own filter off. It lets
through the calls below, which read files, wait, manage memory and start threads; whatever is not listed is refused.
"""

import ctypes
import os
import resource
import struct
import sys
import types

Instruction = tuple[int, int, int, int]
"""Classic BPF: what to do, instructions to skip if the test holds, to skip if not, constant."""

MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
"""Column in the table of calls, and the kernel's name for the instruction set (AUDIT_ARCH in linux/audit.h)."""

CALLS = """
read 0 63, readv 19 65, pread64 17 67, write 1 64, writev 20 66, lseek 8 62, close 3 57, close_range 436 436,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fcntl 72 25, open 2 -, openat 257 56, umask 95 166,
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17,
chdir 80 49, fchdir 81 50, fadvise64 221 223,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, nanosleep 35 101, clock_nanosleep 230 115, pause 34 -,
restart_syscall 219 128, alarm 37 -, getitimer 36 102, setitimer 38 103,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132,
brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233,
clone 56 220, futex 202 98, set_robust_list 273 99, rseq 334 293, sched_yield 24 124, sched_getaffinity 204 123,
gettid 186 178, exit 60 93, exit_group 231 94,
getpid 39 172, getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getgroups 115 158, uname 63 160, sysinfo 99 179, getrusage 98 165,
getrandom 318 278, getcpu 309 168, time 201 -, times 100 153, gettimeofday 96 169, clock_gettime 228 113,
clock_getres 229 114
"""
"""The calls let through, with their numbers on x86_64 and on aarch64, which lacks some old ones."""

# Operations of BPF and verdicts of seccomp (linux/bpf_common.h, linux/seccomp.h).
LOAD, EQUAL, ABOVE, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
ALLOW: Instruction = (RETURN, 0, 0, 0x7FFF0000)
KILL: Instruction = (RETURN, 0, 0, 0x80000000)
DENY: Instruction = (RETURN, 0, 0, 0x00050001)  # EPERM
UNKNOWN: Instruction = (RETURN, 0, 0, 0x00050026)  # ENOSYS
NUMBER: Instruction = (LOAD, 0, 0, 0)
ARCHITECTURE: Instruction = (LOAD, 0, 0, 4)
FIRST: Instruction = (LOAD, 0, 0, 16)  # the low half of the first argument
SECOND: Instruction = (LOAD, 0, 0, 24)
THIRD: Instruction = (LOAD, 0, 0, 32)

READ_ONLY = ((ANY_BIT, 0, 1, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC), DENY, ALLOW)
THREAD, NAMESPACES = 0x00010000, 0x7E020000  # flags of clone
SET_FLAGS, DUPLICATE = 4, 1030  # commands of fcntl; those between set locks, leases and who is sent which signal
CONDITIONS: dict[str, tuple[Instruction, ...]] = {
    "open": (SECOND, *READ_ONLY),
    "openat": (THIRD, *READ_ONLY),
    "clone": (FIRST, (ANY_BIT, 0, 1, NAMESPACES), DENY, (ANY_BIT, 1, 0, THREAD), DENY, ALLOW),
    "fcntl": (SECOND, (EQUAL, 2, 0, DUPLICATE), (ABOVE, 0, 1, SET_FLAGS), DENY, ALLOW),
}
NEW = 424
"""From this number on both machines agree, and C libraries fall back when the kernel says that it has no such call:
clone3 and openat2, whose flags lie in memory where no filter can look, become clone and openat. The x32 calls of
x86_64 are numbered from 2**30."""


def call_numbers(machine: str) -> dict[str, int]:
    """The listed calls that a machine has, and their numbers on it."""
    rows = [row.split() for row in CALLS.split(",")]
    column, _ = MACHINES[machine]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def fence(machine: str) -> list[Instruction]:
    """The filter for a machine: foreign instruction sets kill, listed calls pass, some on a condition, others fail."""
    _, architecture = MACHINES[machine]
    program = [ARCHITECTURE, (EQUAL, 1, 0, architecture), KILL, NUMBER]
    for name, number in call_numbers(machine).items():
        verdict = CONDITIONS.get(name, (ALLOW,))
        program += [(EQUAL, 0, len(verdict), number), *verdict]
    return [*program, (AT_LEAST, 0, 1, NEW), UNKNOWN, DENY]


def install(program: list[Instruction]) -> None:
    """Put the filter on this process for good. Raises `OSError` where the kernel refuses."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    kept = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(kept)))
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS, without which only root may set a filter
    prctl(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def prctl(option: int, *values: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if call(option, *values, *[0] * (4 - len(values))) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def limit_resources(seconds: float, memory_mib: int) -> None:
    """Bound memory, processor time and the rest; the parent's clock bounds the time that passes."""
    wanted = {
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_CPU: int(seconds) + 2,  # reached by several threads, or if the parent is gone
        resource.RLIMIT_STACK: 64 << 20,  # room for programs that raise the recursion limit
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def run(source: str, memory_mib: int) -> str:
    """The verdict: `passed` if the program ran to its end, else `failed` and why."""
    # A module of its own, because dataclasses and pickle look it up; not `__main__`, whose code is no part of a test.
    module = sys.modules["program"] = types.ModuleType("program")
    out_of_memory = f"failed used more than {memory_mib:,} MiB"  # made while there is memory
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        return out_of_memory
    except SystemExit:
        return "failed ended before its tests"
    except BaseException as error:
        return f"failed {describe(error)}"
    return "passed"


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")[:500]
    except BaseException:  # its text is the program's code as well
        return type(error).__name__


def main() -> None:
    report, seconds, memory_mib = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    nonce, source = sys.stdin.buffer.read().decode(errors="surrogatepass").split("\n", 1)
    os.dup2(1, 0)  # /dev/null
    sys.argv[:] = ["program"]
    write = os.write  # before the program can replace it
    try:
        prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: go when the parent goes
        limit_resources(seconds, memory_mib)
        install(fence(os.uname().machine))
    except (OSError, ValueError) as error:
        verdict = f"failed could not be fenced in, so it was not run: {error}"
    else:
        verdict = run(source, memory_mib)
    write(report, f"{nonce} {verdict}\n".encode(errors="backslashreplace"))
    # Now the parent ends this process, whatever threads and exit handlers the program has left.


if __name__ == "__main__":
    main()
