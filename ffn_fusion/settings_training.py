"""Options of the verbs that make and use training data: `teach` and `align`."""

from dataclasses import dataclass

from cyclopts import Parameter

from ffn_fusion.settings import Above0, Positive, Share


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Writing:
    """Text that the parent writes itself.

    Parameters
    ----------
    write
        Documents to write in place of answering --text: conversations of a prompt and an answer if the model has a chat
        template, else whatever it writes.
    documents
        Let a chat model, too, write whatever it writes from the token that begins a text: all that it was trained on.
    opening
        Tokens of --text that each document opens with; the model goes on from there, so that what it writes is of the
        kind of that text.
    max_new_tokens
        Longest prompt, and longest answer, in tokens: a longer prompt is rejected, a longer answer cut. Length of all
        documents that are no conversations, in which one text may follow another.
    prompt_temperature
        Of sampling prompts, and documents that are no conversations.
    answer_temperature
        Of sampling answers.
    top_p
        Share of the probability that tokens are sampled from.
    """

    write: Positive | None = None
    documents: bool = False
    opening: Positive | None = None
    max_new_tokens: Positive = 512
    prompt_temperature: Above0 = 1.0
    answer_temperature: Above0 = 0.7
    top_p: Share = 0.95


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How `align` trains.

    Parameters
    ----------
    lora
        Train adapters of this rank on every linear layer, merged in the end, and not the weights themselves.
    epochs
        Times that each record is used.
    learning_rate
        Of AdamW at its highest; without it 2e-5 for sft and 1e-6 for dpo, and ten times as much with --lora.
    beta
        For dpo: how dearly a change of the answers' likelihood is bought; lower lets the model go further.
    accumulate
        Batches of --batch-size records that make one step.
    gradient_checkpointing
        Compute activations again in the backward pass, which needs less memory and a third more time.
    """

    lora: Positive | None = None
    epochs: Positive = 1
    learning_rate: Above0 | None = None
    beta: Above0 = 0.1
    accumulate: Positive = 1
    gradient_checkpointing: bool = False
