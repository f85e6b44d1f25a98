"""A model is a plan: the list of its blocks, each naming the source layers it is built from.

Everything else about a student (widths, depth, tensor names, kv-cache bytes, all-reduces) is derived from its plan
and the configuration of its parent. *Layer* is an index into the parent, *block* an index into the plan.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ffn_fusion.errors import UserError

FORMAT = "ffn-fusion-plan/1"
SIZED_FORMAT = "ffn-fusion-plan/2"
"""Of plans that give sizes: readers of the first format would leave the sizes out without a word."""
_ATTENTION, _FFN = r"\d+(?:/\d+)?", r"\d+(?::\d+)?"
_BLOCK = re.compile(rf"(?:A(?P<attention>{_ATTENTION})|-(?=F))(?:F(?P<ffns>{_FFN}(?:\+{_FFN})*))?")


@dataclass(frozen=True)
class Attention:
    """The attention sublayer of one source layer; `kv_heads` if its kv heads are merged into fewer (Puzzle)."""

    layer: int
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_heads is not None and self.kv_heads < 1:
            raise UserError(f"attention {self.layer} of a plan has {self.kv_heads} kv heads; it needs at least one")

    def __str__(self) -> str:
        return f"{self.layer}" if self.kv_heads is None else f"{self.layer}/{self.kv_heads}"


@dataclass(frozen=True)
class Ffn:
    """The feed-forward sublayer of one source layer; `width` if it is cut to fewer channels (Puzzle)."""

    layer: int
    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise UserError(f"FFN {self.layer} of a plan has {self.width} channels; it needs at least one")

    def __str__(self) -> str:
        return f"{self.layer}" if self.width is None else f"{self.layer}:{self.width}"


@dataclass(frozen=True)
class Block:
    """One residual block: an optional attention, then its FFNs side by side on one shared input.

    Two or more FFNs are one wide FFN (FFN Fusion, Theorem 3.1); a block without any is an attention alone.
    """

    attention: Attention | None
    ffns: tuple[Ffn, ...]

    @property
    def is_fused(self) -> bool:
        return len(self.ffns) > 1

    @property
    def is_cut(self) -> bool:
        """Whether an FFN of it has fewer channels than its parent's."""
        return any(ffn.width is not None for ffn in self.ffns)

    @property
    def layers(self) -> tuple[int, ...]:
        """Source layers that the block is built from, in the order in which it names them."""
        named = [self.attention.layer] if self.attention else []
        return tuple(dict.fromkeys(named + [ffn.layer for ffn in self.ffns]))

    def __str__(self) -> str:
        head = f"A{self.attention}" if self.attention else "-"
        return head + ("F" + "+".join(map(str, self.ffns)) if self.ffns else "")


