"""`generate`: talk to a parent or a student."""

import sys

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ffn_fusion.hf.machine import device_map, pick_dtype
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.settings import Machine, Positive


def generate(
    model: str,
    prompt: str | None = None,
    *,
    max_new_tokens: Positive = 128,
    machine: Machine = Machine(),  # noqa: B008, frozen
) -> None:
    """Answer a prompt, or chat line by line when none is given. Greedy, through the model's chat template.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    prompt
        What to ask; without it, lines are read from standard input.
    max_new_tokens
        Longest answer.
    """
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder, machine.trust_remote_code)
    loaded = folder.load(pick_dtype(machine, folder.checkpoint), device_map(machine))
    messages: list[dict[str, str]] = []
    for line in [prompt] if prompt is not None else sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": _answer(loaded, tokenizer, messages, max_new_tokens)})


@torch.no_grad()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_new_tokens: int
) -> str:
    """Stream the answer to standard output and return it; a base model without a template continues the last line."""
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = {
        name: tensor.to(model.device) for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")
    }
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
