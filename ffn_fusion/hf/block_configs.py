"""Entries of `block_configs`, in the keys of nemotron-nas, exactly those that engines insist on."""

from typing import Any

from ffn_fusion.core.fusion import padded_width
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE, width_of


def attention_entry(heads_in_group: int | None) -> dict[str, Any]:
    """One `attention` of `block_configs`; None: there is none."""
    return _attention(no_op=heads_in_group is None, replace_with_linear=False, n_heads_in_group=heads_in_group)


def linear_attention_entry() -> dict[str, Any]:
    """One `attention` of `block_configs` that is a linear layer."""
    return _attention(no_op=False, replace_with_linear=True, n_heads_in_group=None)


def _attention(no_op: bool, replace_with_linear: bool, n_heads_in_group: int | None) -> dict[str, Any]:
    unused = dict.fromkeys(("sparsify", "num_sink_tokens", "window_length"))
    unused |= dict.fromkeys(("unshifted_sink", "use_prefill_window_in_sink_attention"), False)
    return {
        "no_op": no_op,
        "replace_with_linear": replace_with_linear,
        "n_heads_in_group": n_heads_in_group,
        **unused,
    }


def ffn_entry(width: int, hidden_size: int) -> dict[str, Any]:
    """One `ffn` of `block_configs`; the width goes up to the next multiple of 256, which is what the layout can say."""
    # An attention without FFN gets one of zeros (hf/surgery.py), so no width is 0.
    padded = padded_width(max(width, 1), WIDTH_MULTIPLE)
    mult = 1.5 * padded / hidden_size
    assert width_of(mult, hidden_size) == padded
    return {"no_op": False, "replace_with_linear": False, "ffn_mult": mult, "sparsify": None}


def linear_ffn_entry() -> dict[str, Any]:
    """One `ffn` of `block_configs` that is a linear layer."""
    return {"no_op": False, "replace_with_linear": True, "ffn_mult": None, "sparsify": None}
