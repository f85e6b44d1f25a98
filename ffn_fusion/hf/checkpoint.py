"""Safetensors checkpoints, one tensor at a time: a checking reader and a writer that streams into place."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ffn_fusion.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**25
"""Elements read, and checked, at once."""
MAX_SHARD_BYTES = 5 * 10**9


class Spec(NamedTuple):
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Source(Protocol):
    """Named tensors to build a student from: a checkpoint on disk or a model in memory."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str) -> Tensor: ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it is missing or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object")
    return data


class Checkpoint:
    """The safetensors of a model folder. Opening reads every header, so broken files fail before any work starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for path in _shards(folder):
            for name, spec in _header(path).items():
                self._file_of[name] = path
                # Old Llama checkpoints store rotary frequencies, which every engine computes.
                if not name.endswith("rotary_emb.inv_freq"):
                    self.specs[name] = spec
        _check_index(folder, self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, copied out of the file; `UserError` if it holds NaN or infinity."""
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        num_rows, *row = spec.shape or (1,)
        step = max(1, CHUNK // max(1, torch.Size(row).numel()))
        for start in range(0, num_rows, step):
            chunk = self.rows(name, start, step)
            if not torch.isfinite(chunk.sum(dtype=torch.float32)):
                raise UserError(f"tensor {name} in {self._file_of[name]} holds NaN or infinite values")
            tensor.view(num_rows, *row)[start : start + step] = chunk
        return tensor

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a tensor, or what there is of them, without reading the others."""
        # The file is opened each time: pages that it maps leave memory when it is closed.
        with safe_open(self._file_of[name], framework="pt") as file:
            stored = file.get_slice(name) if self.specs[name].shape else file.get_tensor(name)[None]
            found: Tensor = stored[start : start + count].clone()
        return found

    @property
    def key(self) -> str:
        """Names, shapes, dtypes and some values of all tensors as one string: the same wherever the files lie."""
        digest = hashlib.sha256()
        for name, spec in sorted(self.specs.items()):
            digest.update(f"{name} {spec.shape} {spec.dtype} ".encode())
            rows = self.rows(name, 0, 1 if len(spec.shape) > 1 else spec.shape[0])
            digest.update(rows.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
            raise UserError(f"{folder / INDEX} has no 'weight_map' of tensor names to files")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{folder / INDEX} names {missing[0]}, which is not in the folder ({len(missing)} missing)")
        return paths
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise UserError(
            f"{folder} holds pickle weights only, which can run code when read; convert them to safetensors"
        )
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}")


def _header(path: Path) -> dict[str, Spec]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file: {error}") from None
    for name, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise UserError(f"tensor {name} in {path} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
    return {name: Spec(shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def _check_index(folder: Path, file_of: Mapping[str, Path]) -> None:
    if not (folder / INDEX).is_file():
        return
    for name, file_name in read_json(folder / INDEX)["weight_map"].items():
        if name not in file_of or file_of[name].name != file_name:
            raise UserError(f"{folder / INDEX} puts tensor {name} into {file_name}, which does not hold it")


class ShardWriter:
    """Writes tensors of known shapes into shards, in any order, each straight to its place in the file.

    Memory holds one tensor at a time. Use as a context manager; leaving it without an error checks that every
    tensor was written and adds the index.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._specs = specs
        total = sum(spec.num_bytes for spec in specs.values())
        free = shutil.disk_usage(folder).free
        if total > free:
            raise UserError(f"the student needs {total / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free")
        shards = _split(specs, max_shard_bytes)
        many = len(shards) > 1
        self._place: dict[str, tuple[Path, int]] = {}
        for number, names in enumerate(shards, start=1):
            path = folder / (f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE)
            self._start_file(path, names)
        self._missing = set(specs)

    def _start_file(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self._specs[name]
            end = offset + spec.num_bytes
            header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        for name in names:
            self._place[name] = (path, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its shard; its shape and dtype must be those announced."""
        spec = self._specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == spec, (
            name,
            tensor.shape,
            tensor.dtype,
            spec,
        )
        path, offset = self._place[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        assert not self._missing, f"tensors never written: {sorted(self._missing)[:3]}"
        files = {name: path.name for name, (path, _) in self._place.items()}
        if len(set(files.values())) > 1:
            total = sum(spec.num_bytes for spec in self._specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _split(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards


def fingerprint(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files as one string: equal for unchanged files, and cheap on any size."""
    stats = [(path.name, path.stat()) for path in sorted(paths)]
    return ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
