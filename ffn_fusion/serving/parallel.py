"""Whether a model splits over devices: engines cut FFN channels and heads into equal parts."""

from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder


def check_tensor_parallel(student: ModelFolder, ranks: int) -> None:
    """`UserError` unless every sharded size splits evenly over `ranks` devices."""
    obstacle = _obstacle(student, ranks)
    if obstacle:
        fitting = [str(other) for other in range(1, 17) if _obstacle(student, other) is None]
        raise UserError(f"{obstacle} does not split over {ranks} devices; {', '.join(fitting)} would do")


def _obstacle(student: ModelFolder, ranks: int) -> str | None:
    """The first size that does not split; fewer kv heads than devices are replicated."""
    config = student.config
    if config.num_attention_heads % ranks:
        return f"the number of attention heads, {config.num_attention_heads},"
    for index, (block, width) in enumerate(zip(config.block_configs, config.ffn_widths, strict=True)):
        if width % ranks:
            return f"FFN width {width} of block {index}"
        group = block.attention.n_heads_in_group
        kv_heads = config.num_attention_heads // group if group else ranks
        if kv_heads % ranks and ranks % kv_heads:
            return f"the number of kv heads of block {index}, {kv_heads},"
    return None
