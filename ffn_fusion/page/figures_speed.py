"""Figures of benches: time against batch, how near to the device's limit, and what each step of the way wins."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ffn_fusion.core.bench_records import BenchResult, BenchRow
from ffn_fusion.core.latency import LatencyResult
from ffn_fusion.page.figures import BLUE, GREEN, GREY, INK, MUTED, RED, SERIES, render, short

STEPS = {"parent": GREY, "searched": GREEN, "fused": RED}
"""What a waterfall goes through, and its colours."""


def prompts(result: BenchResult) -> list[int]:
    """Prompt lengths of the rows."""
    return sorted({result.prompt_of(row) for row in result.rows})


def of_prompt(result: BenchResult, prompt: int) -> list[BenchRow]:
    return [row for row in result.rows if result.prompt_of(row) == prompt]


def speed(name: str, rows: Sequence[BenchRow]) -> str:
    """Decode time per batch size, the models side by side, the whiskers quartiles."""
    models = list(dict.fromkeys(row.model for row in rows))
    batches = sorted({row.batch_size for row in rows})
    width = 0.8 / max(len(models), 1)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, model in enumerate(models):
            own = [row for row in rows if row.model == model]
            places = [batches.index(row.batch_size) + (i - (len(models) - 1) / 2) * width for row in own]
            times = [row.decode_ms for row in own]
            quartiles = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
            axes.bar(
                places, [t.median for t in times], width * 0.92, yerr=np.maximum(quartiles, 0),
                color=SERIES[i % len(SERIES)], error_kw={"elinewidth": 1, "ecolor": INK}, label=short(model),
            )  # fmt: skip
            for place, row in zip(places, own, strict=True):
                if row.decode_speedup is not None:
                    at = (place, max(row.decode_ms.high, row.decode_ms.median))
                    text = f"{row.decode_speedup:.2f}×"
                    axes.annotate(text, at, (0, 2), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.margins(y=0.12)
        axes.set_xlabel("batch size")
        axes.set_ylabel("decode step, ms")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1, handleheight=1)

    return render(name, 3.4, paint)


def roofline(name: str, rows: Sequence[BenchRow]) -> str:
    """Share of the copy bandwidth that decoding reaches, over the batch."""
    models = list(dict.fromkeys(row.model for row in rows))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, model in enumerate(models):
            own = sorted((row for row in rows if row.model == model), key=lambda row: row.batch_size)
            shares = [100 * row.bandwidth_share for row in own]
            axes.plot(
                [row.batch_size for row in own], shares, marker="o", markersize=4, linewidth=1.3,
                color=SERIES[i % len(SERIES)], label=short(model),
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        batches = sorted({row.batch_size for row in rows})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.axhline(100, color=MUTED, linewidth=0.8)
        axes.set_ylim(0, 108)
        axes.set_xlabel("batch size")
        axes.set_ylabel("of the copy bandwidth, %")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    return render(name, 3.2, paint)


def waterfall(name: str, result: BenchResult, rows: Sequence[BenchRow]) -> str:
    """From the parent's decode step to the fused one's, and what each step takes off; empty without such steps."""
    steps = {model.model: model.step for model in result.models}
    by_batch: dict[int, dict[str, float]] = {}
    for row in rows:
        if steps.get(row.model) in STEPS:
            by_batch.setdefault(row.batch_size, {})[steps[row.model]] = row.decode_ms.median
    whole = {batch: own for batch, own in by_batch.items() if len(own) > 1 and "parent" in own}
    if not whole:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ticks: list[tuple[float, str]] = []
        place = 0.0
        for batch, own in whole.items():
            before = None
            for step in (step for step in STEPS if step in own):
                ms, share = own[step], own[step] / own["parent"]
                axes.bar(place, 100 * share, 0.82, color=STEPS[step], label=step if batch == min(whole) else None)
                if before is not None:
                    # What the step takes off hangs from the bar before it.
                    axes.bar(
                        place, 100 * (before - share), 0.82, 100 * share, fill=False, edgecolor=MUTED, linestyle=":"
                    )
                top = 100 * max(share, before or 0)
                text = f"{ms:.3g} ms" if before is None else f"{100 * (share - before):+.1f}".replace("-", "−")
                axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
                before = share
                place += 1
            ticks.append((place - 0.5 - len(own) / 2, f"batch {batch}"))
            place += 0.7
        axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
        axes.set_ylabel("decode step, % of the parent's")
        axes.margins(y=0.1)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, handlelength=1, handleheight=1)

    return render(name, 3.4, paint)


def agreement(name: str, result: LatencyResult) -> str:
    """Decode steps as the model predicts them without having seen them, over the measured ones."""
    times = [ms for point in result.points for ms in (point.ms, point.left_out_ms)]
    ends = [0.0, max(times) * 1.08]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        measured = [point.ms for point in result.points]
        axes.plot(
            measured, [p.left_out_ms for p in result.points], color=BLUE, marker="o", markersize=4, linestyle="none"
        )
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_box_aspect(1)
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted, ms")
        axes.grid()

    return render(name, 4.2, paint)
