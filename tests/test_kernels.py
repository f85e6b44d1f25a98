"""Kernels of a captured graph as the driver lists them, and joules as NVML counts them; neither needs a GPU here."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffn_fusion.speed.energy import energy_counter
from ffn_fusion.speed.kernels import count_kernels

TYPES = {11: 0, 12: 1, 13: 0, 14: 2}
"""Nodes of a graph: two kernels, a copy and a fill."""
GRAPH: Any = SimpleNamespace(raw_cuda_graph=lambda: 7)


class Driver:
    def cuGraphGetNodes(self, graph: ctypes.c_void_p, nodes: Any, number: Any) -> int:  # noqa: N802, the driver's own
        assert graph.value == 7
        number._obj.value = len(TYPES)
        for place, node in enumerate(TYPES) if nodes is not None else ():
            nodes[place] = node
        return 0

    def cuGraphNodeGetType(self, node: ctypes.c_void_p, kind: Any) -> int:  # noqa: N802
        kind._obj.value = TYPES[node.value or 0]
        return 0


def test_copies_and_fills_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert count_kernels(GRAPH) == 2


def test_without_a_driver_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert count_kernels(GRAPH) is None


class NVMLError(Exception):
    pass


def test_joules_of_a_device_that_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(uuid: str) -> int:
        assert uuid == "GPU-abc"
        return 5

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda found: 1000 * found,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    counter = energy_counter(torch.device("cuda:0"))
    assert counter
    assert counter() == 5.0
    assert energy_counter(torch.device("cpu")) is None

    def refused(_: int) -> int:
        raise NVMLError

    library.nvmlDeviceGetTotalEnergyConsumption = refused
    assert energy_counter(torch.device("cuda:0")) is None
