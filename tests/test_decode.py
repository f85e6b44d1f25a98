"""The forward pass made for speed, against the model class: same logits for every family, plan, call and part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCAB_SIZE, save_tiny_parent
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

import ffn_fusion
from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.settings import Fusion
from ffn_fusion.speed.decode import Compile, Decoder, DecodeStep
from ffn_fusion.speed.ranks import run_ranks
from ffn_fusion.speed.sublayers import AttentionStep, Cache, Rank
from ffn_fusion.stages.fuse import fuse

Parents = Callable[[str], Path]
TOLERANCE = 1e-5
"""Relative to the largest logit, in float32."""
PAST = 9
families = pytest.mark.parametrize("family", FAMILIES)


def itself(weight: Tensor) -> Tensor:
    return weight.detach()


def load(folder: Path) -> PreTrainedModel:
    return ModelFolder(folder).load(torch.float32, "cpu")


@torch.no_grad()
def decoded(decoder: Decoder, ids: Tensor) -> list[Tensor]:
    """Logits after all tokens but the last, and after the last one, which is decoded behind their cache."""
    past = ids.shape[1] - 1
    prefill = DecodeStep(decoder, ids.shape[0], 0, past)
    prefill.ids.copy_(ids[:, :-1])
    first = prefill.logits()
    step = DecodeStep(decoder, ids.shape[0], past, 1)
    step.ids.copy_(ids[:, -1:])
    for own, made in zip(step.caches, prefill.caches, strict=True):
        _carry(own, made)
    return [first, step.logits()]


def _carry(own: Cache, made: Cache) -> None:
    kept = own.keys.shape[2] - 1
    own.keys[:, :, :kept] = made.keys[:, :, made.keys.shape[2] - kept :]
    own.values[:, :, :kept] = made.values[:, :, made.keys.shape[2] - kept :]


@torch.no_grad()
def expected(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    cache = DynamicCache(config=model.config)
    return [model(input_ids=part, past_key_values=cache).logits[:, -1:] for part in (ids[:, :-1], ids[:, -1:])]


@torch.no_grad()
def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (2, PAST + 1), generator=torch.Generator().manual_seed(7))


@families
def test_logits_are_those_of_the_model_class(family: str, tiny_parent: Parents, ids: Tensor) -> None:
    model = load(tiny_parent(family))
    assert_same(decoded(Decoder(model, itself), ids), expected(model, ids))


@families
def test_students_too(family: str, tiny_student: Parents, ids: Tensor) -> None:
    model = load(tiny_student(family))
    decoder = Decoder(model, itself)
    assert_same(decoded(decoder, ids), expected(model, ids))


def test_linear_layers_and_cut_sizes(tmp_path: Path, ids: Tensor) -> None:
    parent = save_tiny_parent("qwen2", tmp_path / "parent", use_sliding_window=False, layer_types=None)
    plan = "A0F0 A1LF1 A2/1F2:40 A3F3L -F4+5"
    fuse(str(parent), plan=plan, out=tmp_path / "student", fusion=Fusion(calibrate="none"), fit_windows=1)
    model = load(tmp_path / "student")
    assert_same(decoded(Decoder(model, itself), ids), expected(model, ids))


@torch.no_grad()
def in_step(decoders: list[Decoder], ids: Tensor) -> Tensor:
    """Logits of a prefill by ranks that take each sublayer together."""
    states = [
        (d.positions(0, ids.shape[1]), iter(DecodeStep(d, ids.shape[0], 0, ids.shape[1]).caches)) for d in decoders
    ]
    x = torch.nn.functional.embedding(ids, decoders[0].table) * decoders[0].embedding_scale
    update = torch.zeros_like(x)
    for sublayers in zip(*(decoder.sublayers for decoder in decoders), strict=True):
        places = [(*p, next(c)) if isinstance(sublayers[0], AttentionStep) else () for p, c in states]
        made = [sublayer(x, update, *place) for sublayer, place in zip(sublayers, places, strict=True)]
        x, update = made[0][0], torch.stack([own for _, own in made]).sum(0)
    return torch.cat([decoder.head(x, update) for decoder in decoders], -1)


@pytest.mark.parametrize("ranks", [2, 4])
@families
def test_parts_add_up_to_the_whole(family: str, ranks: int, tiny_parent: Parents, ids: Tensor) -> None:
    """Two kv heads over four ranks: each is there twice."""
    model = load(tiny_parent(family))
    decoders = [Decoder(model, itself, rank=Rank(index, ranks)) for index in range(ranks)]
    assert_same([in_step(decoders, ids)], [model(input_ids=ids).logits[:, -1:].detach()])


def test_sizes_that_do_not_split(tiny_parent: Parents) -> None:
    with pytest.raises(UserError, match="does not split over 3 devices"):
        Decoder(load(tiny_parent("llama")), itself, rank=Rank(0, 3))


def test_ranks_in_processes_of_their_own(tiny_parent: Parents, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(Path(__file__).parent), str(Path(ffn_fusion.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", ":".join(folders))
    order = {"folder": str(tiny_parent("llama")), "ids": ids.tolist()}
    found = torch.tensor(json.loads(run_ranks("ranked", order, 2, "cpu", 120, "two ranks").splitlines()[-1]))
    model = load(tiny_parent("llama"))
    assert_same([found], [model(input_ids=ids).logits[:, -1:]])


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text(
        "import json, sys, time\nif json.loads(sys.argv[1])['rank'] == 1:\n    sys.exit('it broke')\ntime.sleep(60)\n"
    )
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="two ranks failed: it broke"):
        run_ranks("failing", {}, 2, "cpu", 50, "two ranks")
    with pytest.raises(UserError, match="two ranks did not finish within 1 seconds"):
        run_ranks("hanging", {}, 2, "cpu", 1, "two ranks")


@pytest.mark.parametrize("how", ["on", "tuned"])
def test_compiled_it_is_the_same_and_kinds_of_sublayers_share_their_code(
    how: Compile, tiny_parent: Parents, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without inductor, whose own compiling takes longer than what is to be seen here: one graph, no second one."""
    original = torch.compile

    def traced(function: object, *, fullgraph: bool, dynamic: bool, options: object) -> object:
        return original(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    model = load(tiny_parent("llama"))
    torch._dynamo.reset()
    counters.clear()
    ids = ids[:1]
    assert_same(decoded(Decoder(model, itself, compile=how), ids), expected(model, ids))
    # An attention, an FFN and a head.
    assert counters["stats"]["unique_graphs"] == 3
