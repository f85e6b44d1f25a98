"""What it takes to measure plans: a parent, its texts, trained blocks. Nothing is loaded before `meter`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ffn_fusion.hf.library import Library, open_library
from ffn_fusion.hf.machine import device_map, pick_dtype
from ffn_fusion.hf.meter import Ask, Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.settings import Fusion, Machine, Text


@dataclass(frozen=True)
class Setup:
    """How the plans of one parent are built and measured."""

    parent: ModelFolder
    library: Library | None
    tokenizer: PreTrainedTokenizerBase
    measured: Windows
    fit: Windows
    fusion: Fusion
    machine: Machine
    dtype: torch.dtype

    @property
    def inputs(self) -> dict[str, Any]:
        """All of it that a measurement depends on."""
        return {
            "model": self.parent.fingerprint,
            "text": [self.measured.sample.digest, self.fit.sample.digest],
            "fusion": self.fusion.inputs,
            "dtype": str(self.dtype),
            # Left out, so that results from before there were any stay valid.
            **({"library": self.library.fingerprint} if self.library else {}),
        }

    def meter(self, ask: Ask | None = None) -> Meter:
        """Load the parent."""
        model = self.parent.load(self.dtype, device_map(self.machine))
        return Meter(self.parent, model, self.measured, self.fit, self.fusion, self.machine, self.library, ask)


def set_up(
    parent: ModelFolder,
    library: Path | None,
    windows: int,
    fit_windows: int,
    *,
    fusion: Fusion,
    text: Text,
    machine: Machine,
) -> Setup:
    """The windows of text to measure and to fit on, and the trained blocks in the folder `library`."""
    trained = open_library(library, parent, fusion.norm, fusion.channel_steps)
    tokenizer = load_tokenizer(parent, machine.trust_remote_code)
    measured = read_windows(text, tokenizer, windows, "measure")
    fit = read_windows(text, tokenizer, fit_windows, "fit")
    return Setup(parent, trained, tokenizer, measured, fit, fusion, machine, pick_dtype(machine, parent.checkpoint))
