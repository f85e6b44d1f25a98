"""What fusing costs and what calibration wins back: one table over plans, targets and amounts of text.

    python benchmarks/calibration.py --fit-windows 32 --out table.json
    python benchmarks/calibration.py --fit-windows 32 128 1024 --measure-windows 32 \\
        --text builtin:wikipedia DIR --device cuda --out table.json

KL to the parent on held-out text (another source than the calibration text), windows of 1,024 tokens.
"""

import argparse
import json
import time
from dataclasses import asdict

from ffn_fusion import Fusion, Machine, Plan, Text
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import read_windows

MODES = {
    "plain": Fusion(calibrate="none"),
    "last norm": Fusion(calibrate="none", norm="last"),
    "fit to unfused": Fusion(calibrate="unfused"),
    "fit to parent": Fusion(),
}


def plans(parent: Plan) -> list[Plan]:
    """Runs 5-10 and 5-14: attention removed, fused without and with the last FFN, and with the FFN in front."""
    found = []
    for first, last in ((5, 10), (5, 14)):
        removed = parent.without_attention(range(first, last + 1))
        found += [removed] + [
            removed.fuse(range(a, b)) for a, b in ((first, last), (first, last + 1), (first - 1, last + 1))
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--text", nargs="+", default=["builtin:wikipedia"])
    parser.add_argument("--held-out", nargs="+", default=["builtin:novels"])
    parser.add_argument("--fit-windows", type=int, nargs="+", default=[32])
    parser.add_argument("--measure-windows", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    machine = Machine(device=options.device, batch_size=options.batch_size)
    parent = resolve_model(options.model)
    tokenizer = load_tokenizer(parent)
    dtype = pick_dtype(machine, parent.checkpoint)
    model = parent.load(dtype, device_map(machine))
    held_out = read_windows(Text(text=tuple(options.held_out), length=1024), tokenizer, options.measure_windows)
    rows = []
    for count in options.fit_windows:
        fit = read_windows(Text(text=tuple(options.text), length=1024), tokenizer, count, "fit")
        meter = Meter(parent, model, held_out.ids, fit.ids, Fusion(), machine)
        for plan in plans(parent.plan):
            for name, fusion in MODES.items():
                same_for_all = fusion.calibrate == "none" and count != options.fit_windows[0]
                if same_for_all or (fusion != MODES["plain"] and fusion.calibrate != "parent" and not plan.groups):
                    continue
                meter.fusion = fusion
                start = time.perf_counter()
                kl = meter.fused(plan)
                seconds = time.perf_counter() - start
                rows.append(
                    {"plan": str(plan), "mode": name, "tokens": fit.ids.numel(), "kl": asdict(kl), "s": seconds}
                )
                print(f"{fit.ids.numel():8} {plan.groups or 'unfused'!s:50} {name:15} {kl} {seconds:.0f} s", flush=True)
    record = {"environment": asdict(where(machine, dtype)), "held_out": asdict(held_out.sample), "rows": rows}
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(record | {"text": options.text}, file, indent=1)


if __name__ == "__main__":
    main()
