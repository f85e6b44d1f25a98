"""What every task is to `eval`: something that turns a model into one value an item."""

from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ffn_fusion.tasks.scorer import Conversation, Scorer, chat_prompt, plain_prompt


@dataclass(frozen=True)
class About:
    """What a reader must know to repeat a task."""

    version: str
    data: str
    num_items: int
    total_items: int
    num_fewshot: int = 0
    chat_template: bool = False
    note: str = ""


@dataclass(frozen=True)
class Items:
    """A model's values on a task's items, by metric; None where an item has none. `responses` are generated texts."""

    values: dict[str, list[float | None]]
    higher_is_better: dict[str, bool]
    responses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """How a task is put to the models: how many of its items, and whether through the chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    limit: int | None

    def prompt(self, conversation: Conversation) -> str:
        """A conversation as the text that the model continues."""
        return chat_prompt(self.tokenizer)(conversation) if self.chat else plain_prompt(conversation)


class Benchmark(Protocol):
    """A task, ready to run. `key` changes with anything but the models that its values depend on."""

    name: str
    about: About
    key: str
    compares: bool
    """Whether the values depend on the parent too."""

    def texts(self) -> list[str]:
        """Question and answers of each item as one text, to look for in what a student was fitted to."""

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        """Values of `lm`; `UserError` if the task cannot be done."""
