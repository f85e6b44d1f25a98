"""Scoring speed and agreement: our scorer against the harness' own `hf` model, same items, one process.

    python benchmarks/evaluation.py [--items 200] [--dtype fp32] [--device auto]

Needs the question sets (`ffn-fusion eval --fetch-data`). Prints, for each task, how many items the two score alike, the
largest difference of log-probabilities, and the seconds of both; then the totals.
"""

import argparse
import copy
import time

import torch
from lm_eval.models.huggingface import HFLM

from ffn_fusion.hf.machine import DTYPES, pick_device
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.settings import Machine
from ffn_fusion.tasks.benchmark import Setting
from ffn_fusion.tasks.catalog import Catalog
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.scorer import Scorer

TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada_openai")


class Plain(HFLM):
    """The harness' model with nothing changed; `answer` is how our tasks call a model."""

    def answer(self, kind: str, requests: list) -> list:
        return getattr(self, kind)(requests, disable_tqdm=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    folder = resolve_model(options.model)
    tokenizer = load_tokenizer(folder)
    model = folder.load(DTYPES[options.dtype], str(pick_device(Machine(device=options.device))))
    # A tokenizer each: the harness changes what it is given.
    plain = Plain(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size,
                  softmax_dtype=torch.float32)  # fmt: skip
    ours = Scorer(model, tokenizer, {})
    catalog = Catalog({})
    seconds = {"ours": 0.0, "harness": 0.0}
    for name in TASKS:
        task = HarnessTask(catalog, catalog.leaves(name)[0], Setting(tokenizer, False, options.items))
        found = {}
        for label, scorer in (("harness", plain), ("ours", ours)):
            start = time.perf_counter()
            found[label] = task.run(scorer, scorer)
            took = time.perf_counter() - start
            seconds[label] += took
            found[f"{label} seconds"] = took
        lines = []
        for metric, values in found["ours"].values.items():
            other = found["harness"].values[metric]
            if "likelihood" in metric:
                lines.append(f"{metric} within {max(abs(a - b) for a, b in zip(values, other, strict=True)):.2g}")
            else:
                same = sum(a == b for a, b in zip(values, other, strict=True))
                lines.append(f"{metric} {same} of {len(values)} alike")
        print(f"{name:16} {'; '.join(lines)}; ours {found['ours seconds']:.1f} s, harness "
              f"{found['harness seconds']:.1f} s")  # fmt: skip
    print(f"all: ours {seconds['ours']:.1f} s, harness {seconds['harness']:.1f} s")


if __name__ == "__main__":
    main()
