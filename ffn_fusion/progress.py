"""One progress bar with time left, on standard error; a plain line for each stage where there is no terminal."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_CONSOLE = Console(stderr=True)


def track(items: Iterable[T], description: str, total: int, said: Callable[[], str] = str) -> Iterator[T]:
    """Iterate with a progress bar; `said` is what to add to its description after each item."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_CONSOLE, disable=not _CONSOLE.is_terminal) as progress:
        if not _CONSOLE.is_terminal:
            _CONSOLE.print(f"{description} ({total} steps)", highlight=False)
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=f"{description} {said()}".strip())
