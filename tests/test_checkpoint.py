"""Checkpoints: what is written can be read by anyone, and what is broken is named in one line."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ffn_fusion.hf.checkpoint import INDEX, SINGLE, Checkpoint, ShardWriter, Spec, fingerprint, read_json


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(5, 3, generator=g).bfloat16(),
        "model.b": torch.randn(7, generator=g),
        "model.c": torch.randn(2, 3, 4, generator=g).half(),
        "model.d": torch.randn(3, generator=g, dtype=torch.float64),
        "model.e": torch.randn((), generator=g),
        "model.f": torch.randn(64, 32, generator=g).bfloat16(),
    }


def write(folder: Path, contents: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in contents.items()}
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for name, tensor in reversed(contents.items()):
            writer.write(name, tensor)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path, tensors(), max_shard_bytes=80)
    return tmp_path


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (4200, 2), (80, 3), (1, 6)])
def test_what_is_written_in_any_order_is_read_bit_for_bit(tmp_path: Path, max_shard_bytes: int, num_files: int) -> None:
    write(tmp_path, tensors(), max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert (tmp_path / INDEX).is_file() == (num_files > 1)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    checkpoint = Checkpoint(tmp_path)
    assert set(loaded) == set(checkpoint.specs) == set(tensors())
    for name, tensor in tensors().items():
        assert checkpoint.specs[name] == (tuple(tensor.shape), tensor.dtype)
        for found in (loaded[name], checkpoint.read(name)):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_the_index_tells_each_file_and_the_total_size(sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors().values())
    for name, file in index["weight_map"].items():
        assert name in load_file(sharded / file)


def test_files_say_that_they_are_for_torch(sharded: Path) -> None:
    with safe_open(next(sharded.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_that_is_no_contiguous_block_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(4, 6).T[1::2]
    write(tmp_path, {"a": tensor})
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors().items())


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    tensor = Checkpoint(tmp_path).read("model.f")
    (tmp_path / SINGLE).write_bytes(b"")
    assert torch.equal(tensor, tensors()["model.f"])


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_shard_is_refused(sharded: Path, keep: int) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    one_line(lambda: Checkpoint(sharded), shard.name, "truncated")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 10**12) + b"<html>\nnot found\n</html>" * 20)
    one_line(lambda: Checkpoint(tmp_path), SINGLE)


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    one_line(lambda: Checkpoint(sharded), INDEX, shard.name)


def test_an_index_that_puts_a_tensor_into_the_wrong_file_is_refused(sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.a"] = index["weight_map"]["model.f"]
    (sharded / INDEX).write_text(json.dumps(index))
    one_line(lambda: Checkpoint(sharded), "model.a", index["weight_map"]["model.f"])


def test_an_index_that_names_an_unknown_tensor_is_refused(sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.z"] = index["weight_map"]["model.f"]
    (sharded / INDEX).write_text(json.dumps(index))
    one_line(lambda: Checkpoint(sharded), "model.z")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    one_line(lambda: Checkpoint(sharded), INDEX)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_refused_and_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(30, 30, dtype=dtype)
    bad[17, 3] = value
    save_file({"model.good": torch.ones(3, dtype=dtype), "model.bad": bad}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("model.good"), torch.ones(3, dtype=dtype))
    one_line(lambda: checkpoint.read("model.bad"), "model.bad", SINGLE, "NaN")


def test_infinities_of_both_signs_do_not_cancel(tmp_path: Path) -> None:
    save_file({"bad": torch.tensor([float("inf"), -float("inf"), 1.0])}, tmp_path / SINGLE)
    one_line(lambda: Checkpoint(tmp_path).read("bad"), "bad")


def test_large_half_precision_weights_are_no_infinity(tmp_path: Path) -> None:
    save_file({"large": torch.full((100, 100), 60000.0, dtype=torch.float16)}, tmp_path / SINGLE)
    assert Checkpoint(tmp_path).read("large").max() == 60000


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_and_named(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"model.packed": torch.zeros(4, 4).to(dtype), "model.b": torch.zeros(3)}, tmp_path / SINGLE)
    one_line(lambda: Checkpoint(tmp_path), "model.packed", "BF16")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nabort\n(tR.")
    one_line(lambda: Checkpoint(tmp_path), str(tmp_path), "pickle")


def test_pickled_weights_beside_safetensors_are_ignored(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    assert Checkpoint(sharded).specs


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    one_line(lambda: Checkpoint(tmp_path), str(tmp_path), SINGLE)
    one_line(lambda: Checkpoint(tmp_path / "absent"), "absent")


def test_leaving_a_tensor_out_fails_and_leaves_no_index(tmp_path: Path) -> None:
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors().items()}
    writer = ShardWriter(tmp_path, specs, max_shard_bytes=80)
    with pytest.raises(AssertionError, match=r"model\.c"), writer:  # noqa: PT012
        for name, tensor in tensors().items():
            if name != "model.c":
                writer.write(name, tensor)
    assert not (tmp_path / INDEX).exists()


def test_an_error_on_the_way_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="stop"), ShardWriter(tmp_path, {"a": Spec((2,), torch.float32)}):
        raise KeyError("stop")


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(3, 2).half(), torch.zeros(6)])
def test_a_tensor_other_than_announced_fails(tmp_path: Path, tensor: torch.Tensor) -> None:
    writer = ShardWriter(tmp_path, {"a": Spec((3, 2), torch.float32)})
    with pytest.raises(AssertionError):
        writer.write("a", tensor)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    one_line(lambda: ShardWriter(tmp_path, {"a": Spec((250,), torch.float32)}), str(tmp_path), "free")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    ShardWriter(tmp_path, {"a": Spec((250,), torch.float32)})


@pytest.mark.parametrize(("text", "word"), [("{", "not JSON"), ("[1]", "no JSON object"), (None, "does not exist")])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    one_line(lambda: read_json(tmp_path / "config.json"), "config.json", word)


def test_a_fingerprint_changes_with_its_files_and_only_then(sharded: Path) -> None:
    files = list(sharded.glob("*.safetensors"))
    before = fingerprint(files)
    assert fingerprint(reversed(files)) == before
    files[0].write_bytes(files[0].read_bytes() + b" ")
    assert fingerprint(files) != before
