"""One rank of test_decode: prints the logits that all ranks make together."""

import json
import sys
from pathlib import Path

import torch

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.speed.decode import Decoder, DecodeStep
from ffn_fusion.speed.ranks import joined

if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    with joined(order) as ranks:
        model = ModelFolder(Path(order["folder"])).load(torch.float32, "cpu")
        ids = torch.tensor(order["ids"])
        decoder = Decoder(model, torch.Tensor.detach, rank=ranks.rank, total=ranks.total, join=ranks.join)
        step = DecodeStep(decoder, *[ids.shape[0], 0, ids.shape[1]])
        step.ids.copy_(ids)
        logits = step.logits()
    if ranks.rank.index == 0:
        print(json.dumps(logits.tolist()))
