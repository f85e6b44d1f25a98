"""What text a student has seen, by the records of the stages that made it."""

from ffn_fusion.core.align_records import AlignResult
from ffn_fusion.core.heal_records import HealResult
from ffn_fusion.core.merge_records import MergeResult
from ffn_fusion.core.records import FuseResult
from ffn_fusion.folder import read_record, stage_of
from ffn_fusion.hf.model import ModelFolder


def texts_behind(student: ModelFolder) -> list[str]:
    """Texts that a model was calibrated or trained on; none for a parent."""
    stage = stage_of(student.folder)
    if stage == "fuse":
        return read_record(student.folder, FuseResult).result.texts
    if stage == "heal":
        return read_record(student.folder, HealResult).result.texts
    if stage == "merge":
        return read_record(student.folder, MergeResult).result.texts
    return read_record(student.folder, AlignResult).result.texts if stage == "align" else []
