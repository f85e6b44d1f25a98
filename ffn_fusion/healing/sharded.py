"""Models whose blocks are spread over ranks (FSDP2), read and written a tensor at a time in the ordinary format."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ffn_fusion.healing.ranks import Ranks
from ffn_fusion.hf.checkpoint import Checkpoint
from ffn_fusion.hf.model import ModelFolder, materialise, restore_buffers, skeleton
from ffn_fusion.hf.probe import Passthrough
from ffn_fusion.hf.surgery import LAYER

RECOMPILES = 64
"""Blocks of so many different shapes are compiled; torch would go back to eager after eight."""
LARGE = 2**24
"""Parameters of a block that is worth a group of its own. A group costs the host a millisecond in each pass; smaller
blocks are gathered together with embedding and head, once a step."""


@dataclass(frozen=True)
class Pass:
    """What a forward pass leaves: the normed stream behind the last block [windows, length, d], the head's weight
    [vocabulary, d], and the streams asked for, by the number of blocks in front of them."""

    hidden: Tensor
    head: Tensor
    streams: dict[int, Tensor]


class Model(nn.Module):
    """A causal LM that does its losses inside of its forward, where sharded weights are whole.

    Logits are not made: the caller gets hidden states and head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> float:
        return 1 / float(getattr(self.model.config, "logits_scaling", 1.0))

    def forward(
        self,
        ids: Tensor,
        use: Callable[[Pass], Any],
        keep: Collection[int] = (),
        given: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """`use` of the pass over `ids` [windows, length]; `keep` names the streams it needs.

        With `given` only those blocks run, each on the stream it is given, [windows, length, d].
        """
        trunk = self.model.model
        layers = trunk.layers
        streams: dict[int, Tensor] = {}
        hooks = []
        for index, layer in enumerate(layers):
            if given is not None and index in given:
                hooks.append(layer.register_forward_pre_hook(partial(_swap, given[index])))
            if index in keep and given is None:
                hooks.append(layer.register_forward_pre_hook(partial(_note, streams, index)))
            if index + 1 in keep and (given is not None or index + 1 == len(layers)):
                hooks.append(layer.register_forward_hook(partial(_note_output, streams, index + 1)))
        if given is not None:
            trunk.layers = nn.ModuleList(layer if i in given else Passthrough() for i, layer in enumerate(layers))
        try:
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            trunk.layers = layers
            for hook in hooks:
                hook.remove()
        return use(Pass(hidden, self.model.get_output_embeddings().weight, streams))


def _swap(stream: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return stream, *args[1:]


def _note(streams: dict[int, Tensor], index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    streams[index] = args[0]


def _note_output(streams: dict[int, Tensor], index: int, _: nn.Module, __: Any, out: Tensor) -> None:
    streams[index] = out


@dataclass(frozen=True)
class Form:
    """How a model is held: the dtype it computes in, and whether it trains, then with float32 weights."""

    compute: torch.dtype
    compiled: bool = False
    trains: Callable[[str], bool] | None = None
    """Whether the parameter of a name moves; None for a model that is only asked."""
    checkpointed: bool = False
    """Activations of a block are computed again in the backward pass."""


def load(folder: ModelFolder, config: Any, form: Form, ranks: Ranks) -> Model:
    """The model of a folder in the form asked for, under `config`; each rank holds its share, and one whole block at
    most while it loads."""
    checkpoint = folder.checkpoint
    model = skeleton(config)
    stored = torch.float32 if form.trains else form.compute
    policy = MixedPrecisionPolicy(param_dtype=form.compute, reduce_dtype=torch.float32)
    shard = partial(fully_shard, mesh=ranks.mesh, mp_policy=policy)
    for index, layer in enumerate(model.model.layers):
        prefix = LAYER.format(index)
        _fill(layer, checkpoint, prefix, ranks.device, stored, form)
        if form.compiled:
            torch._dynamo.config.recompile_limit = RECOMPILES
            layer.forward = torch.compile(layer.forward, dynamic=False)
        # A rank alone has nothing to gather.
        if ranks.size > 1 and sum(parameter.numel() for parameter in layer.parameters()) >= LARGE:
            shard(layer)
    _fill(model, checkpoint, "", ranks.device, stored, form, skip=LAYER.split("{", maxsplit=1)[0])
    model.tie_weights()
    restore_buffers(model, ranks.device)
    if form.checkpointed:
        model.train()
        # The name from transformers 5.23 on, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    wrapped = Model(model)
    # A model that is only asked needs no sharding where it fits, and no copy of its weights then.
    if form.trains or ranks.size > 1:
        shard(wrapped)
    return wrapped


def _fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    form: Form,
    skip: str = "\0",
) -> None:
    names = [name for name in checkpoint.specs if name.startswith(prefix) and not name.startswith(skip)]
    materialise(module, {n.removeprefix(prefix): partial(checkpoint.read, n) for n in names}, device, dtype)
    for name in names:
        trains = form.trains is not None and form.trains(name)
        module.get_parameter(name.removeprefix(prefix)).requires_grad_(trains)


def whole(tensor: Tensor) -> Tensor:
    """A parameter that may be spread over ranks; all of them must ask."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def whole_weights(model: Model, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The model's weights one after the other; all ranks must take them."""
    # The root's weights are whole since its last forward pass, and then not those that the optimizer moves.
    cast(FSDPModule, model).reshard()
    for name in names:
        yield name, whole(model.model.get_parameter(name))
