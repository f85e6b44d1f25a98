"""`speculate`: a student drafts for its parent; the output stays the parent's, and every count is consistent."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_parent
from fakes import python_with
from reference import one_line
from test_report import sample
from texts import write_text

from ffn_fusion.core.engine_records import SpeculateResult
from ffn_fusion.folder import Record, read_record
from ffn_fusion.serving.engines import ENGINES, Installed
from ffn_fusion.settings import Machine, Text
from ffn_fusion.stages.speculate import _result, speculate

Folder = Callable[[str], Path]
FP32 = Machine(dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(text=(str(write_text(tmp_path_factory.mktemp("speculate"))),), length=16)


def decode(target: Path, draft: Path, out: Path, text: Text) -> Record[SpeculateResult]:
    # 12 tokens are 3 rounds of 4 if all is accepted.
    options = {"draft_tokens": 3, "windows": 3, "new_tokens": 12}
    return speculate(str(target), str(draft), out=out, text=text, machine=FP32, **options)  # type: ignore[arg-type]


def test_a_student_drafts_for_its_parent(
    tiny_parent: Folder, tiny_student: Folder, text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, student, out = tiny_parent("llama"), tiny_student("llama"), tmp_path / "out"
    record = decode(parent, student, out, text)
    found = record.result
    assert (found.target, found.draft, found.engine) == (str(parent), str(student), "transformers")
    assert (found.num_prompts, found.new_tokens, found.draft_tokens) == (3, 12, 3)
    assert found.sample.num_windows == 3
    assert found.equal_prompts == 3, "in float32 a draft changes nothing"
    assert found.accepted + found.rounds == 36, "each round gives what was accepted and one token more"
    assert found.accepted <= found.proposed <= found.rounds * 3
    assert 0 <= found.acceptance < 1 <= found.tokens_per_round < 4
    assert found.tokens_per_round == pytest.approx(36 / found.rounds)
    assert found.speedup == pytest.approx(found.drafted_speed / found.plain_speed)
    assert found.plain_seconds > 0 < found.drafted_seconds
    assert record.inputs["new_tokens"] == 12
    assert record.environment.dtype == "float32"
    assert read_record(out, SpeculateResult) == record
    assert "output the same on 3 of 3 prompts, 12 tokens each" in found.summary()
    assert decode(parent, student, out, text) == record
    assert "up to date" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["record.json"]


def test_a_model_accepts_all_of_its_own_proposals(tiny_student: Folder, text: Text, tmp_path: Path) -> None:
    student = tiny_student("llama")
    found = decode(student, student, tmp_path / "out", text).result
    assert found.equal_prompts == 3
    assert (found.acceptance, found.tokens_per_round) == (1.0, 4.0)
    assert (found.rounds, found.proposed, found.accepted) == (9, 27, 27)


def test_another_vocabulary_is_refused(tiny_parent: Folder, tmp_path: Path, text: Text) -> None:
    other = save_tiny_parent("llama", tmp_path / "other", vocab_size=160)
    one_line(lambda: decode(tiny_parent("llama"), other, tmp_path / "out", text), "vocabulary", "128 tokens", "160")
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_missing_or_fails_is_one_line(tiny_parent: Folder, tmp_path: Path, text: Text) -> None:
    out, parent = tmp_path / "out", str(tiny_parent("llama"))
    options = {"engine": "vllm", "text": text, "machine": FP32, "windows": 2}
    bare, broken = python_with(tmp_path / "a", {}), python_with(tmp_path / "b", {"vllm": "0.30.0"}, "echo boom; exit 1")
    one_line(lambda: speculate(parent, parent, out=out, engine_python=bare, **options), "no vllm", "pip install vllm")  # type: ignore[arg-type]
    one_line(lambda: speculate(parent, parent, out=out, engine_python=broken, **options), "vllm 0.30.0 failed: boom")  # type: ignore[arg-type]
    assert not out.exists()


def test_an_engine_that_used_no_draft_is_told(tmp_path: Path) -> None:
    installed = Installed(ENGINES["vllm"], "python", "0.30.0", {"draft_tokens": 3})
    answer = {"plain": [[[1, 2], 0.5]], "drafted": [[[1, 3], 0.25]], "rounds": 0, "proposed": 0, "accepted": 0}
    one_line(lambda: _result("a", "b", installed, sample("test"), answer), "vllm 0.30.0", "without the draft")
    found = _result("a", "b", installed, sample("test"), answer | {"rounds": 1, "proposed": 1})
    assert (found.equal_prompts, found.speedup, found.num_prompts, found.new_tokens) == (0, 2.0, 1, 2)