@dataclass(frozen=True)
class Plan:
    """An ordered list of blocks. Frozen and valid by construction; `UserError` says why a list is no plan."""

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UserError("a plan needs at least one block, for example 'A0F0 A1F1+2'")
        first = self.blocks[0].attention
        if first is None or first.layer != 0:
            raise UserError(
                "a plan starts with the attention of layer 0 (engines size their cache by it), "
                f"found '{self.blocks[0]}'"
            )
        for kind, layers in (("A", self.attention_layers), ("F", self.ffn_layers)):
            twice = sorted({layer for layer in layers if layers.count(layer) > 1})
            if twice:
                raise UserError(f"a plan names each sublayer once, found {kind}{twice[0]} twice")
        empty = next((at for at, block in enumerate(self.blocks) if not block.layers), None)
        if empty is not None:
            raise UserError(f"every block needs an attention or an FFN; block {empty} has neither, leave it out")
        if not self.ffn_layers:
            raise UserError(f"a plan needs at least one FFN, found '{self}'")

    @classmethod
    def identity(cls, num_layers: int) -> "Plan":
        """The plan of a parent with `num_layers` ordinary layers."""
        return cls(tuple(Block(Attention(layer), (Ffn(layer),)) for layer in range(num_layers)))

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read the one-line form, such as ``A0F0 A1/2F1:1024 -F2+3 A4``.

        ``-`` is a removed attention, A4 one without FFN, ``/2`` a number of kv heads and ``:1024`` one of channels.
        """
        blocks = []
        for word in text.split():
            match = _BLOCK.fullmatch(word)
            if match is None:
                raise UserError(f"'{word}' is no block of a plan; blocks look like A3F3, -F4, -F5+6, A7 or A8/1F8:1024")
            attention = match["attention"]
            ffns = tuple(Ffn(*_numbers(ffn, ":")) for ffn in match["ffns"].split("+")) if match["ffns"] else ()
            blocks.append(Block(Attention(*_numbers(attention, "/")) if attention else None, ffns))
        return cls(tuple(blocks))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of `to_json`; both formats are read alike."""
        try:
            data = json.loads(text)
            if data["format"] not in (FORMAT, SIZED_FORMAT):
                raise UserError(f"plan has format {data['format']!r}, expected {FORMAT!r} or {SIZED_FORMAT!r}")
            return cls(
                tuple(
                    Block(
                        Attention(*_entry(block["attention"], "kv_heads")) if block["attention"] else None,
                        tuple(Ffn(*_entry(ffn, "width")) for ffn in block["ffns"]),
                    )
                    for block in data["blocks"]
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a plan file: {error!r}; a plan has 'format' and 'blocks'") from error

    def to_json(self) -> str:
        """Readable JSON, one block a line, so that plans diff well. Sizes that are the parent's own are left out."""
        lines = [
            json.dumps(
                {
                    "attention": _stated(block.attention) if block.attention else None,
                    "ffns": [_stated(ffn) for ffn in block.ffns],
                }
            )
            for block in self.blocks
        ]
        version = SIZED_FORMAT if self.kv_heads or self.widths else FORMAT
        return f'{{\n  "format": "{version}",\n  "blocks": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"

    def __str__(self) -> str:
        return " ".join(map(str, self.blocks))

    @property
    def attention_layers(self) -> list[int]:
        """Source layers whose attention is kept, in plan order."""
        return [block.attention.layer for block in self.blocks if block.attention]

    @property
    def ffn_layers(self) -> list[int]:
        """Source layers whose FFN is kept, in plan order."""
        return [ffn.layer for block in self.blocks for ffn in block.ffns]

    @property
    def kv_heads(self) -> dict[int, int]:
        """Kv heads of each attention that has fewer than its parent's, by source layer."""
        attentions = [block.attention for block in self.blocks if block.attention]
        return {attention.layer: attention.kv_heads for attention in attentions if attention.kv_heads is not None}

    @property
    def widths(self) -> dict[int, int]:
        """Channels of each FFN that has fewer than its parent's, by source layer."""
        return {ffn.layer: ffn.width for block in self.blocks for ffn in block.ffns if ffn.width is not None}

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Source layers of each fused FFN."""
        return [tuple(ffn.layer for ffn in block.ffns) for block in self.blocks if block.is_fused]

    @property
    def num_sublayers(self) -> int:
        """Sequential sublayers; under tensor parallelism each ends in one all-reduce.

        An attention alone counts as one, though the student on disk has an FFN of zeros behind it (hf/surgery.py).
        """
        return sum((block.attention is not None) + bool(block.ffns) for block in self.blocks)

    @property
    def is_ordered(self) -> bool:
        """Whether the blocks name source layers in rising order."""
        return all(a < b for a, b in pairwise(self.ffn_layers)) and all(
            max(a.layers) < min(b.layers) and list(a.layers) == sorted(a.layers) and list(b.layers) == sorted(b.layers)
            for a, b in pairwise(self.blocks)
        )

    def without_attention(self, layers: Collection[int]) -> "Plan":
        """The plan with the attention of these source layers removed, and with it a block that was nothing else."""
        missing = sorted(set(layers) - set(self.attention_layers))
        if missing:
            raise UserError(f"cannot remove the attention of layer {missing[0]}: the plan has none there")
        kept = [
            Block(None, block.ffns) if block.attention and block.attention.layer in layers else block
            for block in self.blocks
        ]
        return Plan(tuple(block for block in kept if block.layers))

    def fuse(self, layers: Sequence[int]) -> "Plan":
        """The plan with the FFNs of these source layers fused into one.

        The blocks that hold them must be consecutive, and only the first may have an attention: the others would
        have to see its output, which a shared input rules out.
        """
        held = [i for i, block in enumerate(self.blocks) if any(ffn.layer in layers for ffn in block.ffns)]
        span = self.blocks[held[0] : held[-1] + 1] if held else ()
        if not held or sorted(ffn.layer for block in span for ffn in block.ffns) != sorted(layers):
            raise UserError(f"cannot fuse FFNs {list(layers)}: they are not whole consecutive blocks of the plan")
        blocker = next((block for block in span[1:] if block.attention), None)
        if blocker:
            raise UserError(f"cannot fuse FFNs {list(layers)}: attention {blocker.attention.layer} stands between them")  # type: ignore[union-attr]
        fused = Block(span[0].attention, tuple(ffn for block in span for ffn in block.ffns))
        return Plan((*self.blocks[: held[0]], fused, *self.blocks[held[-1] + 1 :]))

    def unfused(self) -> "Plan":
        """The plan with every fused FFN taken apart into its members, one after the other."""
        blocks = []
        for block in self.blocks:
            blocks.append(Block(block.attention, block.ffns[:1]))
            blocks += [Block(None, (ffn,)) for ffn in block.ffns[1:]]
        return Plan(tuple(blocks))

    def runs(self) -> list[tuple[int, ...]]:
        """Longest lists of source layers whose FFNs may share an input: no attention stands between them."""
        runs: list[list[int]] = []
        for block in self.blocks:
            if block.attention or not runs:
                runs.append([])
            runs[-1].extend(ffn.layer for ffn in block.ffns)
        return [tuple(run) for run in runs if len(run) > 1]


def _numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator)]


def _entry(entry: dict[str, Any], size: str) -> tuple[int, int | None]:
    """Layer and size, if there is one, of a sublayer in JSON."""
    layer, value = entry["layer"], entry.get(size)
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer {layer!r} is no layer number")
    if value is not None and type(value) is not int:
        raise ValueError(f"{size} {value!r} of layer {layer} is no number")
    return layer, value


def _stated(sublayer: Attention | Ffn) -> dict[str, int]:
    return {name: value for name, value in asdict(sublayer).items() if value is not None}


def contiguous(layers: Iterable[int]) -> str:
    """Layers as people write them: ``4, 6-9, 12``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)
