"""Figures of healing; they are drawn as those of figures.py."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from ffn_fusion.core.heal_records import CheckUp, HealResult, Measure, TrainingPoint
from ffn_fusion.page.figures import BLUE, GOLD, GREEN, GREY, INK, MUTED, RED, render, whiskers

COLOURS, MARKS = (BLUE, RED, GREEN, GOLD, GREY, INK), "osD^vP"


def domains(name: str, check_ups: Sequence[CheckUp], measure: Measure, best: int) -> str:
    """Every domain at every check-up over the tokens trained on; the check-up whose weights were kept is marked."""
    tokens = [check_up.num_tokens for check_up in check_ups]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        if measure == "kl":
            _log(axes)
        for index, domain in enumerate(check_ups[0].domains):
            values = [check_up.domains[domain].value(measure) for check_up in check_ups]
            colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
            means = [value.mean for value in values]
            axes.errorbar(tokens, means, yerr=whiskers(values), color=colour, elinewidth=0.8, linewidth=1.3)
            axes.plot(tokens, means, color=colour, marker=mark, markersize=4, linewidth=0, label=domain)
        axes.axvline(tokens[best], color=MUTED, linewidth=0.8, linestyle=":")
        what = "KL to parent" if measure == "kl" else "negative log-likelihood"
        _label(figure, axes, f"{what} (nats a token)")

    return render(name, 3.4, paint)


def losses(name: str, curve: Sequence[TrainingPoint]) -> str:
    """Every loss of training over tokens, on a log scale."""
    names = list(dict.fromkeys(loss for point in curve for loss in point.losses))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _log(axes)
        for index, loss in enumerate(names):
            points = [(point.num_tokens, point.losses[loss]) for point in curve if loss in point.losses]
            tokens, values = zip(*points, strict=True)
            axes.plot(tokens, values, color=COLOURS[index % len(COLOURS)], linewidth=1.1, label=loss)
        _label(figure, axes, "training loss, a token")

    return render(name, 3.0, paint)


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(figure: Figure, axes: Axes, ylabel: str) -> None:
    """Tokens along the bottom, and above it the name of each line."""
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)


def rows(result: HealResult) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each domain, its KL to the parent and its perplexity over the parent's, before and after."""
    start, best = result.check_ups[0], result.check_ups[result.best]
    found = []
    for domain, after in best.domains.items():
        before = start.domains[domain]
        ratios = f"{before.perplexity_ratio:.3f}", f"{after.perplexity_ratio:.3f}"
        found.append((domain, [(str(before.kl), str(after.kl)), ratios]))
    return found
