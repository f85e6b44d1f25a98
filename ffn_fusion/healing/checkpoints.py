"""Training state on disk: sharded, so that each rank writes its own part and any number of ranks can go on from it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer

from ffn_fusion.healing.ranks import Ranks
from ffn_fusion.healing.sharded import Model

PREFIX = "checkpoint-"


def save(model: Model, optimizers: Sequence[Optimizer], folder: Path, step: int, ranks: Ranks) -> str:
    """Write weights and optimizer state beside the older ones; the name is for whoever says which of them counts."""
    name = f"{PREFIX}{step}"
    weights, state = get_state_dict(model, optimizers)
    if ranks.is_first:
        shutil.rmtree(folder / name, ignore_errors=True)
    ranks.wait()
    save_sharded({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    ranks.wait()
    return name


def restore(model: Model, optimizers: Sequence[Optimizer], folder: Path, name: str) -> None:
    """Put back what `save` wrote; without optimizers only the weights, for a stage that begins anew."""
    weights, state = get_state_dict(model, optimizers)
    wanted: dict[str, Any] = {"model": weights} | ({"optimizer": state} if optimizers else {})
    load(wanted, checkpoint_id=folder / name)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state if optimizers else {})


def forget(folder: Path, keep: str, ranks: Ranks) -> None:
    """Delete all checkpoints but one."""
    if ranks.is_first:
        for path in folder.glob(f"{PREFIX}*"):
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)
