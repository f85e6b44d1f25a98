"""What a model folder says of the texts that it was made with."""

from ffn_fusion.core.align_records import AlignResult
from ffn_fusion.core.records import FuseResult
from ffn_fusion.folder import RECORD, read_record, stage_of
from ffn_fusion.hf.model import ModelFolder


def fitted_on(model: ModelFolder) -> list[str]:
    """Texts that a student was calibrated on and files that it was tuned on, by its own record."""
    stage = stage_of(model.folder) if (model.folder / RECORD).is_file() else ""
    if stage == "fuse":
        sample = read_record(model.folder, FuseResult).result.sample
        return sample.sources if sample else []
    if stage == "align":
        tuned = read_record(model.folder, AlignResult).result
        return [*tuned.fitted_on, *tuned.records.sources]
    return []
