"""Long-context prompts hold what is asked for and fill their length; items in a fitted text are found, each once."""

import random
import re
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conftest import tiny_tokenizer
from reference import one_line

pytest.importorskip("lm_eval")
from ffn_fusion.errors import UserError
from ffn_fusion.tasks.benchmark import Setting
from ffn_fusion.tasks.longcontext import ANSWER_TOKENS, CHAIN, KINDS, LongContext
from ffn_fusion.tasks.overlap import overlapping

LENGTH, ITEMS = 1500, 12
HIDDEN = re.compile(r"The secret number of the \w+ is \d{7}\.|Variable \w{5} has the (?:same )?value (?:as )?\w+\.")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)
each_kind = pytest.mark.parametrize("kind", KINDS)


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        " ".join(rng.choices(("heron", "mill", "under", "gate", "slow"), k=rng.randint(3, 6))) + "."
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def haystack(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stands for the builtin text, which would be fetched."""
    lines = sentences(300)
    documents = ["\n".join(lines[:150]), " ".join(lines[150:])]
    monkeypatch.setattr("ffn_fusion.tasks.longcontext.builtin_text", lambda name: documents)
    return lines


def setting(chat: bool = False, limit: int | None = ITEMS) -> Setting:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return Setting(tokenizer, chat, limit)


class Model:
    """A scorer that hears prompts and answers with `reply` of each."""

    def __init__(self, reply: Callable[[str], str] = lambda prompt: "", max_length: int = LENGTH) -> None:
        self.reply, self.max_length = reply, max_length
        self.prompts: list[str] = []
        self.options: tuple[Any, ...] = ()

    def generate(self, prompts: Sequence[str], *options: Any) -> list[str]:
        self.prompts, self.options = list(prompts), options
        return [self.reply(prompt) for prompt in prompts]


def run(task: LongContext, model: Model) -> list[float | None]:
    return task.run(model, model).values["recall"]  # type: ignore[arg-type]


def prompts_of(kind: str, length: int = LENGTH, **options: Any) -> list[str]:
    model = Model(max_length=length)
    run(LongContext(kind, length, setting(**options)), model)
    return model.prompts


def facts(kind: str, prompt: str) -> list[str]:
    """What a perfect reader would answer."""
    if kind == "vt":
        return re.findall(r"Variable (\w+) has", prompt)
    (thing,) = re.findall(r"What is the secret number of the (\w+)\?", prompt)
    return re.findall(rf"secret number of the {thing} is (\d+)", prompt)


def count(prompt: str) -> int:
    return len(tiny_tokenizer()(prompt)["input_ids"])


@each_kind
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(kind: str, chat: bool) -> None:
    for length in (600, LENGTH):
        sizes = [count(prompt) for prompt in prompts_of(kind, length, chat=chat)]
        assert max(sizes) <= length - ANSWER_TOKENS
        assert min(sizes) >= length - ANSWER_TOKENS - 40, "no sentence is longer than this"


@each_kind
def test_every_prompt_holds_its_hidden_sentences_among_whole_ones_of_the_text(kind: str, haystack: list[str]) -> None:
    task, model = LongContext(kind, LENGTH, setting()), Model()
    run(task, model)
    for prompt, hidden in zip(model.prompts, task.texts(), strict=True):
        assert HIDDEN.findall(prompt) == hidden.split("\n"), "in order"
        around = re.findall(r"[^.]+\.", HIDDEN.sub("", prompt.split("\n\n")[1]))
        assert {sentence.strip() for sentence in around} <= set(haystack)


def test_needles_and_chains_are_as_many_as_their_kind_says() -> None:
    hidden = {kind: LongContext(kind, LENGTH, setting()).texts()[0].count("\n") + 1 for kind in KINDS}
    assert hidden == {"niah_single": 1, "niah_multikey": 4, "vt": CHAIN}


@each_kind
def test_places_secrets_and_texts_differ_from_item_to_item(kind: str) -> None:
    prompts = prompts_of(kind)
    depths = [prompt.index(facts(kind, prompt)[0]) / len(prompt) for prompt in prompts]
    assert max(depths) - min(depths) > 0.4
    assert len({tuple(facts(kind, prompt)) for prompt in prompts}) == ITEMS
    assert len({prompt.split("\n\n")[1][:60] for prompt in prompts}) > ITEMS - 3, "three may begin alike by chance"


@each_kind
def test_an_answer_is_worth_the_share_of_the_facts_that_it_names(kind: str) -> None:
    task = LongContext(kind, LENGTH, setting())
    assert run(task, Model(lambda prompt: f"I think {', '.join(facts(kind, prompt))}.")) == [1.0] * ITEMS
    assert run(task, Model(lambda prompt: facts(kind, prompt)[0][:-1])) == [0.0] * ITEMS
    assert run(task, Model(lambda prompt: facts(kind, prompt)[-1])) == [1.0 / (CHAIN if kind == "vt" else 1)] * ITEMS


@pytest.mark.parametrize("place", range(4))
def test_no_place_among_the_needles_gives_the_answer_away(place: int) -> None:
    def needle(prompt: str) -> str:
        return re.findall(r"is (\d{7})\.", prompt)[place]

    assert 0 < sum(map(float, run(LongContext("niah_multikey", LENGTH, setting()), Model(needle)))) < ITEMS


def test_a_chat_ends_by_itself_and_plain_text_at_a_blank_line() -> None:
    for chat, stop in ((True, ()), (False, ("\n\n",))):
        model = Model()
        run(LongContext("vt", LENGTH, setting(chat=chat)), model)
        assert model.options == (ANSWER_TOKENS, stop)
        assert model.prompts[0].startswith("[user]") is chat
        assert model.prompts[0].endswith("[/][bot]" if chat else "alone.\n\n")


def test_items_are_fifty_unless_limited_and_a_limit_takes_the_first() -> None:
    few, all_of_them = (LongContext("niah_single", 400, setting(limit=limit)) for limit in (3, None))
    assert (few.about.num_items, few.about.total_items, all_of_them.about.num_items) == (3, 50, 50)
    assert few.texts() == all_of_them.texts()[:3]


def test_the_key_is_of_the_prompts() -> None:
    def key(kind: str = "vt", length: int = LENGTH, **options: Any) -> str:
        return LongContext(kind, length, setting(**options)).key

    assert key() == key()
    assert len({key(), key("niah_single"), key(length=1400), key(limit=3), key(chat=True)}) == 5


def test_a_model_that_takes_fewer_tokens_is_refused() -> None:
    task = LongContext("vt", LENGTH, setting(limit=1))
    one_line(lambda: run(task, Model(max_length=LENGTH - 1)), "1,499")
    run(task, Model(max_length=LENGTH))


@each_kind
def test_a_length_without_room_for_its_question_is_refused(kind: str) -> None:
    shortest = bisect_left(range(LENGTH), True, key=lambda length: fits(kind, length))
    one_line(lambda: LongContext(kind, shortest - 1, setting(limit=1)), f"{kind}@{shortest - 1}", "too short")
    (prompt,) = prompts_of(kind, shortest, limit=1)
    assert count(prompt) <= shortest - ANSWER_TOKENS


def fits(kind: str, length: int) -> bool:
    try:
        LongContext(kind, length, setting(limit=1))
    except UserError:
        return False
    return True


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]


def found(texts: list[str], *documents: str) -> int:
    return overlapping({"task": texts}, documents)["task"]


def test_thirteen_words_in_a_row_are_found_whatever_their_case_punctuation_and_lines() -> None:
    text = " ".join(WORDS)
    assert found([text], f"Before. {text.upper()}, after") == 1
    assert found([text], "; ".join(WORDS)) == 1
    assert found([text], "a\nb\n" + "\n".join(WORDS)) == 1
    assert found([f"So: «{'-'.join(WORDS).title()}»?"], text) == 1
    assert found([text], text.replace("six", "6")) == 0


def test_twelve_words_are_not_enough() -> None:
    text = " ".join(WORDS)
    for part in (WORDS[1:], WORDS[:-1]):
        assert found([text], f"x {' '.join(part)} x") == 0
        assert found([" ".join(part)], text, " ".join(part)) == 0, "a text of twelve words cannot be found"
    assert found([text], " ".join(WORDS[:6]), " ".join(WORDS[6:])) == 0, "nor do documents join"


def test_an_item_counts_once_however_often_it_occurs() -> None:
    long = " ".join([*WORDS, *WORDS])
    assert found([long, "another text", long], long, long) == 2


def test_items_are_counted_for_their_own_task() -> None:
    here, there = " ".join(WORDS), " ".join(reversed(WORDS))
    tasks = {"both": [here, there], "one": [there], "none": ["nothing"], "empty": []}
    assert overlapping(tasks, [f"{here} {here}"]) == {"both": 1, "one": 0, "none": 0, "empty": 0}


def test_documents_stream_by_one_at_a_time() -> None:
    class Document(str):
        """A string that can be watched."""

    def stream() -> Iterator[str]:
        made: list[weakref.ref[Document]] = []
        for number in range(50):
            document = Document(" ".join(WORDS) if number == 30 else f"document {number}")
            made.append(weakref.ref(document))
            assert sum(reference() is not None for reference in made) <= 2, "the last one and this one"
            yield document

    assert overlapping({"task": [" ".join(WORDS)]}, stream()) == {"task": 1}
