"""The import rule: core <- hf <- tasks, healing, speed <- serving <- stages <- cli, page between core and stages,
stages apart; no cycles."""

import ast
from pathlib import Path

import ffn_fusion

ROOT = Path(ffn_fusion.__file__).parent
FREE = {"errors", "folder", "settings", "settings_training", "progress"}
MAY_IMPORT = {
    "core": {"core", "errors"},
    "hf": {"hf", "core"} | FREE,
    "tasks": {"tasks", "hf", "core"} | FREE,
    "speed": {"speed", "hf", "core"} | FREE,
    "serving": {"serving", "speed", "hf", "core"} | FREE,
    "healing": {"healing", "hf", "core"} | FREE,
    "page": {"page", "core", "errors", "folder"},
    "stages": {"page", "healing", "speed", "tasks", "serving", "hf", "core"} | FREE,
    "cli": {"errors"},
    "__main__": {"cli"},
    "__init__": set(),
    "folder": {"errors"},
    "settings": set(),
    "settings_training": {"settings"},
    "progress": set(),
    "errors": set(),
}
PARTS = {
    "stages.search": {"stages.evidence", "stages.greedy", "stages.puzzle"},
    "stages.puzzle": {"stages.evidence"},
    "stages.bench": {"stages.entrants", "stages.timekeeper"},
    "stages.timekeeper": {"stages.entrants"},
}
"""Modules of one stage, which may import each other."""
MAX_LINES = 330


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py" or path.parent == ROOT
    }


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports when it runs (not those for the type checker only)."""
    found = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ffn_fusion"):
            base = node.module.removeprefix("ffn_fusion").removeprefix(".")
            names = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in modules() else base for name in names}
    return found - {""}


def _running(body: list[ast.stmt]) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.walk(node)
    return nodes


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in modules().items():
        layer = name.split(".")[0]
        for target in imports_of(path):
            stage_to_stage = layer == "stages" and target.startswith("stages.") and name != "stages.run"
            allowed = target.split(".")[0] in MAY_IMPORT[layer] or name == "stages.run" or target in PARTS.get(name, ())
            if not allowed or (stage_to_stage and target not in PARTS.get(name, ())):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_there_is_no_import_cycle() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_shipped_model_files_import_nothing_of_ours() -> None:
    for path in (ROOT / "hf" / "remote").glob("*_ffn_fusion.py"):
        assert "from ffn_fusion" not in path.read_text(encoding="utf-8")


def test_core_reads_no_files_and_knows_no_transformers() -> None:
    for path in (ROOT / "core").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import transformers" not in text
        assert "pathlib" not in text
        assert "open(" not in text


def test_files_stay_small() -> None:
    long = {name: lines for name, path in modules().items() if (lines := path.read_text().count("\n")) > MAX_LINES}
    assert not long
