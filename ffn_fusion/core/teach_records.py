"""Results of `teach`, as they are written to the `record.json` of a folder of answers."""

from dataclasses import dataclass

from ffn_fusion.core.records import Sample


@dataclass(frozen=True)
class Written:
    """Text that the parent wrote itself: documents kept, and those that were not, by the reason."""

    documents: int
    chat: bool
    """Prompts and answers through the chat template; else documents."""
    rejected: dict[str, int]
    openings: Sample | None = None
    """What documents open with; without it, with nothing but the token that begins one."""

    @property
    def share_rejected(self) -> float:
        return sum(self.rejected.values()) / (self.documents + sum(self.rejected.values()))

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejected.items()))
        kind = "conversations" if self.chat else "documents"
        return (
            f"{self.documents:,} {kind} written, {self.share_rejected:.1%} of all begun rejected ({reasons or 'none'})"
        )


@dataclass(frozen=True)
class Form:
    """What stands beside each token of a window (docs/formats.md says how)."""

    length: int
    vocab_size: int
    hidden_size: int
    k: int
    temperature: float
    layers: list[int]
    """Layers of the parent behind which the stream is stored."""

    def __str__(self) -> str:
        streams = f" and the stream behind layer {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"the {self.k} likeliest of {self.vocab_size:,} tokens at temperature {self.temperature:g}{streams}"


@dataclass(frozen=True)
class Answers:
    """The shards of a folder: all of `windows_per_shard` windows, the last one of what is left."""

    form: Form
    num_windows: int
    windows_per_shard: int
    num_bytes: int
    tail_mass: float
    """Mean probability of all tokens that are not among the k."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_windows // self.windows_per_shard)

    def held(self, shard: int) -> int:
        """Windows in a shard."""
        return min(self.windows_per_shard, self.num_windows - shard * self.windows_per_shard)

    def __str__(self) -> str:
        size = self.num_bytes / (self.num_windows * self.form.length)
        return (
            f"{self.num_windows:,} windows of {self.form.length:,} tokens, each with {self.form}\n"
            f"{size:.1f} bytes a token ({self.num_bytes / 1e6:,.1f} MB), {self.tail_mass:.1%} of the mass in the tail"
        )


@dataclass(frozen=True)
class TeachResult:
    """A parent's answers on a text. `parent_key` and `tokenizer_key` say whose they are, wherever the folder lies."""

    parent: str
    parent_key: str
    tokenizer_key: str
    written: Written | None
    sample: Sample | None
    answers: Answers | None

    def summary(self) -> str:
        return "\n".join(str(part) for part in (self.written, self.answers) if part)
