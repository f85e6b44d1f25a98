"""Our scorer and loop over the harness' tasks must answer as the harness' own model does, item by item."""

import copy
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, save_tiny_parent, tiny_tokenizer
from questions import ARC, PIQA, Rows, cut_off, write_rows
from reference import one_line
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.tasks.benchmark import Items, Setting
from ffn_fusion.tasks.catalog import Catalog
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.sandbox import why_no_sandbox
from ffn_fusion.tasks.scorer import Scorer

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = 4096


class Plain(HFLM):  # type: ignore[misc]
    """The harness' model with nothing changed; `answer` is how our tasks call a model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        # A tokenizer of its own: the harness changes what it is given.
        super().__init__(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=8)

    def answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        answers: list[Any] = getattr(self, kind)(requests, disable_tqdm=True)
        return answers


class Fake:
    """A scorer that writes `reply` of a question's document."""

    def __init__(self, reply: Callable[[dict[str, Any]], str]) -> None:
        self.reply = reply

    def answer(self, kind: str, requests: list[Instance]) -> list[str]:
        assert kind == "generate_until"
        return [self.reply(request.doc) for request in requests]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A llama that takes prompts of some length, a letter a token."""
    folder = save_tiny_parent("llama", tmp_path_factory.mktemp("long") / "parent", max_position_embeddings=LONG)
    model = ModelFolder(folder).load(torch.float32, "cpu")
    # All that no answer would show.
    model.generation_config.suppress_tokens = [0, 1, 3, *range(len(tiny_tokenizer()), VOCAB_SIZE)]
    return model


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> in front of every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def options(*stop: str, max_tokens: int = 40) -> dict[str, Any]:
    return {"until": list(stop), "do_sample": False, "temperature": 0.0, "max_gen_toks": max_tokens}


@contextmanager
def widths(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of a row in each pass."""
    seen: list[int] = []
    hook = model.register_forward_hook(
        lambda _, __, given, ___: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    yield seen
    hook.remove()


QUESTION = "Question: which of the three is the oldest?\nAnswer:"
PAIRS = (
    *((QUESTION, f" {answer}") for answer in ("the tree", "the river", "a stone", "the tree in the north")),
    *((QUESTION, letter) for letter in "ABC"),
    ("The end of this one is blank ", "and moves over"),
    ("Two blanks  ", "x"),
    ("and a line\n", "end"),
    ("", "nothing before"),
    ("", "o"),
    ("", "<s>begins by itself"),
    ("<s>begins by itself", " as well"),
    ("same", " twice"),
    ("same", " twice"),
    ("x" * 300 + "the beginning is lost", " here"),
)


@pytest.mark.parametrize("make", [tiny_tokenizer, with_bos])
def test_log_likelihoods_are_those_of_the_harness(
    make: Callable[[], PreTrainedTokenizerFast], tiny_parent: Callable[[str], Path]
) -> None:
    model = ModelFolder(tiny_parent("granite")).load(torch.float32, "cpu")
    asked = requests("loglikelihood", *PAIRS)
    wanted = Plain(model, make()).answer("loglikelihood", asked)
    found = Scorer(model, make(), {}).answer("loglikelihood", asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_tokenizer_that_adds_its_mark_changes_the_scores(model: PreTrainedModel) -> None:
    """Else the comparison above would say nothing about it."""
    one, other = (Scorer(model, make(), {}).log_probability(["a"], ["b"]) for make in (tiny_tokenizer, with_bos))
    assert one != pytest.approx(other, abs=1e-2)


def test_whole_texts_longer_than_the_model_takes_score_as_in_the_harness(tiny_parent: Callable[[str], Path]) -> None:
    model = ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")
    asked = requests("loglikelihood_rolling", ("a text " * 80,), ("short",))
    wanted, found = (
        lm.answer("loglikelihood_rolling", asked)
        for lm in (Plain(model, tiny_tokenizer()), Scorer(model, tiny_tokenizer(), {}))
    )
    assert found == pytest.approx(wanted, abs=1e-2)


PROMPTS = ("Hello there", "abc", "A longer prompt, which the others are padded to.", "One\n")


@pytest.mark.parametrize("make", [tiny_tokenizer, with_bos])
def test_generated_answers_are_those_of_the_harness(
    make: Callable[[], PreTrainedTokenizerFast], model: PreTrainedModel
) -> None:
    plain, ours = Plain(model, make()), Scorer(model, make(), {})
    free = plain.answer("generate_until", requests("generate_until", *((p, options()) for p in PROMPTS)))
    assert all(len(answer) > 6 for answer in free), "to have something to stop at"
    stops = (options(), options(free[0][4:6]), options(free[1][3], free[2][2:5], "none"), options(free[3][:2]))
    asked = requests("generate_until", *((prompt, stop) for stop in stops for prompt in PROMPTS))
    wanted = plain.answer("generate_until", asked)
    assert len(set(wanted)) > len(PROMPTS), "some stopped early"
    assert ours.answer("generate_until", asked) == wanted
    assert ours.generate(PROMPTS, 40) == free


def test_a_prompt_is_done_at_its_own_stop_string(model: PreTrainedModel) -> None:
    plain, ours = Plain(model, tiny_tokenizer()), Scorer(model, tiny_tokenizer(), {})
    free = ours.generate(PROMPTS[:3], 60)
    stop = [answer[3:6] for answer in free]
    asked = requests("generate_until", *((prompt, options(*stop, max_tokens=60)) for prompt in PROMPTS[:3]))
    with widths(model) as of_harness:
        wanted = plain.answer("generate_until", asked)
    with widths(model) as of_ours:
        assert ours.answer("generate_until", asked) == wanted
    assert wanted == ours.generate(PROMPTS[:3], 60, stop) == [answer[:3] for answer in free]
    assert len(of_ours) == 6
    assert len(of_harness) > 30


def test_a_stop_string_cannot_begin_in_the_prompt(model: PreTrainedModel) -> None:
    plain, ours = Plain(model, tiny_tokenizer()), Scorer(model, tiny_tokenizer(), {})
    (free,) = ours.generate(["abc"], 20)
    asked = requests("generate_until", ("abc", options(f"c{free[0]}", max_tokens=20)))
    assert ours.answer("generate_until", asked) == plain.answer("generate_until", asked) == [free]


def test_log_probability_is_that_of_the_answer_after_its_prompt(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer("prompt: answer")["input_ids"]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    wanted = sum(float(log_probs[place - 1, ids[0, place]]) for place in range(8, 14))
    assert Scorer(model, tokenizer, {}).log_probability(["prompt: "], ["answer"]) == pytest.approx(
        [wanted + float(log_probs[6, ids[0, 7]])], abs=1e-4
    ), "with the blank, as the harness moves it over"


class Counting(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Notes what it is asked to encode."""

    encoded: list[Any]

    def _encode_plus(self, text: Any, **given: Any) -> Any:
        self.encoded.append(text)
        return super()._encode_plus(text, **given)


def test_two_scorers_with_the_same_tokens_encode_every_text_once(model: PreTrainedModel) -> None:
    tokenizer = Counting(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<s>")
    tokenizer.encoded, tokens = [], {}
    asked = requests("loglikelihood", *(pair for pair in PAIRS if pair[0] and "<s>" not in pair[0]))
    first = Scorer(model, tokenizer, tokens).answer("loglikelihood", asked)
    (batch,) = tokenizer.encoded
    assert len(batch) == len(set(batch)), "all at once, each once"
    assert Scorer(model, tokenizer, tokens).answer("loglikelihood", asked) == first
    assert len(tokenizer.encoded) == 1


GSM8K: Rows = [
    {"question": f"Ann has {n} pears and eats one. How many are left?", "answer": f"{n} - 1 = {n - 1}\n#### {n - 1}"}
    for n in (3, 9, 14, 40)
]
FOLLOWED = [
    ("punctuation:no_comma", {}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 4}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("startend:quotation", {}),
]
IFEVAL: Rows = [
    {"key": key, "prompt": f"Write about number {key}.", "instruction_id_list": names, "kwargs": given}
    for key in range(4)
    for names, given in [map(list, zip(*FOLLOWED[key : key + 2], strict=True))]
]
HUMANEVAL: Rows = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def add_{n}(a: int) -> int:\n    """Add {n}."""\n',
        "entry_point": f"add_{n}",
        "canonical_solution": f"    return a + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + n}\n",
    }
    for n in (1, 5)
]
DATA: dict[str, Rows] = {
    "arc_easy": ARC,
    "piqa": PIQA,
    "lambada_openai": [{"text": f"{start} and so it came to the {end}"} for start in "abc" for end in ("end", "river")],
    "winogrande": [
        {"sentence": f"The {a} is older than the {b} because _ was first.", "option1": a, "option2": b, "answer": "1"}
        for a, b in (("mill", "bridge"), ("tree", "road"), ("song", "book"))
    ],
    "gsm8k_cot": GSM8K,
    "gsm8k": GSM8K,
    "ifeval": IFEVAL,
    "humaneval": HUMANEVAL,
    "humaneval_instruct": HUMANEVAL,
    "bbh_zeroshot_snarks": [{"input": "Which is sarcastic?", "target": "(A)"}],
}
METRICS = {
    "arc_easy": ["acc_norm", "acc"],
    "piqa": ["acc_norm", "acc"],
    "lambada_openai": ["acc", "perplexity, log-likelihood"],
    "winogrande": ["acc"],
    "gsm8k_cot": ["exact_match, flexible-extract", "exact_match, strict-match"],
    "ifeval": [
        *("prompt_level_strict_acc", "inst_level_strict_acc"),
        *("prompt_level_loose_acc", "inst_level_loose_acc"),
    ],
}
"""Names, the one first by which a task is known."""
Build = Callable[..., HarnessTask]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """A task on `rows`, by default those of `DATA`; there is no network, and nothing of nltk's data."""
    import nltk

    def download(*_: object) -> None:
        raise AssertionError("nltk went for its data")

    cut_off(monkeypatch, tmp_path)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", download)
    if known := sys.modules.get("lm_eval.tasks.ifeval.instructions_util"):
        known._get_sentence_tokenizer.cache_clear()
    folders = (tmp_path / f"data-{number}" for number in itertools.count())

    def build(name: str, rows: Rows | None = None, **options: Any) -> HarnessTask:
        return build_from(name, write_rows(next(folders) / f"{name}.jsonl", rows or DATA[name]), **options)

    return build


def build_from(
    name: str,
    path: Path,
    chat: bool = False,
    limit: int | None = None,
    num_fewshot: int | None = None,
    **config: Any,
) -> HarnessTask:
    catalog, tokenizer = Catalog({name: path}, num_fewshot), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (leaf,) = catalog.leaves(name)
    return HarnessTask(catalog, replace(leaf, config=leaf.config | config), Setting(tokenizer, chat, limit))


def run(task: HarnessTask, lm: Any) -> Items:
    return task.run(lm, lm)


def short(name: str) -> dict[str, Any]:
    """Few examples and answers of a few tokens."""
    brief = {"generation_kwargs": options("Q:", max_tokens=8)}
    return {"gsm8k_cot": brief | {"num_fewshot": 1}, "ifeval": brief}.get(name, {})


@pytest.mark.parametrize("name", METRICS)
def test_every_item_is_worth_what_it_is_to_the_harness(name: str, build: Build, model: PreTrainedModel) -> None:
    task = build(name, **short(name))
    wanted = run(task, Plain(model, tiny_tokenizer()))
    found = run(task, Scorer(model, tiny_tokenizer(), {}))
    assert list(found.values) == METRICS[name]
    assert found.higher_is_better == dict.fromkeys(METRICS[name], True)
    for metric, values in found.values.items():
        assert values == pytest.approx(wanted.values[metric], abs=1e-4), metric
        parts = "instruction_id_list" if metric.startswith("inst_level") else ""
        assert len(values) == sum(len(row.get(parts, "1")) for row in DATA[name]), metric
    assert found.responses == wanted.responses
    assert len(found.responses) == (len(DATA[name]) if short(name) else 0)


def test_values_are_those_that_the_harness_itself_reports(build: Build, model: PreTrainedModel) -> None:
    """Its evaluator, on its own model, means over the same items."""
    import lm_eval

    task, plain = build("arc_easy"), Plain(model, tiny_tokenizer())
    found = run(task, Scorer(model, tiny_tokenizer(), {}))
    results = lm_eval.evaluate(plain, {"arc_easy": task._task}, bootstrap_iters=0)["results"]["arc_easy"]
    for metric, values in found.values.items():
        assert sum(map(float, values)) / len(values) == results[f"{metric},none"]  # type: ignore[arg-type]


def test_the_log_likelihood_of_lambada_is_of_its_last_word(build: Build, model: PreTrainedModel) -> None:
    scorer = Scorer(model, tiny_tokenizer(), {})
    split = [row["text"].rpartition(" ") for row in DATA["lambada_openai"]]
    wanted = scorer.log_probability([before for before, _, _ in split], [f" {word}" for _, _, word in split])
    assert run(build("lambada_openai"), scorer).values["perplexity, log-likelihood"] == pytest.approx(wanted, abs=1e-4)


def test_an_item_is_answered_as_often_as_its_task_says(build: Build) -> None:
    found = run(build("gsm8k_cot", repeats=3), Fake(lambda document: "The answer is 2."))
    assert found.responses == ["The answer is 2."] * 12
    assert found.values["exact_match, strict-match"] == [1.0, 0.0, 0.0, 0.0]


def test_what_is_said_about_a_task_is_what_was_run(build: Build) -> None:
    whole, few = build("gsm8k_cot").about, build("gsm8k_cot", limit=3, chat=True, num_fewshot=2).about
    assert (whole.num_items, whole.total_items, whole.num_fewshot, whole.chat_template) == (4, 4, 8, False)
    assert (few.num_items, few.total_items, few.num_fewshot, few.chat_template) == (3, 4, 2, True)
    assert build("gsm8k_cot", limit=30).about.num_items == 4
    assert re.fullmatch(r"gsm8k_cot\.jsonl, sha256 \w{16}", whole.data)
    assert re.fullmatch(r"3\.0 \(lm-eval \d.*\)", whole.version)


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k_cot"])
def test_a_limit_takes_the_first_items(name: str, build: Build, model: PreTrainedModel) -> None:
    scorer = Scorer(model, tiny_tokenizer(), {})
    whole, few = build(name, **short(name)), build(name, limit=2, **short(name))
    assert few.texts() == whole.texts()[:2]
    every = run(whole, scorer).values
    assert {metric: values[:2] for metric, values in every.items()} == run(few, scorer).values
    assert len(prompts(few)) == len(prompts(whole)) * 2 / len(DATA[name]), "and asks for no others"


def test_the_text_of_an_item_holds_question_options_and_answer(build: Build) -> None:
    (text,) = build("arc_easy", limit=1).texts()
    assert all(part in text for part in (ARC[0]["question"], *ARC[0]["choices"]["text"]))
    (text,) = build("gsm8k", limit=1, num_fewshot=0).texts()
    assert all(part in text for part in GSM8K[0].values())


def prompts(task: HarnessTask) -> list[str]:
    heard: list[str] = []

    class Listener:
        def answer(self, kind: str, requests: list[Instance]) -> list[Any]:
            heard.extend(request.args[0] for request in requests)
            return ["" if kind == "generate_until" else (0.0, False) for _ in requests]

    run(task, Listener())
    return heard


def test_examples_are_shown_out_of_their_split_the_same_each_time(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "arc"
    for split, rows in (("train", ARC[4:]), ("test", ARC[:2])):
        write_rows(folder / f"{split}.jsonl", rows)
    one, two = (build_from("arc_easy", folder, num_fewshot=2) for _ in range(2))
    shown = re.findall(r"Question: (.*)\nAnswer: (.+)\n\n", prompts(one)[0])
    assert len(shown) == 2
    assert {question for question, _ in shown} < {row["question"] for row in ARC[4:]}
    assert prompts(one) == prompts(two)
    assert one.key == two.key
    assert prompts(build_from("arc_easy", folder))[0].count("Question:") == 1


def test_a_chat_template_is_applied_when_asked_for(build: Build) -> None:
    assert prompts(build("ifeval"))[0] == IFEVAL[0]["prompt"]
    assert prompts(build("ifeval", chat=True))[0] == f"<user>{IFEVAL[0]['prompt']}<end><assistant>"
    turns = prompts(build("gsm8k_cot", chat=True, num_fewshot=2))[0].split("<end>")
    assert [turn.partition(">")[0] for turn in turns] == ["<user", "<assistant"] * 3
    begun = prompts(build("humaneval_instruct", chat=True))[0]
    assert re.fullmatch(r"<user>Write a solution.*<end><assistant>Here is .*", begun, re.DOTALL)
    assert begun.rstrip().endswith('"""Add 1."""'), "the answer goes on from the prompt"


def test_the_key_changes_with_everything_but_the_model(build: Build, model: PreTrainedModel) -> None:
    """A key that stays lets an old value stand for a new question."""
    changed_answer = [GSM8K[0] | {"answer": "#### 7"}, *GSM8K[1:]]
    changed_question = [GSM8K[0] | {"question": "How many?"}, *GSM8K[1:]]
    tasks = {
        "as it is": build("gsm8k_cot"),
        "limit": build("gsm8k_cot", limit=3),
        "examples": build("gsm8k_cot", num_fewshot=1),
        "chat": build("gsm8k_cot", chat=True),
        "question": build("gsm8k_cot", changed_question),
        "right answer": build("gsm8k_cot", changed_answer),
        "stop": build("gsm8k_cot", generation_kwargs=options("Q:")),
        "filter": build("gsm8k_cot", filter_list=None),
        "metric": build("gsm8k_cot", metric_list=[{"metric": "exact_match"}]),
        "task": build("gsm8k", num_fewshot=0),
    }
    assert len({task.key for task in tasks.values()}) == len(tasks), {name: t.key for name, t in tasks.items()}
    again = build("arc_easy", limit=1)
    key = again.key
    run(again, Scorer(model, tiny_tokenizer(), {}))
    assert again.key == key == build("arc_easy", limit=1).key


def test_a_task_whose_filter_is_a_class_has_a_key_that_stays(build: Build) -> None:
    assert build("bbh_zeroshot_snarks").key == build("bbh_zeroshot_snarks").key


def test_two_models_share_a_task_and_keep_their_answers_apart(
    build: Build, model: PreTrainedModel, tiny_parent: Callable[[str], Path]
) -> None:
    other = ModelFolder(tiny_parent("granite")).load(torch.float32, "cpu")
    tokens: dict[str, Any] = {}
    one, two = (Scorer(m, tiny_tokenizer(), tokens) for m in (model, other))
    for name in ("lambada_openai", "ifeval"):
        task = build(name, **short(name))
        first, second, third = (run(task, lm) for lm in (one, two, one))
        assert first == third
        assert first != second
        assert second == run(build(name, **short(name)), two)


sandboxed = pytest.mark.skipif(why_no_sandbox() is not None, reason=str(why_no_sandbox()))


@sandboxed
def test_a_program_is_right_if_its_tests_pass(build: Build) -> None:
    task = build("humaneval")
    assert task.about.num_items == 2
    right = run(task, Fake(lambda document: document["canonical_solution"]))
    assert right.values == {"pass@1": [1.0, 1.0]}
    assert right.higher_is_better == {"pass@1": True}
    assert right.responses == [row["canonical_solution"] for row in HUMANEVAL]
    one_off = run(task, Fake(lambda document: "    return a + 5\n"))
    assert one_off.values == {"pass@1": [0.0, 1.0]}


@sandboxed
def test_a_program_in_a_chat_ends_with_its_code_block(build: Build) -> None:
    def chatty(document: dict[str, Any]) -> str:
        return document["canonical_solution"] + "```\n\nThis adds a number. ```more```"

    assert run(build("humaneval_instruct", chat=True), Fake(chatty)).values == {"pass@1": [1.0, 1.0]}
    assert run(build("humaneval"), Fake(chatty)).values == {"pass@1": [0.0, 0.0]}


def test_sentences_are_counted_without_data_of_nltk(build: Build, tmp_path: Path) -> None:
    rows = [
        {
            "key": key,
            "prompt": "Write.",
            "instruction_id_list": ["length_constraints:number_sentences"],
            "kwargs": [{"relation": relation, "num_sentences": count}],
        }
        for key, (relation, count) in enumerate([("at least", 3), ("at least", 4), ("less than", 3), ("less than", 4)])
    ]
    task = build("ifeval", rows)
    text = "Dr. Smith came at 3 p.m. with a friend, i.e. Prof. Jones. They sat down! Was it late?"
    found = run(task, Fake(lambda document: text)).values
    assert found["prompt_level_strict_acc"] == [1.0, 0.0, 0.0, 1.0], "three sentences"
    assert (tmp_path / "cache" / "nltk_data" / "tokenizers" / "punkt_tab" / "english").is_dir()


def test_instructions_are_checked_by_item_and_by_instruction(build: Build) -> None:
    found = run(build("ifeval"), Fake(lambda document: '"in quotation marks, with a comma"')).values
    assert found["prompt_level_strict_acc"] == [0.0, 0.0, 0.0, 1.0]
    assert found["inst_level_strict_acc"] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_data_that_does_not_fit_is_refused_with_its_columns(build: Build) -> None:
    one_line(lambda: build("arc_easy", [{"query": "?"}]), "arc_easy", "does not fit", "query")
