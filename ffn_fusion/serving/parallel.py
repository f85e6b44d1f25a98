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
    for index, shape in enumerate(student.shapes):
        if shape.ffn_width % ranks:
            return f"FFN width {shape.ffn_width} of block {index}"
        kv_heads = shape.kv_heads or ranks
        if kv_heads % ranks and ranks % kv_heads:
            return f"the number of kv heads of block {index}, {kv_heads},"
    return None
