"""Replace-one-block scores on tiny models: against the search's own measurement, slow references, kills and memory."""

import resource
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, save_tiny_parent, tiny_tokenizer
from reference import add, one_line, relative_error
from safetensors.torch import load_file
from test_parents import BLOCKS, puzzletron, uneven_parent
from texts import as_windows, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from ffn_fusion.core.losses import nll
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.search_records import INTERACTIONS, ScoreResult, SearchResult
from ffn_fusion.core.space import Change, Sizes, changes
from ffn_fusion.folder import Record
from ffn_fusion.hf import deviation
from ffn_fusion.hf.deviation import Deviations
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.text import read_windows
from ffn_fusion.settings import Fusion, Machine, Space, Text
from ffn_fusion.stages.analyze import analyze
from ffn_fusion.stages.score import score
from ffn_fusion.stages.search import search

Parents = Callable[[str], Path]
MACHINE = Machine(batch_size=2)
NUM_WINDOWS = 3
"""So that the last batch is a smaller one."""
SIZES = Sizes(shares=(0.5,), linear=True, multiple=256)


def windows(count: int, seed: int = 5) -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (count, 12), generator=torch.Generator().manual_seed(seed))


def meter_of(folder: Path, fusion: Fusion = Fusion(), machine: Machine = MACHINE) -> Meter:  # noqa: B008, frozen
    parent = ModelFolder(folder)
    model = parent.load(torch.float32, "cpu")
    return Meter(parent, model, as_windows(windows(NUM_WINDOWS)), as_windows(windows(8, 6)), fusion, machine)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with channels enough to be cut."""
    folder = tmp_path_factory.mktemp("wide") / "parent"
    return save_tiny_parent("llama", folder, intermediate_size=512, num_hidden_layers=4)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_parent(tmp_path_factory.mktemp("uneven") / "parent", BLOCKS, puzzletron)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = write_text(tmp_path_factory.mktemp("texts"), "text", 0, documents=150)
    return Text(text=(str(path),), length=24)


@pytest.mark.parametrize("family", ["granite", "qwen2", "gemma", "starcoder2", "student", "uneven", "wide"])
def test_a_change_costs_what_its_plan_does(
    family: str, tiny_parent: Parents, tiny_student: Parents, uneven: Path, wide: Path
) -> None:
    """What starts in the middle of the parent's pass, against a whole student from its first layer on."""
    made = {"student": lambda: tiny_student("llama"), "uneven": lambda: uneven, "wide": lambda: wide}
    meter = meter_of(made.get(family, lambda: tiny_parent(family))())
    deviations = Deviations(meter)
    targets = meter.ids[:, 1:].flatten()
    with torch.no_grad():
        own = nll(meter.model(input_ids=meter.ids).logits[:, :-1].flatten(0, 1), targets)
    assert sum(meter.nll) == pytest.approx(float(own.sum()), rel=1e-5)
    found = changes(meter.parent.plan, meter.parent.shapes, SIZES)
    assert len(found) > 15
    for change in found[:: 1 + len(found) // 30]:
        measured, plan = deviations.of(change), change.applied(meter.parent.plan)
        assert sum(measured.kl) / meter.ids.numel() == pytest.approx(meter.fused(plan).mean, rel=1e-3, abs=1e-6)
        with torch.no_grad():
            logits = meter.student(plan)[0](input_ids=meter.ids).logits
        expected = nll(logits[:, :-1].flatten(0, 1), targets)
        assert sum(measured.nll) == pytest.approx(float(expected.sum()), rel=1e-4)
        assert measured.sketch.shape == (meter.ids.numel(), 16)


@pytest.fixture(scope="module")
def scored(wide: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    run_score(wide, out, text)
    return out


def run_score(model: Path, out: Path, text: Text) -> Record[ScoreResult]:
    options = {"windows": NUM_WINDOWS, "fit_windows": 8, "space": Space(widths=(0.5,)), "machine": MACHINE}
    return score(str(model), out=out, text=text, **options)  # type: ignore[arg-type]


def test_the_search_measures_a_change_alike(scored: Path, wide: Path, text: Text, tmp_path: Path) -> None:
    result = run_score(wide, scored, text).result
    assert len(result.scores) == 4 * 3 + 3 * 2 + 3, "two more of layers that may lose their attention, and links"
    analyze(str(wide), out=tmp_path / "analysis", windows=2, text=text, machine=MACHINE)
    options = {"analysis": tmp_path / "analysis", "windows": NUM_WINDOWS, "fit_windows": 8, "machine": MACHINE}
    for change in [s for s in result.scores if s.block in ("A1/1F1", "-F2", "A3F3:256", "A1F1+2", "")][:6]:
        plan = Change(change.first, change.last, Block.parse(change.block) if change.block else None).applied(
            Plan.identity(4)
        )
        out = tmp_path / str(plan).replace("/", "_")
        found: SearchResult = search(str(wide), out=out, plan=str(plan), text=text, **options).result  # type: ignore[arg-type]
        assert change.kl.mean == pytest.approx(found.kl.mean, rel=1e-3, abs=1e-6)
        assert change.kl.stderr == pytest.approx(found.kl.stderr, rel=1e-3, abs=1e-6)
        assert (found.sample, found.calibrated) == (result.sample, True)


def test_interactions_are_those_of_the_deviations(scored: Path, wide: Path, text: Text) -> None:
    """Half a squared length is near the KL of what changes little, and the matrix says which changes are alike."""
    result = run_score(wide, scored, text).result
    gram = load_file(scored / INTERACTIONS)["gram"].numpy()
    assert gram.shape == (len(result.scores),) * 2
    assert np.linalg.eigvalsh(gram)[0] > -1e-6 * gram.max()
    at = {score.block: number for number, score in enumerate(result.scores)}
    meter = meter_of(wide)
    by_hand = []
    ids = read_windows(text, tiny_tokenizer(), NUM_WINDOWS, "measure").ids
    with torch.no_grad():
        z = meter.model(input_ids=ids).logits.flatten(0, 1).double()
    p = z.softmax(-1)
    fit = read_windows(text, tiny_tokenizer(), 8, "fit")
    meter = Meter(meter.parent, meter.model, as_windows(ids), fit, Fusion(), MACHINE)
    for word in ("A1/1F1", "A2/1F2"):
        plan = Plan.parse(" ".join(word if f"A{word[1]}F" in own else own for own in ("A0F0", "A1F1", "A2F2", "A3F3")))
        with torch.no_grad():
            d = meter.student(plan)[0](input_ids=ids).logits.flatten(0, 1).double() - z
        by_hand.append(p.sqrt() * (d - (p * d).sum(-1, keepdim=True)))
    exact = [[float((a * b).sum(-1).mean()) for b in by_hand] for a in by_hand]
    numbers = [at["A1/1F1"], at["A2/1F2"]]
    assert gram[np.ix_(numbers, numbers)] == pytest.approx(np.array(exact), rel=0.2, abs=0.1 * exact[0][0])


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_similarities_are_cosines_of_streams(family: str, tiny_parent: Parents) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    middles: list[Tensor] = []
    ends: list[Tensor] = []
    attended: list[Tensor] = []
    for layer in stock.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        layer.self_attn.register_forward_hook(lambda _, __, out: attended.append(out[0]))
        layer.register_forward_hook(lambda _, __, out: ends.append(out))
    with torch.no_grad():
        stock(input_ids=windows(NUM_WINDOWS), use_cache=False)
    middles = [add(*parts) for parts in zip(stock.model.layers, inputs, attended, strict=True)]

    def cosines(before: list[Tensor], after: list[Tensor]) -> list[float]:
        pairs = zip(before, after, strict=True)
        return [float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()) for a, b in pairs]

    found = Deviations(meter_of(tiny_parent(family))).similarity
    assert found.attention == pytest.approx(cosines(inputs, middles), abs=1e-5)
    assert found.ffn == pytest.approx(cosines(middles, ends), abs=1e-5)
    assert found.layer == pytest.approx(cosines(inputs, ends), abs=1e-5)


def test_what_a_parent_lacks_leaves_the_stream_as_it_is(uneven: Path) -> None:
    similarity = Deviations(meter_of(uneven)).similarity
    assert [similarity.attention[2], similarity.ffn[2], similarity.layer[2]] == pytest.approx([1.0] * 3)
    assert similarity.ffn[3] == pytest.approx(1.0)
    assert similarity.attention[4] == pytest.approx(1.0)
    assert similarity.attention[3] < 0.999


def test_a_killed_score_goes_on_and_ends_alike(
    scored: Path, wide: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = run_score(wide, scored, text).result, []
    measure = Deviations.of

    def killed(self: Deviations, change: Change) -> deviation.Deviation:
        calls.append(str(change))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return measure(self, change)

    monkeypatch.setattr(Deviations, "of", killed)
    with pytest.raises(KeyboardInterrupt):
        run_score(wide, tmp_path / "scores", text)
    again = run_score(wide, tmp_path / "scores", text).result
    assert len(calls) == len(whole.scores) + 1
    assert calls[7] == calls[8]
    assert again == whole
    grams = [load_file(folder / INTERACTIONS)["gram"] for folder in (scored, tmp_path / "scores")]
    assert torch.equal(*grams)


class Card:
    """A device that holds so many windows at once: fakes torch's error in the functions that compute logits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.seen = most, list[int]()
        for module in ("ffn_fusion.hf.meter", "ffn_fusion.hf.deviation"):
            for name in ("record", "resume"):
                monkeypatch.setattr(f"{module}.{name}", self.checked(getattr(deviation, name)))

    def checked(self, compute: Callable[..., object]) -> Callable[..., object]:
        def run(model: object, ids: Tensor, *arguments: object, **options: object) -> object:
            self.seen.append(len(ids))
            if len(ids) > self.most:
                raise torch.OutOfMemoryError
            return compute(model, ids, *arguments, **options)

        return run


def test_where_memory_is_short_batches_are_halved(
    wide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = Change(1, 1, Block.parse("-F1"))
    plenty = meter_of(wide)
    expected, plain = Deviations(plenty).of(change), plenty.removals([1], [2, 3])
    card = Card(monkeypatch, 3)
    meter = meter_of(wide, machine=Machine(batch_size=8))
    deviations = Deviations(meter)
    assert meter.batch_size == 8, "only three windows are there"
    card.most = 2
    found = deviations.of(change)
    assert meter.batch_size == 2
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    assert relative_error(found.sketch, expected.sketch) < 1e-3
    card.most = 1
    removed = meter.removals([1], [2, 3])
    assert [removed[layer].mean for layer in (2, 3)] == pytest.approx([plain[layer].mean for layer in (2, 3)], rel=1e-4)
    assert card.seen[-1] == meter.batch_size == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.split()[-1] for line in told] == ["4", "2", "1"]
    card.most = 0
    one_line(lambda: deviations.of(change), "3 windows of 12 tokens", "--windows", "--length")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_memory_does_not_grow_with_the_number_of_candidates(wide: Path) -> None:
    """A leak of one changed block (0.5 MB) a candidate would be 100 MB; behind other tests allocators alone took 15."""
    meter = meter_of(wide)
    deviations = Deviations(meter)
    found = changes(meter.parent.plan, meter.parent.shapes, SIZES)
    before = 0.0
    for number, change in enumerate(islice(cycle(found), 300)):
        meter.fusion = Fusion(calibrate="parent" if number % 5 == 0 else "none")
        deviations.of(change)
        if number % 5 == 1:
            meter.fused(change.applied(meter.parent.plan))
        if number == 99:
            before = resident_mb()
    assert resident_mb() - before < 40
