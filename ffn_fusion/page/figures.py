"""Figures of the report: pure functions from results to SVG strings and to cells of the plan strip.

Colours are written as CSS variables of the page, so that one SVG is legible on a light and on a dark background.
"""

import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import Geometry
from ffn_fusion.core.stats import Estimate

INK, MUTED, RULE = "#1c2024", "#656d76", "#dfe2e6"
GREY, BLUE, RED, GREEN, GOLD = "#9aa3ad", "#2f6690", "#c8553d", "#5b8e7d", "#bc8034"
SERIES = (GREY, BLUE, RED, GREEN, GOLD)
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {
    colour: name for colour, name in zip(SERIES, ("grey", "blue", "red", "green", "gold"), strict=True)
}
SHADES = LinearSegmentedColormap.from_list("shades", ["#eaf0f3", "#9fc0cf", "#4f8fb0", "#2d5f8e", "#2b3467"])
WIDTH = 4.6  # inches; at half a desktop page or a whole phone, 9 points come out as 10 to 14 pixels
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Bar:
    """One bar of the steps figure; without an estimate it is the parent, whose loss is 0 by definition."""

    label: str
    source: str
    estimate: Estimate | None


@dataclass(frozen=True)
class Cell:
    """One cell of the plan strip: `row` 1 holds attentions, `row` 2 FFNs, columns count from 1."""

    row: int
    column: int
    span: int
    label: str
    kind: str
    """kept, fused or removed."""
    sizes: str = ""
    """The sublayer in the plan's own words where it has fewer channels or kv heads than its parent's, or is linear."""


def strip(plan: Plan, num_layers: int) -> list[Cell]:
    """The plan as cells over the layers of its parent; a plan out of order is laid out block after block instead."""
    cells, cursor = [], 0
    for block in plan.blocks:
        layers = [ffn.layer for ffn in block.ffns]
        if layers:
            first = min(layers) if plan.is_ordered else cursor
            span = max(layers) - min(layers) + 1 if plan.is_ordered else len(layers)
            kind, sizes = "fused" if block.is_fused else "kept", "F" + "+".join(map(str, block.ffns))
            changed = block.is_cut or block.has_linear_ffn
            cells.append(Cell(2, first + 1, span, "+".join(map(str, layers)), kind, sizes if changed else ""))
        if block.attention:
            layer = block.attention.layer
            column, sizes = layer if plan.is_ordered else cursor, f"A{block.attention}"
            changed = block.attention.linear or layer in plan.kv_heads
            cells.append(Cell(1, column + 1, 1, str(layer), "kept", sizes if changed else ""))
        cursor += max(1, len(layers))
    filled = {(cell.row, column) for cell in cells for column in range(cell.column, cell.column + cell.span)}
    places = [(row, column) for row in (1, 2) for column in range(1, columns(plan, num_layers) + 1)]
    return cells + [Cell(row, column, 1, "", "removed") for row, column in places if (row, column) not in filled]


def columns(plan: Plan, num_layers: int) -> int:
    """Columns of a plan's strip: the parent's layers, or more where a plan is out of order and longer.

    An attention without FFN takes a column too.
    """
    return max(num_layers, sum(max(1, len(block.ffns)) for block in plan.blocks))


def heatmap(name: str, matrix: Sequence[Sequence[float]], groups: Collection[tuple[int, ...]], noun: str) -> str:
    """Dependency on a log scale, later rows of the same column excluded; fused groups are framed."""
    values = np.asarray(matrix, dtype=np.float64)
    shown = np.triu(np.ones(values.shape, dtype=bool), 1) & (values > 0)
    top = values[shown].max() if shown.any() else 1.0
    low = max(values[shown].min(), top * 1e-4) if shown.any() else 1e-3

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        norm = LogNorm(low, top if top > low else low * 10)
        image = axes.imshow(np.ma.masked_where(~shown, values), SHADES, norm, interpolation="none")
        for group in groups:
            corner, side = min(group) - 0.5, max(group) - min(group) + 1
            axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor=RED, linewidth=1.6))
        axes.set_xlabel(f"measured {noun}")
        axes.set_ylabel(f"removed {noun}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(True)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03, aspect=24)
        bar.set_label("cosine distance")
        bar.outline.set_visible(False)
        plain_log(bar.ax.yaxis)

    return render(name, 3.9, paint)


def scores(
    name: str, attention: Sequence[Estimate | None], ffn: Sequence[Estimate | None], removed: Collection[int]
) -> str:
    """KL of removing each sublayer, with 95 % intervals where there are any."""
    scored = list(enumerate(attention))
    ring = {"color": RED, "marker": "o", "markersize": 5, "markerfacecolor": "none", "markeredgewidth": 1.4}
    series: tuple[tuple[str, list[tuple[int, Estimate | None]], dict[str, Any]], ...] = (
        ("FFN", list(enumerate(ffn)), {"color": GREY, "marker": "s", "markersize": 3.2}),
        (
            "attention, kept",
            [p for p in scored if p[0] not in removed],
            {"color": BLUE, "marker": "o", "markersize": 4.2},
        ),
        ("attention, removed", [p for p in scored if p[0] in removed], ring),
    )
    positive = [e.mean for e in (*attention, *ffn) if e is not None and e.mean > 0]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log", nonpositive="clip")
        for label, found, style in series:
            points = [(layer, e) for layer, e in found if e is not None]
            if points:
                spread = whiskers([e for _, e in points])
                means = [e.mean for _, e in points]
                axes.errorbar(
                    [p[0] for p in points], means, spread, linestyle="none", elinewidth=1, label=label, **style
                )
        if positive:
            axes.set_ylim(min(positive) / 2.5, max(positive) * 2.5)
        axes.set_xlabel("layer")
        axes.set_ylabel("KL to parent without it (nats a token)")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_log(axes.yaxis)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)

    return render(name, 3.6, paint)


