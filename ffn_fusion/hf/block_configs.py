"""Entries of `block_configs`, in the keys of nemotron-nas."""

from typing import Any

from ffn_fusion.core.fusion import padded_width
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE, width_of

_NO_ATTENTION = dict.fromkeys(("sparsify", "num_sink_tokens", "window_length")) | dict.fromkeys(
    ("replace_with_linear", "unshifted_sink", "use_prefill_window_in_sink_attention"), False
)


def attention_entry(heads_in_group: int | None) -> dict[str, Any]:
    """One `attention` of `block_configs`, with exactly the keys that engines insist on; None: there is none."""
    return {"no_op": heads_in_group is None, "n_heads_in_group": heads_in_group, **_NO_ATTENTION}


def ffn_entry(width: int, hidden_size: int) -> dict[str, Any]:
    """One `ffn` of `block_configs`; the width goes up to the next multiple of 256, which is what the layout can say."""
    # An attention without FFN gets one of zeros (hf/surgery.py), so no width is 0.
    padded = padded_width(max(width, 1), WIDTH_MULTIPLE)
    mult = 1.5 * padded / hidden_size
    assert width_of(mult, hidden_size) == padded
    return {"no_op": False, "replace_with_linear": False, "ffn_mult": mult, "sparsify": None}
