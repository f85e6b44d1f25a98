"""The folded form: every layer an attention followed by its FFNs, and the same model to the last bit."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from engines.layouts import save_layout
from reference import one_line
from torch import nn

from ffn_fusion.core.records import FuseResult
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.hf.model import ModelFolder, model_class, skeleton
from ffn_fusion.serving import folded
from ffn_fusion.stages.export import export

Folder = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.randint(4, 128, (2, 14), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def tiny_folded(tiny_student: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"{family}-folded") / "folded"
            export(str(tiny_student(family)), to="folded", out=made[family])
        return made[family]

    return make


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return ModelFolder(folder).load(torch.float32, "cpu")(input_ids=IDS, use_cache=False).logits


@families
def test_it_computes_the_student_exactly(family: str, tiny_student: Folder, tiny_folded: Folder) -> None:
    assert torch.equal(logits(tiny_folded(family)), logits(tiny_student(family)))


@families
def test_a_layer_is_an_attention_and_the_ffns_behind_it(family: str, tiny_student: Folder, tiny_folded: Folder) -> None:
    config = json.loads((tiny_folded(family) / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 4, "four attentions of five blocks"
    assert not any(block["attention"]["no_op"] for block in config["block_configs"])
    assert [len(block.get("following_ffns", [])) for block in config["block_configs"]] == [0, 1, 0, 0]
    for name in ("layer_types", "no_rope_layers"):
        if config.get(name):
            whole = json.loads((tiny_student(family) / "config.json").read_text())[name]
            assert config[name] == [whole[0], whole[1], whole[3], whole[4]]
    # vLLM's backend asks for a trunk, and takes the name DeciLMForCausalLM for its own class.
    (name,) = config["architectures"]
    assert name.startswith("Fused")
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_ffn_fusion.{name.removesuffix('ForCausalLM')}Config",
        "AutoModel": f"modeling_ffn_fusion.{name.removesuffix('ForCausalLM')}Model",
        "AutoModelForCausalLM": f"modeling_ffn_fusion.{name}",
    }


@families
def test_the_weights_are_the_students_under_other_names(family: str, tiny_student: Folder, tiny_folded: Folder) -> None:
    before, after = ModelFolder(tiny_student(family)).checkpoint, ModelFolder(tiny_folded(family)).checkpoint
    assert len(before.specs) == len(after.specs)
    assert torch.equal(
        after.read("model.layers.1.following_ffns.0.post_attention_layernorm.weight"),
        before.read("model.layers.2.post_attention_layernorm.weight"),
    )
    assert not [name for name in after.specs if name.startswith("model.layers.4.")]


@families
def test_tensor_parallel_styles_are_those_of_the_first_ffn(family: str, tiny_folded: Folder) -> None:
    model = ModelFolder(tiny_folded(family))
    plan = model_class(model.arch).config_class.base_model_tp_plan
    trunk = skeleton(model.config).base_model

    def style(name: str) -> str | None:
        found = [style for pattern, style in plan.items() if re.fullmatch(pattern.replace("*", r"\d+"), name)]
        assert len(found) <= 1, name
        return found[0] if found else None

    linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    following = [name for name in linear if ".following_ffns." in name]
    assert len(following) == len([name for name in linear if name.startswith("layers.1.mlp.")]) >= 2
    for name in linear:
        assert style(name) is not None, name
        assert style(name) == style(re.sub(r"\.following_ffns\.\d+", "", name)), name


RELOADED = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ffn_fusion":
            raise ImportError(f"{name} was asked for")
sys.meta_path.insert(0, Guard())
import numpy, torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
out, *folders = sys.argv[1:]
ids = torch.tensor(numpy.load(f"{out}/ids.npy"))
for number, folder in enumerate(folders):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert "transformers_modules" in type(model).__module__, type(model)
    trunk = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert "transformers_modules" in type(trunk).__module__, type(trunk)
    with torch.no_grad():
        numpy.save(f"{out}/{number}.npy", model(input_ids=ids, use_cache=False).logits.numpy())
"""


def test_stock_transformers_loads_it_with_the_code_in_the_folder_alone(tiny_folded: Folder, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.numpy())
    folders = [tiny_folded(family) for family in FAMILIES]
    command = [sys.executable, "-c", RELOADED, str(tmp_path), *map(str, folders)]
    where = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, folder in enumerate(folders):
        found = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        torch.testing.assert_close(found, logits(folder), rtol=0, atol=1e-5 * float(found.abs().max()))


def test_granite_tells_vllm_its_divisor_of_the_logits(tiny_folded: Folder) -> None:
    config = json.loads((tiny_folded("granite") / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(1 / config["logits_scaling"]) == pytest.approx(1 / 2.5)


def test_blocks_without_anything_and_without_ffn_have_their_place(tmp_path: Path) -> None:
    for name, following in (("empty", [1, 0, 0]), ("ffnfree", [0, 0, 0]), ("wideattn", [0, 1, 0])):
        student, out = save_layout(name, tmp_path / name), tmp_path / f"{name}-folded"
        export(str(student), to="folded", out=out)
        blocks = ModelFolder(out).config.block_configs
        assert [len(block.get("following_ffns", ())) for block in blocks] == following, name
        assert torch.equal(logits(out), logits(student)), name


def test_attentions_of_different_kv_heads_are_refused(tmp_path: Path) -> None:
    student, out = save_layout("fusion", tmp_path / "fusion"), tmp_path / "out"
    assert "kv heads" in str(folded.why_not(ModelFolder(student)))
    one_line(lambda: export(str(student), to="folded", out=out), "kv heads")
    assert not out.exists()


def test_a_folded_model_that_lacks_a_weight_is_never_finished(
    tiny_student: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = folded._names
    monkeypatch.setattr(folded, "_names", lambda student: [*names(student)][:-1])
    one_line(lambda: export(str(tiny_student("llama")), to="folded", out=tmp_path / "out"), "lacks tensor")
    assert not (tmp_path / "out").exists()


def test_it_is_told_from_a_student_and_is_no_parent(tiny_student: Folder, tiny_folded: Folder, tmp_path: Path) -> None:
    assert folded.is_folded(ModelFolder(tiny_folded("llama")))
    assert not folded.is_folded(ModelFolder(tiny_student("llama")))
    assert read_record(tiny_student("llama"), FuseResult).stage == "fuse"
    assert json.loads((tiny_folded("llama") / RECORD).read_text())["stage"] == "export"
    one_line(lambda: export(str(tiny_folded("llama")), to="hf", out=tmp_path / "out"), "folded form")
    assert not (tmp_path / "out").exists()
