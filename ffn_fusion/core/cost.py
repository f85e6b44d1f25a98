"""What a model costs by count: parameters, kv-cache bytes and the bytes a decode step must move."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ffn_fusion.core.fusion import padded_width
from ffn_fusion.core.plan import Attention, Block, Ffn


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block; `kv_heads` is 0 without attention, `ffn_width` 0 without FFN.

    Both are 0, too, where a linear layer stands in the sublayer's place: it has no cache and no channels.
    """

    kv_heads: int
    ffn_width: int
    linear_attention: bool = False
    linear_ffn: bool = False


def shapes_of(blocks: Iterable[Block], parent: Sequence[BlockShape], multiple: int = 1) -> list[BlockShape]:
    """Sizes of the blocks of a student whose parent has these layers.

    A fused FFN is as wide as its members together. With `multiple`, every width goes up to a multiple of it, and an
    attention without FFN has one of that width behind it, as in the student on disk.
    """
    return [
        BlockShape(
            _kv_heads(block, parent), _width(block, parent, multiple), _linear(block.attention), _linear(*block.ffns)
        )
        for block in blocks
    ]


def _kv_heads(block: Block, parent: Sequence[BlockShape]) -> int:
    attention = block.attention
    if attention is None or _linear(attention):
        return 0
    return parent[attention.layer].kv_heads if attention.kv_heads is None else attention.kv_heads


def _width(block: Block, parent: Sequence[BlockShape], multiple: int) -> int:
    if _linear(*block.ffns):
        return 0
    width = sum(ffn.width or parent[ffn.layer].ffn_width for ffn in block.ffns)
    return width if multiple == 1 else padded_width(max(width, 1), multiple)


def _linear(*sublayers: Attention | Ffn | None) -> bool:
    """Whether a linear layer stands in a sublayer's place."""
    return any(sublayer is not None and sublayer.linear for sublayer in sublayers)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a family's sublayers at one hidden size, norms and biases included; a size adds its share."""

    outside: int
    """Embeddings, final norm and head."""
    embedding: int
    """Input embedding where it is not tied to the head."""
    attention: int
    """An attention but for its kv heads."""
    kv_head: int
    ffn: int
    """An FFN but for its channels."""
    channel: int
    linear_attention: int
    linear_ffn: int

    def block(self, shape: BlockShape) -> int:
        attention = self.attention + shape.kv_heads * self.kv_head if shape.kv_heads else 0
        ffn = self.ffn + shape.ffn_width * self.channel if shape.ffn_width else 0
        linear = shape.linear_attention * self.linear_attention + shape.linear_ffn * self.linear_ffn
        return attention + ffn + linear

    def total(self, shapes: Sequence[BlockShape]) -> int:
        return self.outside + sum(map(self.block, shapes))


@dataclass(frozen=True)
class Cost:
    """Counts for one model in one dtype."""

    blocks: Sequence[BlockShape]
    num_parameters: int
    embedding_parameters: int
    """Input embedding where it is not tied to the head: a decode step reads one row of it, not the table."""
    head_dim: int
    bytes_per_value: int

    @property
    def num_attentions(self) -> int:
        """Attentions with a kv cache, so without linear layers."""
        return sum(block.kv_heads > 0 for block in self.blocks)

    @property
    def num_sublayers(self) -> int:
        """Sequential sublayers, linear layers too; as many all-reduces a token under tensor parallelism."""
        attentions = sum(block.kv_heads > 0 or block.linear_attention for block in self.blocks)
        return attentions + sum(block.ffn_width > 0 or block.linear_ffn for block in self.blocks)

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values that one token adds to the cache."""
        return sum(2 * block.kv_heads * self.head_dim * self.bytes_per_value for block in self.blocks)

    def memory_bytes(self, batch_size: int, context: int) -> int:
        """Weights and full kv cache, over all devices together; activations and an engine's own buffers come on top."""
        return self.weight_bytes + batch_size * context * self.kv_bytes_per_token

    def decode_bytes(self, batch_size: int, context: int) -> int:
        """Least bytes that one decode step moves: every weight once, every cached key and value once."""
        weights = (self.num_parameters - self.embedding_parameters) * self.bytes_per_value
        return weights + batch_size * context * self.kv_bytes_per_token

    def decode_flops(self, batch_size: int) -> float:
        """Products with weights in one decode step, two operations a weight and sequence; those of attentions are not
        counted."""
        return 2.0 * batch_size * (self.num_parameters - self.embedding_parameters)
