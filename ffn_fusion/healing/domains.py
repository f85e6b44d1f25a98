"""Held-out text of several domains: the parent's answer to it is kept, and the student is measured against it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.distill import logits_of, token_chunks
from ffn_fusion.core.heal_records import DomainScore
from ffn_fusion.core.losses import kl_to, nll, reference
from ffn_fusion.core.stats import estimate
from ffn_fusion.healing.feeds import Head
from ffn_fusion.healing.ranks import Ranks
from ffn_fusion.healing.sharded import Model, Pass
from ffn_fusion.hf.text import read_windows
from ffn_fusion.settings import Text


@dataclass(frozen=True)
class Domain:
    """Windows of one domain [windows, length] and what to call it."""

    name: str
    ids: Tensor
    digest: str


def read_domains(
    sources: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, windows: int, length: int, column: str
) -> list[Domain]:
    """The measuring part of each text, which training never reads."""
    found = []
    for name, source in sources.items():
        text = replace(Text(), text=(source,), column=column, length=length)
        read = read_windows(text, tokenizer, windows, "measure")
        found.append(Domain(name, read.ids, read.sample.digest))
    return found


@dataclass(frozen=True)
class Answers:
    """The parent's hidden states on this rank's windows of every domain, [windows, length, d], on the host."""

    domains: list[Domain]
    hidden: dict[str, Tensor]
    head: Head
    ranks: Ranks
    batch_size: int
    """Windows at once."""

    def score(self, student: Model) -> dict[str, DomainScore]:
        """Every domain at once; all ranks must ask."""
        found = {}
        for domain in self.domains:
            places = own_places(len(domain.ids), self.ranks)
            ids, hidden = (each.split(self.batch_size) for each in (domain.ids[places], self.hidden[domain.name]))
            rows = [row for batch in zip(ids, hidden, strict=True) for row in self._sums(student, *batch)]
            parts = self.ranks.gather(list(zip(places, rows, strict=True)))
            sums = dict(row for part in parts for row in part)
            columns = list(zip(*(sums[place] for place in range(len(domain.ids))), strict=True))
            counts = [domain.ids.shape[1] - 1] * len(domain.ids)
            kl, own, parent = (estimate(column, counts) for column in columns)
            found[domain.name] = DomainScore(kl, own, parent.mean)
        return found

    def _sums(self, student: Model, ids: Tensor, theirs: Tensor) -> list[list[float]]:
        """KL, and negative log-likelihood of student and parent, summed over each window of a batch."""
        ids = ids.to(self.ranks.device)
        targets = ids[:, 1:].flatten()
        theirs = theirs[:, :-1].flatten(0, 1).to(self.ranks.device, self.head.weight.dtype)

        def use(found: Pass) -> Tensor:
            own, terms = found.hidden[:, :-1].flatten(0, 1), []
            for place in token_chunks(len(own), len(found.head), own.device):
                wanted = self.head.logits(theirs[place])
                logits = logits_of(own[place], found.head, student.logit_scale)
                told = nll(logits, targets[place]), nll(wanted, targets[place])
                terms.append(torch.stack([kl_to(reference(wanted), logits), *told]))
            return torch.cat(terms, 1)

        sums = _asked(student, ids, use).double().unflatten(1, (len(ids), -1)).sum(-1)
        rows: list[list[float]] = sums.T.tolist()
        return rows


def own_places(count: int, ranks: Ranks) -> list[int]:
    """The windows that this rank does. All do equally many, because sharded weights need everyone; so the last may be
    done more than once."""
    return [min(place, count - 1) for place in range(ranks.rank, count + ranks.rank, ranks.size)]


def ask_parent(domains: list[Domain], parent: Model, ranks: Ranks, batch_size: int) -> dict[str, Tensor]:
    """Hidden states of the parent on this rank's windows of every domain, [windows, length, d], on the host."""
    found = {}
    for domain in domains:
        batches = domain.ids[own_places(len(domain.ids), ranks)].split(batch_size)
        hidden = [_asked(parent, ids.to(ranks.device), lambda found: found.hidden).cpu() for ids in batches]
        found[domain.name] = torch.cat(hidden)
    return found


@torch.no_grad()
def _asked(model: Model, ids: Tensor, use: Callable[[Pass], Tensor]) -> Tensor:
    # Compiling a model for a few passes without gradients would take longer than they do.
    with torch.compiler.set_stance("force_eager"):
        found: Tensor = model(ids, use)
    return found
