"""Counts the kernels of a captured CUDA graph, by the driver's own list of its nodes: nothing has to be profiled."""

import ctypes

import torch

DRIVER = "libcuda.so.1"
KERNEL = 0
"""CU_GRAPH_NODE_TYPE_KERNEL; copies and fills are nodes of other types."""


def count_kernels(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels of a graph that was kept (`keep_graph`); None where the driver does not say."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    handle, number, kind = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(), ctypes.c_int()
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(number)):
        return None
    nodes = (ctypes.c_void_p * number.value)()
    if driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)):
        return None
    count = 0
    for node in nodes:
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
            return None
        count += kind.value == KERNEL
    return count
