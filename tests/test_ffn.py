"""`ffn`: the ways to compute FFNs are one computation, and the rows compare the right pairs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import one_line

from ffn_fusion.core.ffn_records import COMPILED, PLAIN, TUNED, FfnResult, ffn_rows
from ffn_fusion.folder import read_record
from ffn_fusion.speed import ffn_race
from ffn_fusion.speed.arena import Arena
from ffn_fusion.speed.ffn_race import FfnOrder, ffns, plain
from ffn_fusion.stages.ffn import ffn

CALL: dict[str, Any] = {"hidden_size": 128, "width": 256, "number": 4, "group": 2, "repeats": 2, "dtype": "fp32"}
ORDER = FfnOrder(128, 256, 4, 2, [3], "fp32", 1)


def test_rows_compare_fused_with_the_same_code_and_with_the_best() -> None:
    medians = {(PLAIN, False): 12.0, (PLAIN, True): 8.0, (COMPILED, False): 9.0, (COMPILED, True): 6.0}
    rows = {(r.code, r.fused): r for r in ffn_rows(1, {way: [ms] * 3 for way, ms in medians.items()}, least_ms=6.0)}
    fused = rows[COMPILED, True]
    assert fused.over_same
    assert fused.over_plain
    assert (fused.over_same.value, fused.over_plain.value, fused.bandwidth_share) == (1.5, 2.0, 1.0)
    assert rows[PLAIN, True].over_best.value == pytest.approx(9 / 8)  # type: ignore[union-attr]
    assert rows[PLAIN, False].over_plain is None


def test_any_grouping_takes_the_same_memory_and_two_products_are_the_merged_one() -> None:
    arena = Arena(ORDER.num_values, torch.device("cpu"), torch.float32)
    x = torch.randn(1, 3, 128)
    for group, number in ((1, 4), (2, 2)):
        steps = ffns(ORDER, group, arena)
        assert len(steps) == number
        assert arena.used <= len(arena.values)
        for ours, merged in zip(plain(steps[0], x, x), steps[0](x, x), strict=True):
            assert torch.allclose(ours, merged, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ways_are_timed(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn_race, "compiled", lambda _: ffn_race.plain)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    result = ffn(out=tmp_path / "out", tokens=(1, 3), tensor_parallel=ranks, **CALL).result
    assert [(r.tokens, r.code, r.fused) for r in result.rows] == [
        (tokens, code, fused) for tokens in (1, 3) for code in (PLAIN, COMPILED, TUNED) for fused in (False, True)
    ]
    assert all(row.ms.median > 0 for row in result.rows)
    assert read_record(tmp_path / "out", FfnResult).result == result
    assert "fused" in result.summary()


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(lambda: ffn(out=tmp_path / "out", **(CALL | {"group": 3})), "do not fall into groups of 3")
    monkeypatch.setattr(ffn_race, "available", lambda _: 1e6)
    one_line(lambda: ffn(out=tmp_path / "out", **CALL), "4 FFNs of 128 x 256 need 0.0 GB on each device")


def test_a_machine_that_cannot_compile_gets_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffn_fusion", "ffn", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in CALL.items()]
    environment = {"CXX": str(tmp_path / "nowhere"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("ffn-fusion: torch.compile failed: InvalidCxxCompiler: No working")
    )
