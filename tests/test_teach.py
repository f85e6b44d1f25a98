"""A parent's answers on disk: its own, in any order, taken up when killed, refused when wrong; text that it writes."""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from conftest import SPECIAL, VOCAB_SIZE, save_tiny_parent, tiny_tokenizer
from reference import one_line
from texts import write_text
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ffn_fusion.core.teach_records import Answers, Form, TeachResult
from ffn_fusion.core.topk import TopK, pack, top_k, unpack
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.healing import author, teacher_cache
from ffn_fusion.healing.author import Author, repeats
from ffn_fusion.healing.teacher_cache import SHARD, Cached, TeacherCache, ask, open_cache, write_shard
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.probe import record
from ffn_fusion.hf.text import read_windows
from ffn_fusion.settings import Machine, Text
from ffn_fusion.settings_training import Writing
from ffn_fusion.speed.sampling import Sampler
from ffn_fusion.stages import teach as stage
from ffn_fusion.stages.teach import TEXT, teach

Parent = Callable[[str], Path]
LENGTH, K, LAYERS = 24, 5, (1, 5)
SMALL_SHARD = 2 * 4 * LENGTH * (1 + K + K + 1 + 2 * 64) * 2
"""Room for two batches of four windows with two streams."""
TEMPLATE = (
    "<s>{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
KILLED = f"""
import os, signal
from ffn_fusion import cli
from ffn_fusion.folder import StageFolder
from ffn_fusion.healing import teacher_cache

save = StageFolder.save

def save_and_die(folder, name, data):
    save(folder, name, data)
    if name == "shards.json":
        os.kill(os.getpid(), signal.SIGKILL)

StageFolder.save = save_and_die
teacher_cache.SHARD_BYTES = {SMALL_SHARD}
cli.main()
"""
"""The command line, killed when the first shard is there."""
WRITING = Writing(write=12, max_new_tokens=40, prompt_temperature=6.0, answer_temperature=6.0)
"""Hot enough for the tiny model to say something else each time, and to come to an end now and then."""
GREEDY = Writing(write=24, max_new_tokens=30, top_p=1e-9)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = write_text(tmp_path_factory.mktemp("texts"), documents=60)
    return Text(text=(str(path),), length=LENGTH)


@pytest.fixture(scope="module")
def taught(tiny_parent: Parent, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of the tiny Llama in three shards, the last with half a batch."""
    out = tmp_path_factory.mktemp("answers") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_BYTES", SMALL_SHARD)
        give(tiny_parent, text, out)
    return out


def give(tiny_parent: Parent, text: Text, out: Path, **options: object) -> TeachResult:
    return teach(
        str(tiny_parent("llama")), out=out, text=text, **({"windows": 18, "top_k": K, "hidden": LAYERS} | options)
    ).result  # type: ignore[arg-type]


def windows(tiny_parent: Parent, text: Text, count: int = 18) -> Tensor:
    return read_windows(text, tiny_tokenizer(), count, "fit").ids


def test_a_cache_gives_what_the_parent_answers_itself(taught: Path, tiny_parent: Parent, text: Text) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    cache, ids = open_cache(taught, folder), windows(tiny_parent, text)
    assert (cache.num_windows, cache.length, cache.k, cache.temperature) == (18, LENGTH, K, 1.0)
    assert (cache.vocab_size, cache.layers) == (VOCAB_SIZE, LAYERS)
    assert len(list(taught.glob("shard-*"))) == 3
    own = record(folder.load(torch.float32, "cpu"), ids, outputs=False)
    log_probs, order = own.logits.double().log_softmax(-1).sort(descending=True)
    for chosen in ([17, 0, 9, 9, 16, 7, 8], list(range(18))):
        found = cache.read(chosen)
        assert torch.equal(found.ids, ids[chosen])
        assert found.top.ids.dtype == torch.int64
        assert torch.equal(found.top.ids, order[chosen][..., :K])
        assert (found.top.log_probs - log_probs[chosen][..., :K]).abs().max() < 0.01
        assert (found.top.tail - log_probs[chosen][..., K:].logsumexp(-1)).abs().max() < 0.01
        assert found.streams.keys() == set(LAYERS)
        for layer in LAYERS:
            assert torch.equal(found.streams[layer], own.streams[layer + 1][chosen].bfloat16())


def test_what_is_read_is_what_was_asked_but_for_packing(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    folder = ModelFolder(tiny_parent("qwen2"))
    form = Form(LENGTH, VOCAB_SIZE, 64, 3, 2.0, [0])
    asked = ask(folder.load(torch.float32, "cpu"), windows(tiny_parent, text, 4), form)
    num_bytes, mass = write_shard(tmp_path / SHARD.format(0), [asked], form)
    found = TeacherCache(tmp_path, Answers(form, 4, 4, num_bytes, 0.5)).read(range(4))
    assert all(torch.equal(*pair) for pair in zip(found.top, unpack(pack(asked.top)), strict=True))
    assert torch.equal(found.streams[0], asked.streams[0])
    assert mass == pytest.approx(float(asked.top.tail.exp().sum()), rel=1e-5)
    assert num_bytes == (tmp_path / SHARD.format(0)).stat().st_size


def test_vocabularies_beyond_65536_take_three_bytes(tmp_path: Path) -> None:
    form = Form(6, 150_000, 8, 1, 1.0, [])
    logits = torch.randn(6, 150_000, generator=torch.Generator().manual_seed(0))
    logits[3, 149_999] = 50.0
    ids = torch.tensor([[0, 149_999, 65_536, 65_535, 7, 8]])
    top = TopK(*(part[None] for part in top_k(logits, 1)))
    write_shard(tmp_path / SHARD.format(0), [Cached(ids, top, {})], form)
    found = TeacherCache(tmp_path, Answers(form, 1, 4, 0, 0)).read([0])
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.top.ids, top.ids)
    assert found.top.ids[0, 3, 0] == 149_999


def test_the_record_says_what_it_costs(taught: Path) -> None:
    result = read_record(taught, TeachResult).result
    assert result.answers
    sizes = [path.stat().st_size for path in taught.glob("shard-*")]
    assert result.answers.num_bytes == sum(sizes)
    assert result.answers.num_shards == 3
    assert [result.answers.held(shard) for shard in range(3)] == [8, 8, 2]
    assert f"{sum(sizes) / (18 * LENGTH):.1f} bytes a token" in result.summary()
    assert 0 < result.answers.tail_mass < 1


def test_only_what_is_asked_for_is_read(taught: Path, tiny_parent: Parent, tmp_path: Path) -> None:
    """A window lies at its place, with a checksum of its own."""
    copytree(taught, tmp_path / "a")
    path = tmp_path / "a" / SHARD.format(1)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # within the last window of the shard, if data comes last in the file
    cache = TeacherCache(tmp_path / "a", read_record(taught, TeachResult).result.answers)  # type: ignore[arg-type]
    start = data.index(b"\x28\xb5\x2f\xfd")  # the first compressed piece
    data[start + 5] ^= 255
    path.write_bytes(data)
    intact = open_cache(taught, ModelFolder(tiny_parent("llama"))).read([9])
    assert torch.equal(cache.read([9]).top.log_probs, intact.top.log_probs)
    one_line(lambda: cache.read([9, 8]), SHARD.format(1), "window 8", "damaged")


@pytest.mark.parametrize("kind", ["text only", "unfinished", "missing", "cut", "swapped"])
def test_folders_that_do_not_hold_all_answers_are_refused(
    kind: str, taught: Path, tiny_parent: Parent, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    copytree(taught, folder)
    shard, words = folder / SHARD.format(1), [SHARD.format(1), "damaged"]
    if kind == "text only":
        data = json.loads((folder / RECORD).read_text())
        data["result"]["answers"] = None
        (folder / RECORD).write_text(json.dumps(data))
        words = ["without answers"]
    elif kind == "unfinished":
        (folder / RECORD).unlink()
        words = ["not the folder of a finished stage"]
    elif kind == "missing":
        shard.unlink()
    elif kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.write_bytes((folder / SHARD.format(2)).read_bytes())
    one_line(lambda: open_cache(folder, ModelFolder(tiny_parent("llama"))), *words)


def test_answers_of_another_model_are_refused_and_those_of_a_copy_taken(
    taught: Path, tiny_parent: Parent, tmp_path: Path
) -> None:
    copytree(tiny_parent("llama"), tmp_path / "copy")
    assert open_cache(taught, ModelFolder(tmp_path / "copy")).num_windows == 18
    save_tiny_parent("llama", tmp_path / "larger", vocab_size=160)
    one_line(lambda: open_cache(taught, ModelFolder(tmp_path / "larger")), "vocabulary of 128", "160")
    one_line(lambda: open_cache(taught, ModelFolder(tiny_parent("mistral"))), "another model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(tmp_path / "copy")
    one_line(lambda: open_cache(taught, ModelFolder(tmp_path / "copy")), "another tokenizer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": VOCAB_SIZE}, ["--top-k 128", "128 tokens"]),
        ({"hidden": (1, 6)}, ["--hidden 6", "0 to 5"]),
        ({"windows": 0}, ["--windows 0", "--write"]),
        ({"writing": Writing(opening=5)}, ["--opening 5", "--write"]),
        ({"writing": Writing(write=1, opening=5, max_new_tokens=252), "windows": 0}, ["257", "256"]),
        ({"windows": 3, "writing": WRITING}, ["--windows 3", "--write"]),
        ({"windows": 100_000}, ["100000 windows"]),
        ({"writing": Writing(write=1, max_new_tokens=300), "windows": 0}, ["301", "256", "--max-new-tokens"]),
    ],
)
def test_what_cannot_be_had_is_refused(
    options: dict[str, object], words: list[str], tiny_parent: Parent, text: Text, tmp_path: Path
) -> None:
    one_line(lambda: give(tiny_parent, text, tmp_path / "a", **options), *words)
    assert not (tmp_path / "a").exists()


def test_logits_that_are_not_finite_are_refused(tiny_parent: Parent, text: Text) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38).mul_(1e3)
    one_line(lambda: ask(model, windows(tiny_parent, text, 1), Form(LENGTH, VOCAB_SIZE, 64, K, 1.0, [])), "--dtype")


def test_without_windows_all_of_the_text_is_answered(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    result = give(tiny_parent, text, tmp_path / "a", windows=None, hidden=())
    assert result.answers
    more = result.answers.num_windows + 1
    assert torch.equal(
        open_cache(tmp_path / "a", ModelFolder(tiny_parent("llama"))).read(range(more - 1)).ids,
        windows(tiny_parent, text, more - 1),
    )
    one_line(lambda: windows(tiny_parent, text, more), f"{more} windows")


def test_memory_holds_the_answers_of_one_batch(
    tiny_parent: Parent, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    held = []

    def watched(*arguments: object) -> Cached:
        held.append(sum(reference() is not None for reference in alive))
        cached = ask(*arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(cached.top.log_probs))
        return cached

    monkeypatch.setattr(stage, "ask", watched)
    give(tiny_parent, text, tmp_path / "a")
    assert len(held) == 5
    assert max(held) <= 1


def test_a_killed_run_continues_and_gives_the_same_shards(
    taught: Path, tiny_parent: Parent, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "a", tmp_path / ".a.partial"
    command = [sys.executable, "-c", KILLED, "teach", str(tiny_parent("llama")), "--out", str(out)]
    command += ["--text", text.text[0], "--length", str(LENGTH), "--windows", "18", "--top-k", str(K)]
    command += [option for layer in LAYERS for option in ("--hidden", str(layer))]
    done = subprocess.run(command, check=False, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    first = partial / SHARD.format(0)
    before = first.stat().st_mtime_ns
    assert list(partial.glob("shard-*")) == [first]
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", SMALL_SHARD)
    result = give(tiny_parent, text, out)
    for number in range(3):
        assert (out / SHARD.format(number)).read_bytes() == (taught / SHARD.format(number)).read_bytes()
    assert result == read_record(taught, TeachResult).result
    assert (out / SHARD.format(0)).stat().st_mtime_ns == before, "finished shards are not made again"


@pytest.fixture(scope="module")
def chatty(tiny_parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "parent"
    copytree(tiny_parent("llama"), folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write(parent: Path, out: Path, writing: Writing = WRITING, **options: object) -> TeachResult:
    return teach(
        str(parent), out=out, writing=writing, **({"windows": 0, "machine": Machine(batch_size=24)} | options)
    ).result  # type: ignore[arg-type]


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / TEXT).read_text().splitlines()]


def author_of(parent: Path, writing: Writing = WRITING, template: str | None = TEMPLATE, size: int = 4) -> Author:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Author(ModelFolder(parent).load(torch.float32, "cpu"), tokenizer, writing, 0, size)


@pytest.fixture(scope="module")
def written(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "w"
    write(chatty, out)
    return out


def test_a_parent_writes_conversations_in_its_template(written: Path) -> None:
    result = read_record(written, TeachResult).result
    assert result.answers is None
    assert result.written
    assert (result.written.documents, result.written.chat) == (12, True)
    documents = rows(written)
    assert len(documents) == 12
    assert len({row["text"] for row in documents}) == 12
    for row in documents:
        (user, prompt), (assistant, answer) = ((turn["role"], turn["content"]) for turn in row["messages"])  # type: ignore[attr-defined]
        assert (user, assistant) == ("user", "assistant")
        assert str(row["text"]).startswith(f"<s>[U]{prompt}</s>[A]")
        tail = str(row["text"]).removeprefix(f"<s>[U]{prompt}</s>[A]").removesuffix("</s>")
        assert tail.strip() == answer
        assert not any(token in tail for token in ("<s>", "</s>", "<pad>")), "nobody speaks out of turn"
    ended = [row for row in documents if str(row["text"]).endswith("</s>")]
    assert 0 < len(ended) < 12, "an answer that was cut has no end"
    rejected = sum(result.written.rejected.values())
    assert result.written.share_rejected == rejected / (12 + rejected)
    assert "out of turn" in result.written.rejected
    assert "12 conversations" in result.summary()


def test_prompts_and_answers_are_the_parents_own_likeliest_words(chatty: Path) -> None:
    """Sampled from next to nothing, a batch is one conversation; each answer that of a slow loop without a cache."""
    writer = author_of(chatty, GREEDY)
    model, tokenizer = writer._model, writer._tokenizer

    def slow(head: str) -> str:
        ids = tokenizer(head, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 30 and ids[-1] >= len(SPECIAL):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return tokenizer.decode(ids[start:], skip_special_tokens=True)

    heads = ["<s>[U]Stone?</s>[A]", "<s>[U]Over the quiet river?</s>[A]", "<s>[U]"]
    with torch.no_grad():
        expected = [slow(head) for head in heads]
    assert [said.text for said in writer._write(heads, 1.0, writer._answer_end)] == expected


def test_a_model_without_template_writes_documents(tiny_parent: Parent, tmp_path: Path) -> None:
    result = write(tiny_parent("llama"), tmp_path / "w")
    assert result.written
    assert (result.written.documents, result.written.chat) == (12, False)
    assert all(row.keys() == {"text"} and row["text"] for row in rows(tmp_path / "w"))
    assert "12 documents" in result.summary()


def test_a_chat_model_writes_documents_if_asked_and_past_their_ends(chatty: Path) -> None:
    """The likeliest words of a slow loop without a cache."""
    greedy = replace(GREEDY, documents=True, max_new_tokens=40)
    writer = author_of(chatty, greedy, size=1)
    ids = writer._ids("<s>")
    with torch.no_grad():
        while len(ids) < 41:
            ids.append(int(writer._model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    begun = torch.tensor([ids[:1]])
    assert writer._sample(begun, torch.ones_like(begun), 0.001).tolist() == [ids[1:]]
    freely = replace(greedy, prompt_temperature=1.0, top_p=1.0)
    documents, _ = author_of(chatty, freely, size=8).batch(0, set())
    assert len(documents) == 8
    assert not any(document.messages for document in documents)
    assert any("</s>" in document.text[:-4] for document in documents), "one text follows another"


@pytest.mark.parametrize("roomy", [True, False])
def test_documents_go_on_from_stretches_of_a_text(
    roomy: bool, chatty: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "has_room", lambda _: roomy)
    writing = Writing(write=20, opening=7, max_new_tokens=30, prompt_temperature=0.001)
    result = write(chatty, tmp_path / "w", writing, text=text, machine=Machine(batch_size=8))
    tokenizer, model = tiny_tokenizer(), ModelFolder(chatty).load(torch.float32, "cpu")
    openings = read_windows(replace(text, length=7), tokenizer, None, "fit")
    assert result.written
    assert result.written.openings == openings.sample
    found = [row["text"] for row in rows(tmp_path / "w")]
    assert len(found) == 20
    assert not result.written.chat
    for opening, document in zip(openings.ids, found, strict=False):
        ids = opening.tolist()
        with torch.no_grad():
            while len(ids) < 37:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert document == tokenizer.decode(ids).strip(), "the likeliest words behind the text's own"


def test_a_text_of_few_stretches_is_gone_on_from_again(chatty: Path) -> None:
    tokenizer, model = tiny_tokenizer(), ModelFolder(chatty).load(torch.float32, "cpu")
    openings = torch.tensor([[5, 9, 4], [7, 3, 8]])
    author = Author(model, tokenizer, Writing(opening=3, max_new_tokens=20), 0, 6, Sampler(model), openings)
    documents, rejected = author.batch(0, set())
    begun = Counter(tuple(tokenizer(document.text)["input_ids"][:3]) for document in documents)
    assert begun.keys() == {(5, 9, 4), (7, 3, 8)}
    assert not rejected
    again, _ = author.batch(1, {document.key for document in documents})
    assert len({document.text for document in documents + again}) == 12


def test_documents_come_from_the_decode_step_where_it_has_room(
    tiny_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_asked(*_: object) -> None:
        pytest.fail("the other one writes")

    with monkeypatch.context() as patched:
        patched.setattr(Author, "_sample", not_asked)
        write(tiny_parent("llama"), tmp_path / "roomy")
    monkeypatch.setattr(stage, "has_room", lambda _: False)
    monkeypatch.setattr(stage, "Sampler", not_asked)
    write(tiny_parent("llama"), tmp_path / "tight")
    assert rows(tmp_path / "roomy") == rows(tmp_path / "tight")


def test_where_a_template_has_no_token_for_an_end_its_string_ends(chatty: Path) -> None:
    writer = author_of(chatty, template=TEMPLATE.replace("</s>", "|"))
    batches = [writer.batch(number, set()) for number in range(4)]
    ended = [d for documents, _ in batches for d in documents if d.text.endswith("|")]
    assert ended
    for document in ended:
        assert document.text.count("|") == 2
        assert document.text.startswith(f"<s>[U]{document.messages[0]['content']}|[A]")
    assert not any("repeating itself" in rejected for _, rejected in batches), "padding is no repetition"


def test_no_begin_token_stands_twice_in_what_is_read_back(chatty: Path) -> None:
    writer = author_of(chatty, size=8)
    plain, _ = writer.batch(0, set())
    assert all(document.text.startswith("<s>[U]") for document in plain)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()), bos_token="<s>",
        eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = TEMPLATE
    documents, _ = Author(writer._model, tokenizer, WRITING, 0, 8).batch(0, set())
    assert [document.text for document in documents] == [document.text[3:] for document in plain]
    assert tokenizer(documents[0].text)["input_ids"][:4] == writer._ids("<s>[U]")
    begun = torch.tensor([tokenizer("ab")["input_ids"]])
    opened, _ = Author(writer._model, tokenizer, Writing(opening=3, max_new_tokens=9), 0, 2, None, begun).batch(
        0, set()
    )
    assert all(tokenizer(document.text)["input_ids"][:3] == begun[0].tolist() for document in opened)


def test_what_is_of_no_use_is_rejected_and_counted(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = author_of(chatty)
    known, new, again, cut = ("Known?", True), ("What is  a river?", True), ("what is a River?", True), ("Why?", False)
    prompts = [
        known,
        new,
        again,
        ("...", True),
        cut,
        ("over and " * 20, True),
        ("Who sings?", True),
        ("Who falls?", True),
    ]
    calls = iter([prompts, [("Water.", True), ("", True), ("A bird, and", False)]])
    heads = []

    def written_for(given: list[str], *_: object) -> list[author._Said]:
        heads.append(given)
        found = []
        for text, finished in next(calls):
            fault = "repeating itself" if repeats(text.split()) else None if any(map(str.isalnum, text)) else "empty"
            found.append(author._Said(text, finished, fault))
        return found

    monkeypatch.setattr(writer, "_write", written_for)
    documents, rejected = writer.batch(0, {"known?"})
    assert heads[1] == [f"<s>[U]{q}</s>[A]" for q in ("What is  a river?", "Who sings?", "Who falls?")]
    assert rejected == {"duplicate": 2, "empty": 2, "unfinished": 1, "repeating itself": 1}
    assert [document.text for document in documents] == [
        "<s>[U]What is  a river?</s>[A]Water.</s>",
        "<s>[U]Who falls?</s>[A]A bird, and",
    ]


def test_a_loop_is_one_whose_runs_of_eight_mostly_come_again() -> None:
    assert repeats([1, 2, 3] * 10)
    assert repeats([7] * 16)
    assert not repeats([])
    assert not repeats([7] * 8), "one run"
    assert not repeats(list(range(40)) + list(range(20)))


def test_a_batch_depends_on_its_number_and_the_seed_alone(chatty: Path) -> None:
    one, other = author_of(chatty), author_of(chatty)
    state = torch.random.get_rng_state()
    other.batch(0, set())
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    assert one.batch(1, set()) == other.batch(1, set()) != one.batch(2, set())
    other._seed = 1
    assert one.batch(1, set()) != other.batch(1, set())


def test_killed_while_writing_it_continues_with_the_same_text(
    chatty: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, out = Author.batch, tmp_path / "w"
    numbers = []

    def killed(self: Author, number: int, known: set[str]) -> object:
        numbers.append(number)
        if numbers == [0, 1, 2]:
            raise KeyboardInterrupt
        return plain(self, number, known)

    monkeypatch.setattr(Author, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        write(chatty, out)
    with (tmp_path / ".w.partial" / TEXT).open("a") as file:
        file.write('{"text": "half a li')  # killed between text and state
    result = write(chatty, out)
    assert numbers[:4] == [0, 1, 2, 2]
    assert (out / TEXT).read_bytes() == (written / TEXT).read_bytes()
    assert result == read_record(written, TeachResult).result


def test_a_parent_that_says_nothing_new_is_stopped(chatty: Path, tmp_path: Path) -> None:
    one_line(lambda: write(chatty, tmp_path / "w", GREEDY), "nothing new", "--prompt-temperature")


def test_what_was_written_is_answered_and_is_text_for_every_stage(chatty: Path, tmp_path: Path) -> None:
    text = Text(length=LENGTH, seed=3)
    result = write(chatty, tmp_path / "w", windows=None, text=text, top_k=K)
    assert result.sample
    assert result.sample.sources == [TEXT]
    own = Text(text=(str(tmp_path / "w" / TEXT),), length=LENGTH, seed=3)
    expected = read_windows(own, AutoTokenizer.from_pretrained(chatty), None, "fit")
    assert (expected.ids == 2).any(), "the template's tokens are read as such"
    cache = open_cache(tmp_path / "w", ModelFolder(chatty))
    assert torch.equal(cache.read(range(cache.num_windows)).ids, expected.ids)
