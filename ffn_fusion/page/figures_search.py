"""Figures of a search under a budget and of the scores it went by; they are drawn as those of figures.py."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ffn_fusion.core.comparison import Pair, Series, labels
from ffn_fusion.core.search_records import GOALS
from ffn_fusion.core.stats import Estimate
from ffn_fusion.page.figures import BLUE, GOLD, GREEN, GREY, INK, MUTED, RED, SHADES, plain_log, render, whiskers

COLOURS, MARKS = (RED, GREEN, GOLD, GREY, INK), "sD^vPX"
"""Of rivals; the first series is a blue disc."""
FAINT = 0.4
KL = "KL"
SHORT = 6
SPEEDUPS = (1, 2, 1.5, 3, 1.25, 5, 10, 20, 1.75, 2.5, 4, 1.1, 1.2, 1.3, 1.4, 6, 8, 15, 30, 50, 100)
"""Ticks of the upper axis, those first that come before others where there is no room for both."""
STEPS = (1, 2, 5)
"""Ticks of a log scale in each power of ten; from a range of `MANY` on the first only."""
MANY = 200


def _style(index: int) -> dict[str, Any]:
    """Colour and mark of a series: the first is filled, rivals are open, so that equal plans show through."""
    if index == 0:
        return {"color": BLUE, "marker": "o", "markerfacecolor": BLUE}
    colour, mark = COLOURS[(index - 1) % len(COLOURS)], MARKS[(index - 1) % len(MARKS)]
    return {"color": colour, "marker": mark, "markerfacecolor": "none", "markeredgewidth": 1.1}


def pareto(name: str, series: Sequence[Series], parent_ms: float | None) -> str:
    """KL over decode time: every plan measured, those taken joined, the parent at KL 0; lower left is better."""
    means = [c.kl.mean for s in series for c in s.plans if c.kl.mean > 0]
    low, high = (min(means), max(means)) if means else (0.1, 1.0)
    times = [c.predicted_ms for s in series for c in s.plans] + ([parent_ms] if parent_ms else [])
    room = 0.12 * (max(times) - min(times)) or 0.1 * max(times)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        # Linear from 0 to below the least KL, so that the parent has a place.
        axes.set_yscale("symlog", linthresh=low / 2, linscale=0.35)
        for index, own in enumerate(series):
            _points(axes, own, index)
        axes.set_xlim(min(times) - room, max(times) + room / 2)
        axes.set_ylim(-low / 8, high * 1.7)
        _ticks(axes.yaxis, low / 2, high)
        axes.axhline(0, color=MUTED, linewidth=0.6)
        if parent_ms:
            axes.plot(parent_ms, 0, marker="*", markersize=10, color=INK, linestyle="none", label="parent", zorder=4)
            _speedups(axes, parent_ms)
        for candidate, words in labels(series):
            # Below the front; words that are too long for the room beside the axis go the other way.
            aside, side = (-5, "right") if len(words) <= SHORT else (5, "left")
            axes.annotate(
                words.replace(", ", "\n"), (candidate.predicted_ms, candidate.kl.mean), (aside, -4), ha=side, va="top",
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axes.set_xlabel("decode step, ms by the cost table")
        axes.set_ylabel("KL to parent (nats a token)")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)

    return render(name, 4.2, paint)


def _points(axes: Axes, series: Series, index: int) -> None:
    """One series: its front with intervals, what was measured beside it faint."""
    style = _style(index)
    others = style | {"markerfacecolor": "none", "markersize": 4, "linestyle": "none", "alpha": FAINT}
    front = style | {"markersize": 5.5, "linewidth": 1.3, "label": series.name}
    for candidates, options in ((series.others, others), (series.front, front)):
        if candidates:
            spread = whiskers([c.kl for c in candidates])
            places, means = [c.predicted_ms for c in candidates], [c.kl.mean for c in candidates]
            axes.errorbar(places, means, spread, elinewidth=1, **options)


def _ticks(axis: Axis, low: float, high: float) -> None:
    """0, and a few plain numbers in each power of ten: 1, 2 and 5, or 1 alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = STEPS if high / low < MANY else STEPS[:1]
    held = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator([0, *(value for value in held if low < value <= high * 1.7)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _speedups(axes: Axes, parent_ms: float) -> None:
    """The same times as multiples of the parent's speed, on top."""
    left, right = axes.get_xlim()
    shown: dict[float, float] = {}
    for value in SPEEDUPS:
        place = parent_ms / value
        if left <= place <= right and all(abs(place - other) > (right - left) / 10 for other in shown.values()):
            shown[value] = place
    top = axes.twiny()
    top.set_xlim(left, right)
    top.set_xticks(list(shown.values()), [f"{value:g}×" for value in shown])
    top.spines["top"].set_visible(True)
    top.set_xlabel("times as fast as the parent")


def predictions(name: str, series: Sequence[Series]) -> str:
    """Predicted over measured KL of every plan, the rises that searches went by in its place, and milliseconds of plans
    that were timed; on the line they agree."""
    kls = [[pair for pair in own.kls if min(pair) > 0] for own in series]
    held: dict[str, list[list[Pair]]] = {KL: kls}
    for objective in dict.fromkeys(own.objective for own in series if own.goals):
        held[f"rise, {GOALS[objective]}"] = [own.goals if own.objective == objective else [] for own in series]
    held["decode step, ms"] = [own.times for own in series]
    drawn = {what: pairs for what, pairs in held.items() if any(pairs)}

    def paint(figure: Figure) -> None:
        row = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (what, pairs) in zip(row, drawn.items(), strict=True):
            for index, (own, points) in enumerate(zip(series, pairs, strict=True)):
                style = _style(index) | {"linestyle": "none", "markersize": 4.6, "label": own.name}
                axes.plot([p for p, _ in points], [m for _, m in points], **style)
            _agreement(axes, log=what == KL)
            axes.set_title(what, loc="left", fontsize=9, pad=3)
        row[0].set_ylabel("measured")
        handles, names = row[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)

    return render(name, (2.7 if len(drawn) > 1 else 4.4) + 0.2 * math.ceil(len(series) / 3), paint) if drawn else ""


def _agreement(axes: Axes, log: bool) -> None:
    """Both axes over the same range, and the line on which predictions are right."""
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    ends = [*axes.get_xlim(), *axes.get_ylim()]
    low, high = min(ends), max(ends)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=1)
    for axis in (axes.xaxis, axes.yaxis) if log else ():
        _few(axis, (low, high))
    axes.set_xlabel("predicted")
    axes.set_box_aspect(1)
    axes.grid()


def _few(axis: Axis, ends: tuple[float, float]) -> None:
    """Plain numbers on a log scale of any length, few enough for half a figure."""
    axis.set_major_locator(LogLocator(subs=STEPS if ends[1] / ends[0] < MANY else STEPS[:1], numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def changes(name: str, rows: Sequence[tuple[str, Sequence[Estimate | None]]]) -> str:
    """KL of every kind of change at every layer, on a log scale; blank where there is none."""
    values = np.array([[np.nan if kl is None else kl.mean for kl in row] for _, row in rows])
    positive = values[values > 0]
    top = positive.max() if positive.size else 1.0
    low = max(positive.min(), top * 1e-4) if positive.size else 1e-3

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        norm = LogNorm(low, top if top > low else low * 10)
        # A KL that rounds to 0 or below is paler than any, not left blank.
        image = axes.imshow(
            np.ma.masked_invalid(np.maximum(values, low)), SHADES, norm, interpolation="none", aspect="auto"
        )
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(True)
        bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9, pad=0.03, aspect=32)
        bar.set_label("KL to parent (nats a token)")
        bar.outline.set_visible(False)
        plain_log(bar.ax.xaxis)

    return render(name, 1.4 + 0.24 * len(rows), paint)
