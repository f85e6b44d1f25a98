"""What a user names → what the stages work on: a checked model folder, its tokenizer, a plan."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.imports import config_plan, mergekit_plan
from ffn_fusion.core.layout import Group, Layout
from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import MODELS, PREFIX, cache_folder, fetch_model, new_folder
from ffn_fusion.hf.checkpoint import read_json
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder, quiet_transformers

YAML = (".yaml", ".yml")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]


def resolve_model(name: str, weights: bool = True) -> ModelFolder:
    """The local folder behind a model's name, fetched or converted on first use; `UserError` says what is wrong.

    Without `weights` a folder that holds nothing but a config.json will do.
    """
    path = Path(name).expanduser()
    if name.startswith(PREFIX):
        model = ModelFolder(_builtin(name.removeprefix(PREFIX)))
    elif path.is_dir():
        model = ModelFolder(path)
    elif path.suffix == ".gguf":
        model = ModelFolder(_gguf(path))
    elif path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{path} is a pickle file, which can run code when read; convert it to safetensors")
    else:
        model = ModelFolder(_hub(name))
    if weights or any(model.folder.glob("*.safetensors")):
        model.check()
    return model


def labels(names: Sequence[str]) -> list[str]:
    """Names for tables: of a local path, as few last parts as tell it from the others."""

    def shortened(name: str, depth: int) -> str:
        return "/".join(Path(name).parts[-depth:]) if Path(name).is_dir() else name

    depth = 1
    while len({shortened(name, depth) for name in names}) < len(set(names)):
        depth += 1
    return [shortened(name, depth) for name in names]


def load_tokenizer(model: ModelFolder, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; `UserError` if there is none or its ids exceed the vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here, all meaning the same to a user
        raise UserError(f"{model.folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {model.folder} has {len(tokenizer)} entries, "
            f"the model's vocabulary {model.config.vocab_size}"
        )
    return tokenizer


def read_plan(text: str, parent: ModelFolder) -> Plan:
    """A plan for this parent, in any of the forms of docs/formats.md; `UserError` if it does not fit."""
    plan, _ = read_source(text, parent.num_layers, own=parent.shapes)
    parent.check_plan(plan)
    return plan


def read_source(
    text: str, num_layers: int | None, groups: Sequence[Group] = (), own: Sequence[BlockShape] | None = None
) -> tuple[Plan, Layout | None]:
    """A plan in one line or in a file, another tool's included, and the layout if the file has `block_configs`.

    A folder stands for its plan.json, else for its config.json. `groups` names the fused FFNs of `block_configs`,
    whose other sizes are the plan's where they differ from the parent's `own`.
    Raises `UserError`, with the file's name, for what is no plan or none for `num_layers` layers (if not None).
    """
    path = Path(text).expanduser()
    # Not `Path.is_file`: it raises for a one-line plan longer than a file name may be.
    if os.path.isdir(path):
        path = path / (PLAN_FILE if (path / PLAN_FILE).is_file() else "config.json")
    elif not os.path.isfile(path):
        if text.endswith((".json", *YAML)):
            raise UserError(f"{text} does not exist")
        _refuse_groups(groups)
        return Plan.parse(text), None
    data = _read_yaml(path) if path.suffix in YAML else read_json(path)
    try:
        if path.suffix in YAML:
            _refuse_groups(groups)
            return mergekit_plan(data, num_layers), None
        if "format" in data or "blocks" in data:
            _refuse_groups(groups)
            return Plan.from_json(path.read_text(encoding="utf-8")), None
        return config_plan(data, num_layers, groups, own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _refuse_groups(groups: Sequence[Group]) -> None:
    if groups:
        raise UserError("--groups names the fused FFNs of block_configs; this is another form of plan")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no YAML mapping")
    return data


def _builtin(name: str) -> Path:
    if name not in MODELS:
        raise UserError(f"no builtin model {name!r}; there are {', '.join(MODELS)}")

    def convert(partial: Path) -> None:
        path = fetch_model(name, partial)
        _convert(path, partial, split_digits=MODELS[name].split_digits)
        path.unlink()

    return _cached(cache_folder() / "models" / name, convert)


def _gguf(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return _cached(cache_folder() / "gguf" / f"{path.stem}-{key}", lambda partial: _convert(path, partial))


def _cached(folder: Path, make: Callable[[Path], object]) -> Path:
    if not folder.is_dir():
        with new_folder(folder) as partial:
            make(partial)
    return folder


def _convert(path: Path, out: Path, split_digits: bool = False) -> None:
    """GGUF → bf16 safetensors with tokenizer and chat template, weights dequantised."""
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model.save_pretrained(out)
    except Exception as error:  # a broken file can fail anywhere inside
        raise UserError(f"transformers cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    if split_digits:
        # The GGUF keeps only the byte-level step; the model was trained with single digits (docs/notebook.md).
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    # Or decoding would strip spaces before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(out)


def _hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise UserError(f"{name} is no folder, no GGUF file, no Hub id and no {PREFIX}name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no local folder, and the Hub did not give it: {reason}") from None
