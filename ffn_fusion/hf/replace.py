"""Recipes of linear layers in the place of attentions and FFNs, in every family."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ffn_fusion.core.linear import product, product_bias, repeat_heads
from ffn_fusion.hf.arch import ATTENTION, FFN, Arch
from ffn_fusion.hf.checkpoint import Source, Spec
from ffn_fusion.hf.recipe import Recipe

LINEAR_ATTENTION = f"{ATTENTION}.linear_attn"
LINEAR_FFN = f"{FFN}.linear_mlp"
"""Names of nemotron-nas, within a layer."""
Rows = Callable[[Tensor], Tensor]
"""Picks from a tensor of the first projection, weight or bias, what reaches the second."""


def linear_attention(source: Source, prefix: str, arch: Arch, head_dim: int) -> dict[str, Recipe]:
    """Value and output projection of an attention as one: what it is where each token attends to itself."""
    assert head_dim
    output = f"{prefix}{ATTENTION}.o_proj"
    queries = source.specs[f"{output}.weight"].shape[1]
    packed = len(arch.kv) == 1

    def rows(tensor: Tensor) -> Tensor:
        # Packed: queries, keys, values.
        values = tensor[queries:].chunk(2)[1] if packed else tensor
        return repeat_heads(values, head_dim, queries // len(values))

    return _recipes(source, LINEAR_ATTENTION, f"{prefix}{ATTENTION}.{arch.kv[-1]}", output, rows)


def linear_ffn(source: Source, prefix: str, arch: Arch) -> dict[str, Recipe]:
    """Up and down projection of an FFN as one, its gate and activation left out."""

    def rows(tensor: Tensor) -> Tensor:
        # Packed: gate, up.
        return tensor.chunk(arch.parts)[-1]

    first, second = f"{prefix}{FFN}.{arch.inputs[-1]}", f"{prefix}{FFN}.{arch.output}"
    return _recipes(source, LINEAR_FFN, first, second, rows)


def _recipes(source: Source, name: str, first: str, second: str, rows: Rows) -> dict[str, Recipe]:
    """Weight of the projections `first` and `second` as one; a bias too where one of them has one."""
    weights = (f"{first}.weight", f"{second}.weight")
    (hidden_size, _), dtype = source.specs[weights[1]]
    recipes = {
        f"{name}.weight": Recipe(
            Spec((hidden_size, hidden_size), dtype), weights, partial(_weight, source, weights, rows)
        )
    }
    biases = tuple(bias for bias in (f"{first}.bias", f"{second}.bias") if bias in source.specs)
    if biases:
        build = partial(_bias, source, first, second, rows)
        recipes[f"{name}.bias"] = Recipe(Spec((hidden_size,), dtype), (weights[1], *biases), build)
    return recipes


def _weight(source: Source, weights: tuple[str, str], rows: Rows) -> Tensor:
    return product(source.read(weights[1]), rows(source.read(weights[0])))


def _bias(source: Source, first: str, second: str, rows: Rows) -> Tensor:
    names = f"{first}.bias", f"{second}.bias"
    inner, outer = (source.read(name) if name in source.specs else None for name in names)
    return product_bias(source.read(f"{second}.weight"), None if inner is None else rows(inner), outer)
