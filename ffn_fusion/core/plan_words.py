"""One sublayer of a plan in its written forms: the one-line text and JSON."""

from collections.abc import Mapping
from typing import Any

Said = tuple[int, int | None, bool]
"""Layer, size if one is given, and whether a linear layer stands in the sublayer's place."""


def said(text: str, separator: str) -> Said:
    """Read `3`, `3:1024` (with `:` as separator) or `3L`."""
    layer, _, size = text.removesuffix("L").partition(separator)
    return int(layer), int(size) if size else None, text.endswith("L")


def entry(fields: Mapping[str, Any], size: str) -> Said:
    """Read a sublayer's JSON object, whose size goes by the name `size`; `ValueError` for what it cannot be."""
    layer, value, linear = fields["layer"], fields.get(size), fields.get("linear", False)
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer {layer!r} is no layer number")
    if value is not None and type(value) is not int:
        raise ValueError(f"{size} {value!r} of layer {layer} is no number")
    if type(linear) is not bool:
        raise ValueError(f"linear {linear!r} of layer {layer} is neither true nor false")
    return layer, value, linear


def stated(fields: Mapping[str, int | None]) -> dict[str, int]:
    """The JSON object of a sublayer's fields, without those that are as in the parent."""
    return {name: value for name, value in fields.items() if value is not None and value is not False}
