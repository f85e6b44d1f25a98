"""Stage folders: a stage writes into a hidden sibling and renames it when all is there, its record last.

So a folder under its own name is complete; a killed stage leaves `.NAME.partial`, which the same command takes up
again; and a finished stage with the same inputs is not run twice.
"""

import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import cattrs

from ffn_fusion.errors import UserError

RECORD = "record.json"
INPUTS = "inputs.json"
STATE = "state"
MEMORY = "measured.json"
UNKNOWN = "unknown"
"""An input that could not be found out this time; it differs from no value."""
T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """Where and with what a figure was made."""

    date: str
    device: str
    dtype: str
    platform: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Record(Generic[T]):
    """What a stage leaves behind: the stage, all that its result depends on, where it ran, and the result."""

    stage: str
    inputs: dict[str, Any]
    environment: Environment
    seconds: float
    result: T


def environment(device: str, dtype: str) -> Environment:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    names = ("ffn-fusion", "torch", "transformers", "numpy", "scipy")
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        dtype=dtype,
        platform=system,
        versions={name: version(name) for name in names},
    )


@dataclass
class StageFolder:
    """A stage at work: `path` is the hidden folder it writes into, `state` what it needs to be taken up again."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / STATE

    def save(self, name: str, data: Any) -> None:
        """Write resumable state as JSON, atomically."""
        write_atomically(self.state / name, json.dumps(data))

    def load(self, name: str) -> Any:
        """State saved by an earlier, killed run of the same command; None if there is none."""
        path = self.state / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def remember(self, key: str, kind: type[T], measure: Callable[[], T]) -> T:
        """The value of an expensive measurement: taken once, then read back, also by a run that starts again."""
        known = self.load(MEMORY) or {}
        if key in known:
            return cattrs.structure(known[key], kind)
        value = measure()
        self.save(MEMORY, known | {key: cattrs.unstructure(value)})
        return value


def run_stage(
    stage: str,
    out: Path,
    inputs: dict[str, Any],
    result_type: type[T],
    work: Callable[[StageFolder], tuple[T, Environment]],
    whole: Callable[[T], bool] = lambda _: True,
) -> Record[T]:
    """Do a stage's work in `out`, or return its record if the same work is already there.

    `inputs` is all that the result depends on, as JSON. A result that is not `whole` is worked on again. Raises
    `UserError` if `out` holds something else.
    """
    inputs = json.loads(json.dumps(inputs, default=str))
    if out.exists():
        record = _finished(stage, out, inputs, result_type)
        if whole(record.result):
            print(f"{stage}: {out} is up to date", file=sys.stderr)
            return record
        out.rename(_partial_path(out))
    with _partial(out, {"stage": stage, "inputs": inputs}) as folder:
        start = time.monotonic()
        result, where = work(folder)
        record = Record(stage, inputs, where, round(time.monotonic() - start, 2), result)
        shutil.rmtree(folder.state)
        write_atomically(folder.path / RECORD, json.dumps(asdict(record), indent=1))
        folder.path.rename(out)
    return record


def state_of(out: Path) -> Path:
    """Where a stage that works on `out` keeps what it needs to be taken up again, for the other ranks of a training."""
    return _partial_path(out) / STATE


def read_record(folder: Path, result_type: type[T]) -> Record[T]:
    """The typed record of a finished stage; `UserError` if the folder holds none."""
    path = folder / RECORD
    try:
        return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), Record[result_type])  # type: ignore[valid-type]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {RECORD}: it is not the folder of a finished stage") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as a {result_type.__name__}: {error}") from error


def _finished(stage: str, out: Path, inputs: dict[str, Any], result_type: type[T]) -> Record[T]:
    if not (out / RECORD).is_file():
        raise UserError(f"{out} exists and was not made by this command; choose another --out")
    made_by = stage_of(out)
    if made_by != stage:
        raise UserError(f"{out} holds the result of '{made_by}'; choose another --out for '{stage}'")
    record = read_record(out, result_type)
    values = {key: (record.inputs.get(key), inputs.get(key)) for key in record.inputs.keys() | inputs.keys()}
    changed = sorted(key for key, (old, new) in values.items() if old != new and UNKNOWN not in (old, new))
    if changed:
        raise UserError(
            f"{out} holds a result made with other {', '.join(changed)}; choose another --out or delete the folder"
        )
    return record


def stage_of(out: Path) -> str:
    """The stage that a finished folder is of, before its result is read as that stage's; empty if it is of none."""
    if not (out / RECORD).is_file():
        return ""
    try:
        return str(json.loads((out / RECORD).read_text(encoding="utf-8"))["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / RECORD} cannot be read: {error!r}") from None


def _partial_path(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextmanager
def _partial(out: Path, identity: dict[str, Any]) -> Iterator[StageFolder]:
    path = _partial_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        (path / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    with (path / STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working on {out}") from None
        folder = StageFolder(path)
        if folder.load(INPUTS) != identity:
            for entry in [*path.iterdir(), *folder.state.iterdir()]:
                if entry.name not in (STATE, "lock"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            folder.save(INPUTS, identity)
        else:
            print(f"{identity['stage']}: taking up {out} where it stopped", file=sys.stderr)
        yield folder


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
