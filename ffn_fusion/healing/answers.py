"""Log-probabilities of a model's answers, token by token those that are to be learnt."""

import torch
from transformers import PreTrainedModel

from ffn_fusion.core.losses import nll
from ffn_fusion.healing.examples import IGNORED, Answer


@torch.no_grad()
def log_probability(model: PreTrainedModel, answer: Answer) -> float:
    """Sum over the answer's tokens, in nats."""
    ids = torch.tensor(answer.ids, device=model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    labels = torch.tensor(answer.labels[1:], device=logits.device)
    learnt = labels != IGNORED
    return -float(nll(logits[learnt], labels[learnt]).sum())
