"""Which items of a task occur in the text that a student was fitted to (13 words in a row, as in GPT-3's check).

Brown et al., arXiv 2005.14165, appendix C.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

WORDS = 13
Key = tuple[str, ...]


def overlapping(tasks: Mapping[str, Sequence[str]], documents: Iterable[str]) -> dict[str, int]:
    """For each task, how many of its texts share 13 words in a row with any document.

    Only the tasks' own word runs are held in memory; the documents stream by. A text of fewer words cannot be found.
    """
    places: dict[Key, list[tuple[str, int]]] = defaultdict(list)
    for task, texts in tasks.items():
        for item, text in enumerate(texts):
            for run in _runs(text):
                places[run].append((task, item))
    found: dict[str, set[int]] = {task: set() for task in tasks}
    for document in documents:
        for run in _runs(document):
            for task, item in places.get(run, ()):
                found[task].add(item)
    return {task: len(items) for task, items in found.items()}


def _runs(text: str) -> Iterator[Key]:
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - WORDS + 1):
        yield tuple(words[start : start + WORDS])
