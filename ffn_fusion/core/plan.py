"""A model is a plan: the list of its blocks, each naming the source layers it is built from.

Everything else about a student (widths, depth, tensor names, kv-cache bytes, all-reduces) is derived from its plan
and the configuration of its parent. *Layer* is an index into the parent, *block* an index into the plan.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from ffn_fusion.core.plan_words import entry, said, stated
from ffn_fusion.errors import UserError

FORMAT = "ffn-fusion-plan/1"
SIZED_FORMAT = "ffn-fusion-plan/2"
"""Of plans with sizes or linear layers: readers of the first format would leave those out without a word."""
_ATTENTION, _FFN = r"\d+(?:/\d+|L)?", r"\d+(?::\d+|L)?"
_BLOCK = re.compile(rf"(?:A(?P<attention>{_ATTENTION})|-(?=F))(?:F(?P<ffns>{_FFN}(?:\+{_FFN})*))?")


@dataclass(frozen=True)
class Attention:
    """The attention sublayer of one source layer; `kv_heads` if its kv heads are merged into fewer (Puzzle).

    A `linear` one is a single linear layer in the place of the attention: no token sees another, and nothing is cached.
    """

    layer: int
    kv_heads: int | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        if self.linear and self.kv_heads is not None:
            raise UserError(
                f"attention {self.layer} of a plan is a linear layer, which has no kv heads; say one of them"
            )
        if self.kv_heads is not None and self.kv_heads < 1:
            raise UserError(f"attention {self.layer} of a plan has {self.kv_heads} kv heads; it needs at least one")

    def __str__(self) -> str:
        return f"{self.layer}" + ("L" if self.linear else "" if self.kv_heads is None else f"/{self.kv_heads}")


@dataclass(frozen=True)
class Ffn:
    """The feed-forward sublayer of one source layer; `width` if it is cut to fewer channels, `linear` if a single
    linear layer stands in its place (Puzzle)."""

    layer: int
    width: int | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        if self.linear and self.width is not None:
            raise UserError(f"FFN {self.layer} of a plan is a linear layer, which has no channels; say one of them")
        if self.width is not None and self.width < 1:
            raise UserError(f"FFN {self.layer} of a plan has {self.width} channels; it needs at least one")

    def __str__(self) -> str:
        return f"{self.layer}" + ("L" if self.linear else "" if self.width is None else f":{self.width}")


@dataclass(frozen=True)
class Block:
    """One residual block: an optional attention, then its FFNs side by side on one shared input.

    Two or more FFNs are one wide FFN (FFN Fusion, Theorem 3.1); a block without any is an attention alone.
    """

    attention: Attention | None
    ffns: tuple[Ffn, ...]

    def __post_init__(self) -> None:
        linear = next((ffn for ffn in self.ffns if ffn.linear), None)
        if linear and self.is_fused:
            raise UserError(
                f"cannot fuse FFNs {[ffn.layer for ffn in self.ffns]}: FFN {linear.layer} is a linear layer, without "
                "channels to put beside others'"
            )

    @property
    def has_linear_ffn(self) -> bool:
        """Whether a linear layer stands in the place of its FFN."""
        return any(ffn.linear for ffn in self.ffns)

    @classmethod
    def parse(cls, word: str) -> "Block":
        """Read one block of the one-line form, such as ``A1/2F1:1024``."""
        match = _BLOCK.fullmatch(word)
        if match is None:
            raise UserError(
                f"'{word}' is no block of a plan; blocks look like A3F3, -F4, -F5+6, A7, A8/1F8:1024 or A9LF9L"
            )
        attention = match["attention"]
        ffns = tuple(Ffn(*said(ffn, ":")) for ffn in match["ffns"].split("+")) if match["ffns"] else ()
        return cls(Attention(*said(attention, "/")) if attention else None, ffns)

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
        if first.linear:
            raise UserError(
                f"the attention of layer 0 cannot be linear (engines size their cache by it), found 'A{first}'"
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
        """Read the one-line form, such as ``A0F0 A1/2F1:1024 -F2+3 A4 A5LF5L``.

        ``-`` is a removed attention, A4 one without FFN, ``/2`` a number of kv heads, ``:1024`` one of channels, and
        ``L`` a linear layer in the place of the sublayer.
        """
        return cls(tuple(map(Block.parse, text.split())))

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
                        Attention(*entry(block["attention"], "kv_heads")) if block["attention"] else None,
                        tuple(Ffn(*entry(ffn, "width")) for ffn in block["ffns"]),
                    )
                    for block in data["blocks"]
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a plan file: {error!r}; a plan has 'format' and 'blocks'") from error

    def to_json(self) -> str:
        """Readable JSON, one block a line, so that plans diff well. What is as in the parent is left out."""
        lines = [
            json.dumps(
                {
                    "attention": stated(asdict(block.attention)) if block.attention else None,
                    "ffns": [stated(asdict(ffn)) for ffn in block.ffns],
                }
            )
            for block in self.blocks
        ]
        version = SIZED_FORMAT if self.kv_heads or self.widths or self.has_linear else FORMAT
        return f'{{\n  "format": "{version}",\n  "blocks": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"

    def __str__(self) -> str:
        return " ".join(map(str, self.blocks))

    @property
    def attention_layers(self) -> list[int]:
        """Source layers whose attention is kept, as it is or as a linear layer, in plan order."""
        return [block.attention.layer for block in self.blocks if block.attention]

    @property
    def ffn_layers(self) -> list[int]:
        """Source layers whose FFN is kept, as it is or as a linear layer, in plan order."""
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
    def linear_attentions(self) -> list[int]:
        """Source layers with a linear layer in the place of their attention: they have no kv cache."""
        return [block.attention.layer for block in self.blocks if block.attention and block.attention.linear]

    @property
    def linear_ffns(self) -> list[int]:
        """Source layers with a linear layer in the place of their FFN."""
        return [ffn.layer for block in self.blocks for ffn in block.ffns if ffn.linear]

    @property
    def has_linear(self) -> bool:
        return bool(self.linear_attentions or self.linear_ffns)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Source layers of each fused FFN."""
        return [tuple(ffn.layer for ffn in block.ffns) for block in self.blocks if block.is_fused]

    @property
    def num_sublayers(self) -> int:
        """Sequential sublayers; under tensor parallelism each ends in one all-reduce.

        A linear layer counts like what it replaces, since it waits for what is before it. An attention alone counts as
        one, though the student on disk has an FFN of zeros behind it (hf/surgery.py).
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
        """Longest lists of source layers whose FFNs may share an input: no attention stands between them, and no linear
        layer, whose output the later ones must see."""
        runs: list[list[int]] = []
        for block in self.blocks:
            if block.attention or block.has_linear_ffn or not runs:
                runs.append([])
            runs[-1].extend(ffn.layer for ffn in block.ffns if not ffn.linear)
        return [tuple(run) for run in runs if len(run) > 1]


def contiguous(layers: Iterable[int]) -> str:
    """Layers as people write them: ``4, 6-9, 12``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)
