"""A library of trained blocks: which tensors of a block come from it, and what it takes to be of the same parent."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ffn_fusion.core.block_records import BldResult
from ffn_fusion.core.blockwise import Part, decoupled, trained_parts
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.pruning import kept_channels
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record
from ffn_fusion.hf.arch import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM
from ffn_fusion.hf.checkpoint import fingerprint
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.surgery import Norm

CONTRIBUTIONS = "contributions.safetensors"
PREFIXES: dict[Part, tuple[str, ...]] = {
    "attention": (f"{ATTENTION}.", f"{ATTENTION_NORM}."),
    "ffn": (f"{FFN}.", f"{FFN_NORM}."),
}
"""Tensors of each part of a block, by their names within its layer."""


class Library:
    """Trained blocks by their names, each a safetensors file, the channel contributions that chose their channels, and
    the texts that they were trained on.

    A block that is not there is composed of decoupled ones: its attention from A6/1F6, its FFN from A6F6:1024.
    """

    def __init__(
        self, files: Mapping[str, Path], contributions: Mapping[int, Tensor], texts: Sequence[str] = ()
    ) -> None:
        self.files, self.contributions, self.texts = dict(files), dict(contributions), list(texts)

    @classmethod
    def open(cls, folder: Path, parent: ModelFolder, norm: Norm, channel_steps: int = 1) -> "Library":
        """The library in a folder that `bld` made; `UserError` if it is of another parent, norm mode or way to choose
        channels."""
        result = read_record(folder, BldResult).result
        if result.parent_key != parent.checkpoint.key:
            raise UserError(f"{folder} is a library of another parent, {result.parent}; its blocks do not fit this one")
        if result.norm != norm:
            raise UserError(f"{folder} was made with --norm {result.norm}; use that, or another library")
        path = folder / CONTRIBUTIONS
        found = load_file(path) if path.is_file() else {}
        if found and result.channel_steps != channel_steps:
            raise UserError(
                f"{folder} was made with --channel-steps {result.channel_steps}; use that, or another library"
            )
        return cls(
            {unit.block: folder / unit.file for unit in result.units},
            {int(layer): contribution for layer, contribution in found.items()},
            result.sample.sources,
        )

    @property
    def fingerprint(self) -> str:
        """Changes when a block does."""
        return fingerprint(self.files.values())

    def makers(self, block: Block) -> dict[str, Callable[[], Tensor]]:
        """What replaces the untrained tensors of a block, by name within its layer: nothing for one it knows not."""
        if str(block) in self.files:
            return self._tensors(block)
        found: dict[str, Callable[[], Tensor]] = {}
        for part in trained_parts(block):
            unit = decoupled(block, part)
            if unit is not None and str(unit) in self.files:
                found |= self._tensors(unit)  # nothing else of it trained
        return found

    def channels(self, plan: Plan) -> dict[int, Tensor]:
        """Channels kept of each FFN that the plan cuts and the library has measured."""
        widths = {layer: width for layer, width in plan.widths.items() if layer in self.contributions}
        return {layer: kept_channels(self.contributions[layer], width) for layer, width in widths.items()}

    def _tensors(self, block: Block) -> dict[str, Callable[[], Tensor]]:
        path = self.files[str(block)]
        with safe_open(path, framework="pt") as file:
            return {name: partial(_read, path, name) for name in file.keys()}  # noqa: SIM118, no mapping


def open_library(folder: Path | None, parent: ModelFolder, norm: Norm, channel_steps: int) -> Library | None:
    """The library that an option names, if it names one."""
    return None if folder is None else Library.open(folder, parent, norm, channel_steps)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