def geometry(name: str, curves: Geometry, massive: Collection[int]) -> str:
    """The three curves of the residual stream, one above the other; layers with massive activations are shaded."""
    panels = (
        ("turn of the stream (1 − cosine)", curves.turn, BLUE),
        ("length of the contribution / length of the stream, log scale", curves.norm_ratio, GREEN),
        ("cosine of contribution and stream", curves.alignment, GOLD),
    )

    spans: list[tuple[int, int]] = []
    for layer in sorted(massive):
        joins = bool(spans) and layer <= spans[-1][1] + 1
        spans[-1:] = [(spans[-1][0], layer)] if joins else [*spans[-1:], (layer, layer)]

    def paint(figure: Figure) -> None:
        column = figure.subplots(len(panels), 1, sharex=True)
        for axes, (label, values, colour) in zip(column, panels, strict=True):
            for first, last in spans:
                axes.axvspan(first - 0.5, last + 0.5, color=RULE, alpha=0.6, linewidth=0)
            axes.plot(values, color=colour, marker="o", markersize=2.8, linewidth=1.3)
            axes.set_title(label, loc="left", fontsize=9, pad=3)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
        column[1].set_yscale("log", nonpositive="mask")
        plain_log(column[1].yaxis)
        column[2].axhline(0, color=MUTED, linewidth=0.8)
        column[2].set_xlabel("layer")
        column[2].xaxis.set_major_locator(MaxNLocator(integer=True))

    return render(name, 4.4, paint)


def steps(name: str, bars: Sequence[Bar]) -> str:
    """Loss after each step as horizontal bars, coloured by the text they were measured on."""
    sources = list(dict.fromkeys(bar.source for bar in bars if bar.estimate))
    colours = dict(zip(sources, (BLUE, GREEN, GOLD, RED) * len(sources), strict=False))
    places = range(len(bars))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for source, colour in colours.items():
            drawn = [(y, b.estimate) for y, b in zip(places, bars, strict=True) if b.source == source and b.estimate]
            estimates = [e for _, e in drawn]
            axes.barh(
                [y for y, _ in drawn], [e.mean for e in estimates], 0.6, xerr=whiskers(estimates),
                color=colour, error_kw={"elinewidth": 1.2, "ecolor": INK}, label=source,
            )  # fmt: skip
        highest = max([b.estimate.mean for b in bars if b.estimate], default=1.0)
        ends = [_end(b.estimate) for b in bars]
        for y, bar, end in zip(places, bars, ends, strict=True):
            axes.text(
                end + highest * 0.02, y, f"{bar.estimate.mean:.3f}" if bar.estimate else "0", va="center", fontsize=8.5
            )
        axes.set_yticks(list(places), [short(bar.label) for bar in bars])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, max(*ends, highest) * 1.16 or 1)
        axes.set_xlabel("KL to parent (nats a token)")
        axes.grid(axis="x")
        if len(sources) > 1:
            figure.legend(loc="outside upper left", ncols=2, handlelength=1, handleheight=1)

    return render(name, 1.3 + 0.36 * len(bars), paint)


def render(name: str, height: float, paint: Callable[[Figure], None]) -> str:
    """Draw, and make the SVG fit to stand in a page beside others: own ids, no fixed size, no rules that leak."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    head = r'<svg role="img" aria-label="chart, explained in its caption" \1>'
    text = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', head, text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def plain_log(axis: Axis) -> None:
    """Plain numbers at the powers of ten of a log scale."""
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whiskers(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    """Distances from the mean to both ends of the interval, [2, N]; NaN draws none where there is no interval."""
    ends = [(e.mean - e.low, e.high - e.mean) if math.isfinite(e.stderr) else (math.nan, math.nan) for e in estimates]
    return np.asarray(ends, dtype=np.float64).reshape(-1, 2).T


def _end(estimate: Estimate | None) -> float:
    if estimate is None:
        return 0.0
    return estimate.high if math.isfinite(estimate.high) else estimate.mean


def short(label: str, length: int = 24) -> str:
    """The end of a long name, which is where paths differ."""
    return label if len(label) <= length else "…" + label[1 - length :]
