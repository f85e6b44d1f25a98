"""Plan and parent → the recipe of every student tensor. Recipes know their shapes before any weight is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import Literal, Protocol

import torch
from torch import Tensor

from ffn_fusion.core import fusion, pruning
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
from ffn_fusion.core.pruning import Channels, Cuts
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, Arch
from ffn_fusion.hf.checkpoint import Source, Spec
from ffn_fusion.hf.recipe import Recipe
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.hf.replace import LINEAR_ATTENTION, LINEAR_FFN, linear_attention, linear_ffn

Norm = Literal["folded", "last"]
LAYER = "model.layers.{}."
WHOLE = Cuts()
"""For plans that give no sizes and name no linear attention."""


class Trained(Protocol):
    """Where trained blocks come from: a library."""

    def makers(self, block: Block) -> Mapping[str, Callable[[], Tensor]]:
        """What replaces the untrained tensors of a block, by name within its layer."""
        ...


def student_recipes(
    plan: Plan, source: Source, arch: Arch, norm: Norm, cuts: Cuts = WHOLE, trained: Trained | None = None
) -> dict[str, Recipe]:
    """A recipe for every tensor of the student, in the order of a forward pass.

    `cuts` is needed by a plan with sizes or linear attentions; its channels only when the recipes are built. Raises
    `UserError` where the algebra cannot express the plan on this parent.
    """
    outside = [name for name in source.specs if not name.startswith("model.layers.")]
    head = [name for name in outside if not name.startswith("model.embed_tokens.")]
    recipes = {name: _copy(source, name) for name in outside if name not in head}
    for index, block in enumerate(plan.blocks):
        prefix = LAYER.format(index)
        made = block_recipes(block, source, arch, norm, cuts, trained)
        recipes |= {prefix + name: recipe for name, recipe in made.items()}
    return recipes | {name: _copy(source, name) for name in head}


def dropped_tensors(recipes: dict[str, Recipe], source: Source) -> list[str]:
    """Source tensors that no recipe uses: what the plan removes, and the norms it replaces."""
    used = {name for recipe in recipes.values() for name in recipe.sources}
    return sorted(set(source.specs) - used)


def block_recipes(
    block: Block, source: Source, arch: Arch, norm: Norm, cuts: Cuts = WHOLE, trained: Trained | None = None
) -> dict[str, Recipe]:
    """Recipes of one block, by tensor name within its layer; where `trained` has the block they are its tensors."""
    recipes = _untrained(block, source, arch, norm, cuts)
    for name, make in (trained.makers(block) if trained else {}).items():
        recipes[name] = replace(recipes[name], build=partial(_as, recipes[name].spec, make))
    return recipes


def _as(spec: Spec, make: Callable[[], Tensor]) -> Tensor:
    tensor = make().to(spec.dtype)
    assert tuple(tensor.shape) == spec.shape
    return tensor


def _untrained(block: Block, source: Source, arch: Arch, norm: Norm, cuts: Cuts) -> dict[str, Recipe]:
    recipes = _attention(block.attention, source, arch, cuts.head_dim) if block.attention else {}
    if not block.ffns:
        return recipes | _zero_ffn(source, arch)
    if block.has_linear_ffn:
        return recipes | _linear_ffn(block.ffns[0], source, arch)
    return recipes | _FfnRecipes(block, source, arch, norm, cuts.channels).all()


def _attention(attention: Attention, source: Source, arch: Arch, head_dim: int) -> dict[str, Recipe]:
    prefix = LAYER.format(attention.layer)
    norm = _copies(source, prefix, ATTENTION_NORM)
    if attention.linear and f"{prefix}{LINEAR_ATTENTION}.weight" not in source.specs:
        return norm | linear_attention(source, prefix, arch, head_dim)
    recipes = norm | _copies(source, prefix, ATTENTION)
    if attention.kv_heads is not None:
        recipes |= _merged_heads(source, prefix, arch, head_dim, attention.kv_heads)
    return recipes


def _linear_ffn(ffn: Ffn, source: Source, arch: Arch) -> dict[str, Recipe]:
    prefix = LAYER.format(ffn.layer)
    norm = _copies(source, prefix, FFN_NORM)
    if f"{prefix}{LINEAR_FFN}.weight" in source.specs:
        return norm | _copies(source, prefix, FFN)
    return norm | linear_ffn(source, prefix, arch)


def _merged_heads(source: Source, prefix: str, arch: Arch, head_dim: int, kv_heads: int) -> dict[str, Recipe]:
    """Keys and values with their heads merged into `kv_heads` by their mean, biases too; the norms of heads stay."""
    assert head_dim
    queries = source.specs[f"{prefix}{ATTENTION}.o_proj.weight"].shape[1]
    packed = len(arch.kv) == 1
    recipes = {}
    for name in (f"{ATTENTION}.{into}.{part}" for into in arch.kv for part in ("weight", "bias")):
        if prefix + name not in source.specs:
            continue
        spec = source.specs[prefix + name]
        first, kinds = (queries, 2) if packed else (0, 1)
        held, rows = spec.shape[0] - first, kinds * kv_heads * head_dim
        build = partial(_pool, source, prefix + name, head_dim, held // rows, first)
        recipes[name] = Recipe(spec._replace(shape=(first + rows, *spec.shape[1:])), (prefix + name,), build)
    return recipes


def _pool(source: Source, name: str, head_dim: int, group: int, first: int) -> Tensor:
    return pruning.pool_heads(source.read(name), head_dim, group, first)


def _copies(source: Source, prefix: str, part: str) -> dict[str, Recipe]:
    start = f"{prefix}{part}."
    return {name.removeprefix(prefix): _copy(source, name) for name in source.specs if name.startswith(start)}


def _copy(source: Source, name: str) -> Recipe:
    return Recipe(source.specs[name], (name,), lambda: source.read(name))


def _zero_ffn(source: Source, arch: Arch) -> dict[str, Recipe]:
    """The narrowest FFN of the layout, all zeros behind a neutral norm: what follows an attention without FFN.

    llama.cpp leaves out an attention that has no FFN behind it, without a word, so every block gets one.
    """
    output = f"{FFN}.{arch.output}.weight"
    # Which projections have a bias, and their dtypes, are the same in every layer that has an FFN.
    like = next(name.removesuffix(output) for name in source.specs if name.endswith(output))
    recipes = {}
    for part in (FFN_NORM, FFN):
        for name in _copies(source, like, part):
            spec = source.specs[like + name]
            value = 1.0 - arch.norm_offset if name == f"{FFN_NORM}.weight" else 0.0
            spec = spec._replace(shape=_narrowed(name, spec.shape, arch))
            recipes[name] = Recipe(spec, (), partial(torch.full, spec.shape, value, dtype=spec.dtype))
    return recipes


def _narrowed(name: str, shape: tuple[int, ...], arch: Arch) -> tuple[int, ...]:
    """Shape of a tensor of an FFN or its norm when the FFN has the least width: [d, h] down, [h, d] or [h] up."""
    if name == f"{FFN}.{arch.output}.weight":
        return shape[0], WIDTH_MULTIPLE
    if name.startswith(tuple(f"{FFN}.{into}." for into in arch.inputs)):
        return arch.parts * WIDTH_MULTIPLE, *shape[1:]
    return shape


class _FfnRecipes:
    """The FFN of one block: one member copied, cut or padded, or several fused."""

    def __init__(self, block: Block, source: Source, arch: Arch, norm: Norm, channels: Channels) -> None:
        self.prefixes = [LAYER.format(ffn.layer) for ffn in block.ffns]
        self.source, self.arch, self.channels = source, arch, channels
        self.members = block.ffns
        self.folds = block.is_fused and norm == "folded"
        self.width = fusion.padded_width(sum(map(self._width, self.members)), WIDTH_MULTIPLE)
        self.hidden_size, self.dtype = self._spec(self.prefixes[0], f"{FFN}.{arch.output}.weight")
        self._check()

    def all(self) -> dict[str, Recipe]:
        recipes = dict(self._norm())
        for name in self.arch.inputs:
            recipes[f"{FFN}.{name}.weight"] = self._input_weight(name)
            if self._has(f"{FFN}.{name}.bias"):
                recipes[f"{FFN}.{name}.bias"] = self._input_bias(name)
        recipes[f"{FFN}.{self.arch.output}.weight"] = self._output_weight()
        bias = f"{FFN}.{self.arch.output}.bias"
        if self._has(bias):
            names = self._names(bias)
            recipes[bias] = self._recipe(
                (self.hidden_size,), names, lambda: fusion.sum_biases([*map(self.source.read, names)])
            )
        return recipes

    def _norm(self) -> Iterator[tuple[str, Recipe]]:
        for part, kept in (("weight", 1.0 - self.arch.norm_offset), ("bias", 0.0)):
            name = f"{FFN_NORM}.{part}"
            if not self._has(name):
                continue
            last = self.prefixes[-1] + name
            spec = self.source.specs[last]
            if self.folds:
                yield name, Recipe(spec, (), partial(torch.full, spec.shape, kept, dtype=spec.dtype))
            else:
                yield name, _copy(self.source, last)

    def _input_weight(self, name: str) -> Recipe:
        weights = self._names(f"{FFN}.{name}.weight")
        gains = self._names(f"{FFN_NORM}.weight") if self.folds else ()
        rows = self.arch.parts * self.width

        def build() -> Tensor:
            parts = [
                fusion.stack_rows((self._member(i, name, part) for i in range(len(weights))), self.width)
                for part in range(self.arch.parts)
            ]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return self._recipe((rows, self.hidden_size), weights + gains, build)

    def _member(self, index: int, name: str, part: int) -> Tensor:
        prefix = self.prefixes[index]
        weight = self._kept(index, self.source.read(f"{prefix}{FFN}.{name}.weight").chunk(self.arch.parts)[part], 0)
        if not self.folds:
            return weight
        gain = self.source.read(f"{prefix}{FFN_NORM}.weight")
        return fusion.scale_columns(weight, gain.to(fusion.wide(gain.dtype)) + self.arch.norm_offset)

    def _input_bias(self, name: str) -> Recipe:
        biases = self._names(f"{FFN}.{name}.bias")
        norm_bias = f"{FFN_NORM}.bias"
        extra = (
            self._names(norm_bias) + self._names(f"{FFN}.{name}.weight") if self.folds and self._has(norm_bias) else ()
        )

        def member(index: int, prefix: str) -> Tensor:
            bias = self.source.read(f"{prefix}{FFN}.{name}.bias")
            if extra:
                weight = self.source.read(f"{prefix}{FFN}.{name}.weight")
                bias = fusion.fold_bias(weight, self.source.read(prefix + norm_bias), bias)
            return self._kept(index, bias, 0)

        return self._recipe(
            (self.width,),
            biases + extra,
            lambda: fusion.stack_rows(starmap(member, enumerate(self.prefixes)), self.width),
        )

    def _output_weight(self) -> Recipe:
        names = self._names(f"{FFN}.{self.arch.output}.weight")
        return self._recipe(
            (self.hidden_size, self.width),
            names,
            lambda: fusion.stack_columns(
                (self._kept(index, self.source.read(each), 1) for index, each in enumerate(names)), self.width
            ),
        )

    def _kept(self, index: int, tensor: Tensor, dim: int) -> Tensor:
        """Of a member that is cut, the channels that are kept."""
        member = self.members[index]
        if member.width is None:
            return tensor
        channels = self.channels[member.layer]
        assert len(channels) == member.width
        return tensor.index_select(dim, channels.to(tensor.device))

    def _check(self) -> None:
        """Refuse what has no exact fused form: a norm bias without an FFN bias to fold it into."""
        no_slot = not self._has(f"{FFN}.{self.arch.inputs[0]}.bias")
        if self.folds and no_slot and self._has(f"{FFN_NORM}.bias"):
            raise UserError(
                "the FFN norm has a bias and the FFN has none to fold it into; use --norm last to keep the last norm"
            )

    def _recipe(self, shape: tuple[int, ...], sources: tuple[str, ...], build: Callable[[], Tensor]) -> Recipe:
        return Recipe(Spec(shape, self.dtype), sources, build)

    def _names(self, name: str) -> tuple[str, ...]:
        return tuple(prefix + name for prefix in self.prefixes)

    def _has(self, name: str) -> bool:
        return self.prefixes[-1] + name in self.source.specs

    def _spec(self, prefix: str, name: str) -> tuple[int, torch.dtype]:
        spec = self.source.specs[prefix + name]
        return spec.shape[0], spec.dtype

    def _width(self, member: Ffn) -> int:
        down = f"{LAYER.format(member.layer)}{FFN}.{self.arch.output}.weight"
        return member.width or self.source.specs[down].shape[1]
