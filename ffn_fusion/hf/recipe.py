"""How one student tensor is made."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ffn_fusion.hf.checkpoint import Spec


@dataclass(frozen=True)
class Recipe:
    """How one student tensor is made: its shape, the source tensors it uses, and the function that makes it."""

    spec: Spec
    sources: tuple[str, ...]
    build: Callable[[], Tensor]
