"""Results of the stages that meet engines: `export` and `speculate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffn_fusion.core.records import Sample

QUESTION = "What is the capital of France?"
"""What an export is asked in its engine, through the chat template where there is one."""


@dataclass(frozen=True)
class Divergence:
    """A token of an engine that the student would not have chosen, and by how much its own choice leads (in logits)."""

    prompt: int
    step: int
    lead: float


@dataclass(frozen=True)
class EngineCheck:
    """An export run in its engine, against the student in float32 on the engine's own tokens.

    Greedy tokens are equal where `divergence` is None. `logit_std` is the scale to see `max_logit_error` by.
    """

    engine: str
    version: str
    options: Mapping[str, Any]
    num_prompts: int
    num_tokens: int
    max_logit_error: float
    logit_std: float
    divergence: Divergence | None
    same_tokenizer: bool
    answer: str

    def __str__(self) -> str:
        first = self.divergence
        tokens = "all equal" if first is None else f"first other choice at step {first.step}, {first.lead:.2g} behind"
        return (
            f"{self.engine} {self.version}: logits within {self.max_logit_error:.2g} (their deviation is "
            f"{self.logit_std:.2g}), {self.num_tokens} greedy tokens {tokens}, "
            f"tokenizer {'equal' if self.same_tokenizer else 'DIFFERS'}; it says: {self.answer}"
        )


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, and the engines that it was run in."""

    student: str
    target: str
    dtype: str
    num_bytes: int
    checks: list[EngineCheck]

    def summary(self) -> str:
        lines = [f"{self.student} as {self.target} ({self.dtype}), {self.num_bytes / 1e6:,.1f} MB"]
        return "\n".join([*lines, *map(str, self.checks)])


@dataclass(frozen=True)
class SpeculateResult:
    """Greedy decoding of a target with and without a draft, the same prompts.

    A round is one forward pass of the target, over `draft_tokens` proposals at most.
    """

    target: str
    draft: str
    engine: str
    version: str
    draft_tokens: int
    num_prompts: int
    new_tokens: int
    sample: Sample
    rounds: int
    proposed: int
    accepted: int
    plain_seconds: float
    drafted_seconds: float
    equal_prompts: int
    """Prompts whose output is the same token for token."""

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that the target accepted."""
        return self.accepted / self.proposed

    @property
    def tokens_per_round(self) -> float:
        """New tokens for each forward pass of the target; 1 without a draft."""
        return 1 + self.accepted / self.rounds

    @property
    def plain_speed(self) -> float:
        """Tokens a second without the draft."""
        return self.num_prompts * self.new_tokens / self.plain_seconds

    @property
    def drafted_speed(self) -> float:
        """Tokens a second with it."""
        return self.num_prompts * self.new_tokens / self.drafted_seconds

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.drafted_seconds

    def summary(self) -> str:
        accepted = f"{self.acceptance:.1%} of {self.proposed:,} proposals accepted"
        return (
            f"{self.target}, {self.draft} drafting {self.draft_tokens} tokens; {self.engine} {self.version}\n"
            f"{accepted}, {self.tokens_per_round:.2f} tokens a round\n"
            f"{self.plain_speed:.1f} tokens/s without, {self.drafted_speed:.1f} with the draft: "
            f"{self.speedup:.2f}x\n"
            f"output the same on {self.equal_prompts} of {self.num_prompts} prompts, {self.new_tokens} tokens each"
        )
