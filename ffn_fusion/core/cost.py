"""What a model costs by count: parameters, kv-cache bytes and the bytes a decode step must move."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block; `kv_heads` is 0 without attention, `ffn_width` 0 without FFN.

    Both are 0, too, where a linear layer stands in the sublayer's place: it has no cache and no channels.
    """

    kv_heads: int
    ffn_width: int
    linear_attention: bool = False
    linear_ffn: bool = False


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
    def kv_bytes_per_token(self) -> int:
        """Keys and values that one token adds to the cache."""
        return sum(2 * block.kv_heads * self.head_dim * self.bytes_per_value for block in self.blocks)

    def decode_bytes(self, batch_size: int, context: int) -> int:
        """Least bytes that one decode step moves: every weight once, every cached key and value once."""
        weights = (self.num_parameters - self.embedding_parameters) * self.bytes_per_value
        return weights + batch_size * context * self.kv_bytes_per_token
