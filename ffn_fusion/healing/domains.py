"""Held-out text of several domains: the parent's answer to it is kept, and the student is measured against it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.distill import token_chunks
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

    def score(self, student: Model) -> dict[str, DomainScore]:
        """Every domain at once; all ranks must ask."""
        found = {}
        for domain in self.domains:
            rows = []
            for place, theirs in zip(own_places(len(domain.ids), self.ranks), self.hidden[domain.name], strict=True):
                rows.append((place, self._sums(student, domain.ids[place], theirs)))
            sums = dict(row for part in self.ranks.gather(rows) for row in part)
            columns = list(zip(*(sums[place] for place in range(len(domain.ids))), strict=True))
            counts = [domain.ids.shape[1] - 1] * len(domain.ids)
            kl, own, parent = (estimate(column, counts) for column in columns)
            found[domain.name] = DomainScore(kl, own, parent.mean)
        return found

    @torch.no_grad()
    def _sums(self, student: Model, ids: Tensor, theirs: Tensor) -> tuple[float, float, float]:
        """KL, and negative log-likelihood of student and parent, summed over one window."""
        ids = ids.to(self.ranks.device)
        theirs = theirs.to(self.ranks.device, self.head.weight.dtype)[:-1]

        def use(found: Pass) -> Tensor:
            own, targets, total = found.hidden[0, :-1], ids[1:], torch.zeros(3)
            for place in token_chunks(len(own), len(found.head), own.device):
                wanted = self.head.logits(theirs[place])
                logits = (own[place] @ found.head.T).float() * student.logit_scale
                terms = kl_to(reference(wanted), logits), nll(logits, targets[place]), nll(wanted, targets[place])
                total += torch.stack([term.sum() for term in terms]).cpu()
            return total

        kl, own, parent = student(ids[None], use).tolist()
        return kl, own, parent


def own_places(count: int, ranks: Ranks) -> list[int]:
    """The windows that this rank does. All do equally many, because sharded weights need everyone; so the last may be
    done more than once."""
    return [min(place, count - 1) for place in range(ranks.rank, count + ranks.rank, ranks.size)]


def ask_parent(domains: list[Domain], parent: Model, ranks: Ranks) -> dict[str, Tensor]:
    """Hidden states of the parent on this rank's windows of every domain, [windows, length, d], on the host."""
    found = {}
    with torch.no_grad():
        for domain in domains:
            windows = (domain.ids[place][None].to(ranks.device) for place in own_places(len(domain.ids), ranks))
            found[domain.name] = torch.cat([parent(ids, _hidden).cpu() for ids in windows])
    return found


def _hidden(found: Pass) -> Tensor:
    return found.hidden
