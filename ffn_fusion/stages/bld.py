"""`bld`: blockwise local distillation: parent and blocks → a library of trained blocks."""

import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ffn_fusion.core.block_records import BldResult, UnitResult
from ffn_fusion.core.blockwise import Part, changed_blocks, in_place, layer_variants, span, trained_parts
from ffn_fusion.core.plan import Block
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, read_record, run_stage
from ffn_fusion.hf.blockwise import Distillation, TrainedUnit, Training
from ffn_fusion.hf.library import CONTRIBUTIONS, Library, open_library
from ffn_fusion.hf.machine import pick_device, pick_training_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer, read_plan, resolve_model
from ffn_fusion.hf.surgery import Norm
from ffn_fusion.hf.text import read_windows
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.progress import track
from ffn_fusion.settings import Above0, Blocks, Machine, NotNegative, Positive, Text, TwoOrMore

UNITS = "units.json"
BLOCKS = "blocks"


def bld(
    model: str,
    *,
    out: Path,
    blocks: Blocks = Blocks(),  # noqa: B008, frozen
    library: Path | None = None,
    norm: Norm = "folded",
    channel_steps: Positive = 1,
    windows: TwoOrMore = 128,
    epochs: NotNegative = 2,
    learning_rate: Above0 = 1e-2,
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[BldResult]:
    """Train blocks, each by itself, to do to the parent's own activations what the layers they replace do (Puzzle).

    What of a block is not the parent's own trains: a smaller attention or FFN alone, both together, or an FFN that
    makes up for a removed attention. FFNs are first fitted in closed form. Use the library in `fuse` and `search`.

    Parameters
    ----------
    model
        Parent: folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        New folder: the library.
    library
        An earlier library to begin with; its blocks are in the new one too, and new blocks start from their parts.
    norm
        Norm of fused FFNs, as for `fuse`.
    channel_steps
        Steps in which channels of a narrower FFN are chosen, as for `fuse`.
    windows
        Windows of text to train on; one in eight is held out to choose between trained and untrained weights.
    epochs
        Times that each window is used for gradient steps; 0 for the closed-form fit alone.
    learning_rate
        Of AdamW at its highest, as a share of the root mean square of each weight.
    """
    parent = resolve_model(model)
    wanted = wanted_blocks(blocks, parent)
    start = open_library(library, parent, norm, channel_steps)
    dtype = pick_training_dtype(machine, parent.checkpoint)
    sample = read_windows(text, load_tokenizer(parent, machine.trust_remote_code), windows, "fit")
    training = Training(epochs, learning_rate, text.seed)
    inputs = {
        "model": parent.fingerprint,
        "blocks": [str(block) for block in wanted],
        "library": start.fingerprint if start else None,
        "norm": norm,
        "training": asdict(training),
        "text": sample.sample.digest,
        "batch_size": machine.batch_size,
        "dtype": str(dtype),
        **({"channel_steps": channel_steps} if channel_steps > 1 else {}),  # so that earlier results stay valid
    }

    def work(folder: StageFolder) -> tuple[BldResult, Environment]:
        shelf = _Shelf(folder, start, wanted)
        if library:
            shelf.take_over(read_record(library, BldResult).result, library)
        walk = ParentWalk(
            parent, parent.checkpoint, device=pick_device(machine), dtype=dtype, batch_size=machine.batch_size
        )
        missing = [block for block in wanted if not shelf.holds(block)]
        distillation = Distillation(walk, norm, training, shelf.library, channel_steps)
        units = distillation.run(sample.ids, missing, shelf.save_contributions)
        for unit in track(units, "bld: blocks trained", len(missing)):
            shelf.add(unit)
        result = BldResult(model, parent.checkpoint.key, norm, shelf.units, sample.sample, channel_steps)
        return result, where(machine, dtype)

    return run_stage("bld", out, inputs, BldResult, work)


def wanted_blocks(blocks: Blocks, parent: ModelFolder) -> list[Block]:
    """The blocks that the options ask for, in the order of layers; `UserError` if there are none, or no such blocks."""
    found = changed_blocks(read_plan(blocks.plan, parent), parent.plan) if blocks.plan else []
    found += map(Block.parse, blocks.blocks)
    asked: dict[Part, bool] = {"attention": blocks.no_attention, "ffn": blocks.no_ffn}
    drop = [part for part, is_asked in asked.items() if is_asked]
    for layer in parent.plan.blocks:
        shape = parent.shapes[layer.layers[0]]
        fewer = [number for number in blocks.kv_heads if number < shape.kv_heads]
        narrower = [width for width in blocks.widths if width < shape.ffn_width]
        found += layer_variants(layer, fewer, narrower, drop)
    for block in found:
        parent.check_plan(in_place(block, parent.plan))
    trainable = [block for block in dict.fromkeys(found) if trained_parts(block) and block not in parent.plan.blocks]
    if not trainable:
        raise UserError(
            "no blocks to train: name a --plan, --blocks, or --kv-heads, --widths, --no-attention, --no-ffn"
        )
    return sorted(trainable, key=span)


class _Shelf:
    """The library as it is written: finished units are on disk, so that a killed run goes on at the next one."""

    def __init__(self, folder: StageFolder, start: Library | None, wanted: list[Block]) -> None:
        self._folder, self._wanted = folder, set(map(str, wanted))
        self.library = Library(start.files if start else {}, start.contributions if start else {})
        if self._contributions.is_file():
            self.library.contributions |= {int(layer): c for layer, c in load_file(self._contributions).items()}
        self.units = [UnitResult(**unit) for unit in folder.load(UNITS) or []]
        self.library.files |= {unit.block: folder.path / unit.file for unit in self.units}
        (folder.path / BLOCKS).mkdir(exist_ok=True)

    @property
    def _contributions(self) -> Path:
        return self._folder.path / CONTRIBUTIONS

    def holds(self, block: Block) -> bool:
        return any(unit.block == str(block) for unit in self.units)

    def take_over(self, result: BldResult, folder: Path) -> None:
        """Copy the blocks of an earlier library that are not trained anew."""
        for unit in result.units:
            if unit.block not in self._wanted and not self.holds(Block.parse(unit.block)):
                file = self._next_file()
                shutil.copyfile(folder / unit.file, self._folder.path / file)
                self._append(UnitResult(**asdict(unit) | {"file": file}))
        self.save_contributions()

    def add(self, unit: TrainedUnit) -> None:
        file = self._next_file()
        save_tensors(self._folder.path / file, unit.tensors)
        self._append(
            UnitResult(
                str(unit.block), file, unit.kept, unit.start, unit.fitted, unit.trained, unit.num_tokens, unit.seconds
            )
        )

    def save_contributions(self) -> None:
        if self.library.contributions:
            save_tensors(self._contributions, {str(layer): c for layer, c in self.library.contributions.items()})

    def _next_file(self) -> str:
        return f"{BLOCKS}/{len(self.units)}.safetensors"

    def _append(self, unit: UnitResult) -> None:
        self.units.append(unit)
        self._folder.save(UNITS, list(map(asdict, self.units)))
        self.library.files[unit.block] = self._folder.path / unit.file


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors so that the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
