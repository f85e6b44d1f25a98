"""Text sampled from a model with the decode step of `speed/decode.py`: many documents at once, all equally long."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TopPLogitsWarper

from ffn_fusion.speed.arena import available
from ffn_fusion.speed.decode import Decoder
from ffn_fusion.speed.sublayers import Cache

# Not cuDNN's, which torch prefers on some GPUs: it plans anew for each length (40 ms), and every token has its own.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def has_room(model: PreTrainedModel) -> bool:
    """Whether a model is on one device, and its merged weights fit there once more."""
    weights = list(model.parameters())
    devices = {weight.device for weight in weights}
    return len(devices) == 1 and sum(weight.nbytes for weight in weights) < available(devices.pop())


class Sampler:
    """Continues beginnings of one length. Keys and values have their place from the start: nothing grows or moves."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder = Decoder(model, Tensor.detach)

    @torch.no_grad()
    def __call__(self, beginnings: Tensor, num_tokens: int, temperature: float, top_p: float) -> Tensor:
        """Token ids behind each of the beginnings [batch_size, n], [batch_size, num_tokens], drawn from torch's
        generator."""
        decoder = self._decoder
        batch_size, begun = beginnings.shape
        length = begun + num_tokens - 1
        pairs = self._caches(batch_size, length)
        cos, sin = decoder.positions(0, length)
        places = torch.arange(length, device=decoder.device)
        ids = torch.empty(batch_size, length + 1, dtype=torch.long, device=decoder.device)
        ids[:, :begun] = beginnings
        warp = TopPLogitsWarper(top_p) if top_p < 1 else None
        for place in range(length):
            here = slice(place, place + 1)
            caches = []
            for (keys, values), window in zip(pairs, decoder.windows, strict=True):
                first = 0 if window is None else max(0, place + 1 - window)
                own = places[place - first : place - first + 1]
                caches.append(Cache(keys[:, :, first : place + 1], values[:, :, first : place + 1], own, None))
            with sdpa_kernel(BACKENDS):
                logits = decoder.logits(ids[:, here], (cos[here], sin[here]), caches)
            if place + 1 >= begun:
                scores = logits[:, -1].float() / temperature
                scores = warp(ids, scores) if warp else scores
                ids[:, place + 1 : place + 2] = torch.multinomial(scores.softmax(-1), 1)
        return ids[:, begun:]

    def _caches(self, batch_size: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each attention, [batch_size, kv heads, length, head dim]."""
        table = self._decoder.table
        shapes = [(batch_size, step.kv_heads, length, step.head_dim) for step in self._decoder.attentions]
        return [(table.new_empty(shape), table.new_empty(shape)) for shape in shapes]
