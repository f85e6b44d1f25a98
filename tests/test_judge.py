"""The judge behind a real local endpoint: the right verdict for each item, and one line whatever goes wrong."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from reference import one_line

pytest.importorskip("openai")
from ffn_fusion.tasks.judge import GREETING, Form, Judge, JudgeGone, Messages
from ffn_fusion.tasks.judged import (
    compare_arena,
    load_arena_hard,
    load_mt_bench,
    rate_mt_bench,
    read_label,
    read_rating,
)

Reply = str | int | bytes
FORM = Form(read_rating, "rate it")


class Server:
    """An OpenAI-style endpoint: `reply` maps the messages to a text, a status or a raw body; `stop` frees the port."""

    def __init__(self, port: int = 0) -> None:
        self.reply: Callable[[list[dict[str, str]]], Reply] = lambda messages: "[[5]]"
        self.models, self.seen, self.stop_at = ["first", "second"], list[dict[str, Any]](), 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"object": "list", "data": [{"id": name} for name in endpoint.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.seen.append(body | {"path": self.path, "auth": self.headers["Authorization"]})
                if len(endpoint.seen) == endpoint.stop_at:
                    endpoint.stop()  # before the reply, so that no question slips in after it
                reply = endpoint.reply(body["messages"])
                if isinstance(reply, int):
                    self.send({"error": {"message": f"status\n{reply}"}}, reply)
                elif isinstance(reply, str):
                    self.send({"choices": [{"message": {"role": "assistant", "content": reply}}]})
                else:
                    self.send(reply)

            def send(self, body: dict[str, Any] | bytes, status: int = 200) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                with suppress(BrokenPipeError):  # the judge's client may not have waited
                    self.send_response(status)
                    self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def asked(self) -> list[str]:
        """The first user message of each request."""
        return [next(m["content"] for m in body["messages"] if m["role"] == "user") for body in self.seen]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.stop()


def judge_at(server: Server, folder: Path, **options: Any) -> Judge:
    return Judge(server.url, folder / "replies.jsonl", **({"name": "j", "retries": 0, "timeout": 20} | options))


def numbered(count: int) -> list[Messages]:
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def ask(judge: Judge, count: int) -> list[float | None]:
    return judge.ask_all(numbered(count), FORM)


def failing(what: Reply, *numbers: int) -> Callable[[list[dict[str, str]]], Reply]:
    """A judge that answers some questions with `what`, reminded or not, and rates the others by their number."""

    def reply(messages: list[dict[str, str]]) -> Reply:
        number = int(messages[0]["content"].split()[-1]) if messages[0] != GREETING[0] else -1
        return what if number in numbers else f"[[{number % 10 + 1}]]"

    return reply


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def mt_bench(tmp_path: Path) -> Path:
    single, multi = "Q {question} A {answer}", "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"
    prompts = {
        "pair-v2": "{answer_a} {answer_b}",
        "single-v1": single,
        "single-math-v1": "REF {ref_answer_1} " + single,
        "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": "REF {ref_answer_1} REF {ref_answer_2} " + multi,
    }
    rows = [{"name": name, "system_prompt": f"sys {name}", "prompt_template": text} for name, text in prompts.items()]
    write_rows(tmp_path / "judge_prompts.jsonl", rows)
    questions = [(81, "writing", ["Write.\u2028", "Again."]), (111, "math", ["1+1?", "2+2?"])]
    rows = [{"question_id": number, "category": category, "turns": turns} for number, category, turns in questions]
    write_rows(tmp_path / "question.jsonl", rows)
    choices = [{"index": 0, "turns": ["two", "four"]}]
    write_rows(tmp_path / "reference.jsonl", [{"question_id": 111, "model_id": "gpt-4", "choices": choices}])
    return tmp_path


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    prompts = {"template": "{QUESTION}|{ANSWER_A}|{ANSWER_B}", "hard_prompt": "hard", "creative_writing": "creative"}
    write_rows(tmp_path / "judge_prompts.json", [prompts])
    categories = [("hard_prompt", "coding"), ("hard_prompt", "math"), ("creative_writing", "creative_writing")]
    rows = [{"uid": f"u{i}", "category": c, "subcategory": s, "prompt": f"p{i}"} for i, (c, s) in enumerate(categories)]
    write_rows(tmp_path / "question.jsonl", rows)
    return tmp_path


def test_every_answer_is_rated_by_the_prompt_of_its_turn_and_category(server: Server, mt_bench: Path) -> None:
    questions = load_mt_bench(mt_bench)
    assert [q.turns for q in questions] == [("Write.\u2028", "Again."), ("1+1?", "2+2?")]
    server.reply = lambda messages: f"Rating: [[{re.findall('worth ([0-9.]+)', messages[1]['content'])[-1]}]]"
    answers = [("{worth} worth 3", "worth 4.5"), ("worth 1", "worth 10")]
    assert rate_mt_bench(questions, answers, judge_at(server, mt_bench)) == [3, 4.5, 1, 10]
    assert sorted((m[0]["content"], m[1]["content"]) for m in (body["messages"] for body in server.seen)) == [
        ("sys single-math-v1", "REF two Q 1+1? A worth 1"),
        ("sys single-math-v1-multi-turn", "REF two REF four Q 1+1? A worth 1 Q 2+2? A worth 10"),
        ("sys single-v1", "Q Write.\u2028 A {worth} worth 3"),
        ("sys single-v1-multi-turn", "Q Write.\u2028 A {worth} worth 3 Q Again. A worth 4.5"),
    ]


def test_a_preference_is_found_in_both_places_and_a_place_is_none(server: Server, arena: Path) -> None:
    questions, judge = load_arena_hard(arena), judge_at(server, arena)
    server.reply = lambda messages: "[[A>B]]"
    assert compare_arena(questions, [("x",)] * 3, [("y",)] * 3, judge) == [0.5, 0.5, 0.5]
    assert {(b["messages"][0]["content"], b["messages"][1]["content"].split("|")[0]) for b in server.seen} == {
        ("hard", "p0"),
        ("hard", "p1"),
        ("creative", "p2"),
    }
    server.reply = lambda messages: "[[A>>B]]" if messages[1]["content"].split("|")[1] == "good" else "[[B>>A]]"
    assert compare_arena(questions, [("bad",)] * 3, [("good",)] * 3, judge) == [1, 1, 1]
    assert compare_arena(questions, [("good",)] * 3, [("bad",)] * 3, judge) == [0, 0, 0]


@pytest.mark.parametrize(
    ("second", "first", "share"),
    [
        ("[[B>>A]]", "[[B>A]]", 3 / 4),  # three wins against one loss
        ("[[A>>B]]", "[[A=B]]", 0.5 / 4),
        ("[[A<B]]", "[[A<<B]]", 1 / 4),
        ("dunno", "[[A>B]]", 1.0),
        ("dunno", "dunno", None),
    ],
)
def test_a_significant_win_counts_as_three(
    server: Server, arena: Path, second: str, first: str, share: float | None
) -> None:
    """`second` is the verdict with the student as B, `first` with the student as A."""
    replies = {"p0|x|y": second, "p0|y|x": first}
    server.reply = lambda messages: replies.get(messages[1]["content"], "[[A=B]]")
    judge = judge_at(server, arena)
    assert compare_arena(load_arena_hard(arena), [("x",)] * 3, [("y",)] * 3, judge) == [share, 0.5, 0.5]
    assert judge.missed == [second, first].count("dunno")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("[[7]]", 7), ("a [[7.5]] [[2]]", 7.5), ("[6]", 6), ("[[0]]", None), ("[[11]]", None), ("seven", None)],
)
def test_a_rating_is_read_as_fastchat_reads_it_and_lies_in_its_range(reply: str, rating: float | None) -> None:
    assert read_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "label"),
    [("[[A>B]] no, [[b>>a]]", "B>>A"), ("[B=A]", "A=B"), ("[[A<<B]]", "B>>A"), ("[[A>A]]", None), ("A>B", None)],
)
def test_the_last_label_is_read(reply: str, label: str | None) -> None:
    assert read_label(reply) == label


def test_what_is_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "private")
    ask(judge_at(server, tmp_path, name=None), 1)
    ask(judge_at(server, tmp_path, name="second", key="k"), 1)
    sent = [(b["model"], b["auth"], b["temperature"], b["max_tokens"], b["path"]) for b in server.seen]
    assert sent[0] == ("first", "Bearer none", 0, 2048, "/v1/chat/completions")
    assert sent[1][:2] == ("second", "Bearer k")
    server.models = []
    one_line(lambda: ask(judge_at(server, tmp_path, name=None), 1), server.url, "--judge-model")


def test_a_reply_without_a_verdict_is_asked_for_once_more(server: Server, tmp_path: Path) -> None:
    server.reply = lambda messages: "Rating: [[8]]" if messages[-1]["content"] == "rate it" else "Rather good."
    assert ask(judge_at(server, tmp_path), 1) == [8]
    assert [m["role"] for m in server.seen[1]["messages"]] == ["user", "assistant", "user"]
    assert server.seen[1]["messages"][1]["content"] == "Rather good."
    server.reply = lambda messages: "" if len(messages) == 1 else "[[4]]"
    assert ask(judge_at(server, tmp_path, name="curt"), 1) == [4]
    assert server.seen[-1]["messages"][1]["content"]


def test_a_thought_is_no_verdict(server: Server, tmp_path: Path) -> None:
    server.reply = lambda messages: "<think>[[9]] or [[8]]?</think> [[2]]" if len(messages) == 1 else "x"
    assert ask(judge_at(server, tmp_path), 1) == [2]
    server.reply = lambda messages: "<think>[[9]]" if len(messages) == 1 else "[[3]]"
    assert ask(judge_at(server, tmp_path, name="cut off"), 1) == [3]


def test_some_nonsense_is_counted_and_not_asked_for_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = failing("no idea", 1, 2)
    for asked in (7, 7):
        judge = judge_at(server, tmp_path)
        assert ask(judge, 5) == [1, None, None, 4, 5]
        assert judge.missed == 2
        assert len(server.seen) == asked
    assert "2 of 5 questions have no verdict" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "at_most"), [(2, 2), (40, 14)])
def test_nothing_but_nonsense_ends(server: Server, tmp_path: Path, count: int, at_most: int) -> None:
    server.reply = lambda messages: "blah\nblah"
    one_line(lambda: ask(judge_at(server, tmp_path), count), server.url, "no verdict", "'blah blah'", "replies.jsonl")
    assert len(set(server.asked)) <= at_most


def test_more_than_half_nonsense_ends_and_half_does_not(server: Server, tmp_path: Path) -> None:
    server.reply = failing("blah", *range(4, 12))
    one_line(lambda: ask(judge_at(server, tmp_path, workers=1), 20), "6 of 10 replies")
    server.reply = failing("blah", *range(1, 20, 2))
    assert ask(judge_at(server, tmp_path, workers=1, name="other"), 20).count(None) == 10


@pytest.mark.parametrize(("status", "words"), [(401, "key"), (403, "key"), (404, "'j'")])
def test_what_will_not_mend_ends_at_once(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.reply = lambda messages: status
    one_line(lambda: ask(judge_at(server, tmp_path, retries=2), 40), server.url, words, str(status))
    one_line(judge_at(server, tmp_path).check, server.url, words)
    assert len(server.seen) <= 5


def test_a_question_that_is_refused_has_no_verdict(server: Server, tmp_path: Path) -> None:
    server.reply = failing(400, 1, 2, 3)
    assert ask(judge_at(server, tmp_path), 5) == [1, None, None, None, 5]
    server.reply = lambda messages: 400
    one_line(lambda: ask(judge_at(server, tmp_path, name="strict"), 40), "no verdict", "'Error code: 400")
    one_line(judge_at(server, tmp_path).check, server.url, "400")


def test_a_judge_that_hangs_is_gone(server: Server, tmp_path: Path) -> None:
    def sleep(messages: list[dict[str, str]]) -> Reply:
        time.sleep(1)
        return "[[5]]"

    server.reply = sleep
    start = time.monotonic()
    with pytest.raises(JudgeGone) as caught:
        ask(judge_at(server, tmp_path, timeout=0.3), 40)
    # Four questions at once, and none after them: one timeout in all.
    assert time.monotonic() - start < 3
    assert len(server.seen) <= 4
    assert str(caught.value).startswith(f"judge {server.url} does not answer (timed out after 0.3 s); ")


def test_a_judge_that_dies_is_asked_the_rest_when_it_is_back(server: Server, tmp_path: Path) -> None:
    server.stop_at = 37
    message = one_line(lambda: ask(judge_at(server, tmp_path, workers=1), 60), "after 37 of 60 questions", "refused")
    assert message.startswith(f"judge {server.url} stopped answering")
    one_line(lambda: ask(judge_at(server, tmp_path), 60), "after 37 of 60 questions")
    one_line(judge_at(server, tmp_path).check, server.url, "does not answer", "refused")
    back = Server(server.port)
    back.reply = failing("", -1)
    assert ask(judge_at(back, tmp_path), 60) == [5.0] * 37 + [number % 10 + 1 for number in range(37, 60)]
    assert sorted(back.asked) == [f"question {number}" for number in range(37, 60)]
    back.stop()


def test_a_judge_that_dies_on_the_last_question_is_gone(server: Server, tmp_path: Path) -> None:
    server.stop_at = 9
    with pytest.raises(JudgeGone):
        ask(judge_at(server, tmp_path, workers=1), 10)


def test_some_silence_is_missing_verdicts_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.reply = failing(500, 1, 2, 4)
    judge = judge_at(server, tmp_path, workers=1)
    assert ask(judge, 6) == [1, None, None, 4, None, 6]
    assert judge.missed == 3
    server.reply = failing(500)
    assert ask(judge_at(server, tmp_path), 6) == [1, 2, 3, 4, 5, 6]
    server.reply = failing(500, 0, 1)
    one_line(lambda: ask(judge_at(server, tmp_path, name="other"), 2), "does not answer", "500")


def test_a_server_error_is_tried_again_before_it_counts(server: Server, tmp_path: Path) -> None:
    server.reply = lambda messages: 500 if len(server.seen) == 1 else "[[5]]"
    assert ask(judge_at(server, tmp_path, retries=2), 1) == [5]
    assert len(server.seen) == 2
    server.reply = lambda messages: 503
    one_line(lambda: ask(judge_at(server, tmp_path, name="down"), 40), "does not answer", "503")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"mess', b"[1]"])
def test_what_speaks_no_chat_is_no_judge(server: Server, tmp_path: Path, body: bytes) -> None:
    server.reply = lambda messages: body
    one_line(judge_at(server, tmp_path).check, server.url, "no OpenAI chat")
    one_line(lambda: ask(judge_at(server, tmp_path), 40), server.url, "no OpenAI chat")
    assert len(server.seen) <= 7


def test_replies_are_whole_lines_and_a_torn_one_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.reply = failing("", -1)
    wanted = ask(judge_at(server, tmp_path, workers=8), 40)
    path = tmp_path / "replies.jsonl"
    assert len([json.loads(line)["reply"] for line in path.read_text().splitlines()]) == 40
    path.write_bytes(path.read_bytes()[:-9])
    server.seen.clear()
    for _ in range(2):
        assert ask(judge_at(server, tmp_path), 40) == wanted
        assert len(server.seen) == 1
    assert ask(judge_at(server, tmp_path, name="other"), 1) == [1]
    assert len(server.seen) == 2


def test_equal_questions_are_asked_once_and_none_not_at_all(server: Server, tmp_path: Path) -> None:
    assert judge_at(server, tmp_path).ask_all(numbered(1) * 9, FORM) == [5] * 9
    assert ask(judge_at(server, tmp_path, name=None), 0) == []
    assert len(server.seen) == 1


def test_a_judge_needs_a_url_and_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(lambda: Judge("localhost:8000", tmp_path / "r"), "localhost:8000", "http://")
    monkeypatch.setitem(sys.modules, "openai", None)
    one_line(lambda: Judge("http://localhost/v1", tmp_path / "r"), "pip install 'ffn-fusion[eval]'")


def test_data_of_another_form_is_named(mt_bench: Path, tmp_path: Path) -> None:
    one_line(lambda: load_arena_hard(tmp_path / "none"), "judge_prompts.json")
    (mt_bench / "reference.jsonl").write_text("")
    one_line(lambda: load_mt_bench(mt_bench), "question.jsonl", "no reference", "111")
    (mt_bench / "reference.jsonl").write_text('{"question_id"\n')
    one_line(lambda: load_mt_bench(mt_bench), "reference.jsonl")
    (mt_bench / "reference.jsonl").unlink()
    one_line(lambda: load_mt_bench(mt_bench), "reference.jsonl", "No such file")
    prompts = (mt_bench / "judge_prompts.jsonl").read_text()
    (mt_bench / "judge_prompts.jsonl").write_text(prompts.replace("REF {ref_answer_1}", ""))
    one_line(lambda: load_mt_bench(mt_bench), "judge_prompts.jsonl", "ref_answer_1")
    write_rows(mt_bench / "judge_prompts.jsonl", [{"template": "{QUESTION} {ANSWER_A}", "hard_prompt": "h"}])
    one_line(lambda: load_arena_hard(mt_bench), "judge_prompts.jsonl", "ANSWER_B")
