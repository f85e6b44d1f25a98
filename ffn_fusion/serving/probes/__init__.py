"""Scripts that an engine's own Python runs, so they import nothing of ours but `protocol`, which lies beside them."""
