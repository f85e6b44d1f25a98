"""FFN Fusion for causal language models: analyze, search, fuse, evaluate. A model is a plan.

The names below load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
    from ffn_fusion.errors import UserError
    from ffn_fusion.settings import (
        Blocks,
        Budget,
        Fusion,
        Judging,
        Limits,
        Machine,
        Space,
        Tasks,
        Text,
    )
    from ffn_fusion.settings_training import Tuning, Writing
    from ffn_fusion.stages.align import align
    from ffn_fusion.stages.analyze import analyze
    from ffn_fusion.stages.bench import bench
    from ffn_fusion.stages.bld import bld
    from ffn_fusion.stages.cost import cost
    from ffn_fusion.stages.evaluate import evaluate
    from ffn_fusion.stages.export import export
    from ffn_fusion.stages.ffn import ffn
    from ffn_fusion.stages.fuse import fuse
    from ffn_fusion.stages.heal import heal
    from ffn_fusion.stages.latency import latency
    from ffn_fusion.stages.merge import merge
    from ffn_fusion.stages.report import report
    from ffn_fusion.stages.run import run
    from ffn_fusion.stages.score import score
    from ffn_fusion.stages.search import search
    from ffn_fusion.stages.speculate import speculate
    from ffn_fusion.stages.teach import teach

__version__ = version("ffn-fusion")
__all__ = [
    "Attention",
    "Block",
    "Blocks",
    "Budget",
    "Ffn",
    "Fusion",
    "Judging",
    "Limits",
    "Machine",
    "Plan",
    "Space",
    "Tasks",
    "Text",
    "Tuning",
    "UserError",
    "Writing",
    "align",
    "analyze",
    "bench",
    "bld",
    "cost",
    "evaluate",
    "export",
    "ffn",
    "fuse",
    "heal",
    "latency",
    "merge",
    "report",
    "run",
    "score",
    "search",
    "speculate",
    "teach",
]
_MODULES = {
    "core.plan": ("Attention", "Block", "Ffn", "Plan"),
    "errors": ("UserError",),
    "settings": ("Blocks", "Budget", "Fusion", "Judging", "Limits", "Machine", "Space", "Tasks", "Text"),
    "settings_training": ("Tuning", "Writing"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ffn_fusion' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), f"stages.{name}")
    return getattr(import_module(f"ffn_fusion.{module}"), name)
