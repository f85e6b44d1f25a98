"""A judge model behind an OpenAI-style chat endpoint: asked in parallel, and each question once.

A reply is on disk before it counts, so a killed run asks nothing twice. A judge that dies, refuses or talks nonsense
ends the run with one line instead of holding it up.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from ffn_fusion.errors import UserError
from ffn_fusion.progress import track

Messages = Sequence[dict[str, str]]  # "role" and "content" of each
V = TypeVar("V")
R = TypeVar("R")

MAX_TOKENS = 2048
GONE_AFTER = 3
ENOUGH_REPLIES = 10
GREETING = ({"role": "user", "content": "Reply with OK."},)
THOUGHT = re.compile(r"\A.*</think>|<think>.*", re.DOTALL)


class JudgeGone(UserError):  # noqa: N818
    """The judge does not reply any more; what it said so far is kept."""


class _NoReplyError(Exception):
    """Neither a reply nor a refusal: the judge may be gone."""


class _RefusedError(Exception):
    """The judge is there and will not answer this question: it is too long, for one."""


@dataclass(frozen=True)
class Form(Generic[V]):
    """What a verdict looks like: `read` finds it in a reply (None if there is none), `reminder` asks for it again."""

    read: Callable[[str], V | None]
    reminder: str


@dataclass
class Judge:
    """The model `name` at the base URL `url`, such as http://host:8000/v1; without a name, the first one listed there.

    `timeout` is in seconds and for one request, which is repeated `retries` times; `workers` questions are asked at
    once. `cache` is a JSONL file of replies by model and messages. Raises `UserError` if `url` is not a URL or
    the extra `eval` is not installed.
    """

    url: str
    cache: Path
    name: str | None = None
    key: str = field(default="", repr=False)
    timeout: float = 120
    retries: int = 2
    workers: int = 4
    missed: int = field(default=0, init=False)
    """Questions so far that have no verdict."""

    def __post_init__(self) -> None:
        try:
            import openai  # optional and slow to import
        except ImportError:
            raise UserError("a judge needs the package openai: pip install 'ffn-fusion[eval]'") from None
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise UserError(f"judge {self.url!r} is no URL; expected an endpoint such as http://localhost:8000/v1")
        # The client insists on a key and would take the environment's, which is not meant for just any endpoint.
        key = self.key or "none"
        self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)
        self._replies = _Replies(self.cache)

    @cached_property
    def model(self) -> str:
        """The judge's name at the endpoint. Raises `JudgeGone` if it must be asked for and nothing answers."""
        if self.name:
            return self.name
        try:
            with self._failures():
                listed = self._client.models.list().data
        except (_NoReplyError, _RefusedError) as error:
            raise self._gone(f"asked for its models: {error}; --judge-model names one") from None
        if not listed:
            raise UserError(f"judge {self.url} lists no model; name one with --judge-model")
        return listed[0].id

    def check(self) -> None:
        """Ask something short, so that no model answers in vain. Raises `UserError` if the judge cannot be asked."""
        try:
            self._complete(GREETING)
        except (_NoReplyError, _RefusedError) as error:
            raise self._gone(str(error)) from None

    def ask_all(self, prompts: Sequence[Messages], form: Form[V], description: str = "judge") -> list[V | None]:
        """A verdict for each prompt, in their order; None where the judge gave none, even when reminded.

        Equal prompts are one question. Raises `JudgeGone` after 3 questions in a row without any reply, and
        `UserError` if the judge does not accept the key, lacks the model, or mostly gives no verdict.
        """
        keys = [self._key(messages) for messages in prompts]
        questions = dict(zip(keys, prompts, strict=True))
        answers = self._answers(questions, form)
        verdicts = dict(track(answers, description, len(questions)))
        return [verdicts[key] for key in keys]

    def _answers(self, questions: dict[str, Messages], form: Form[V]) -> Iterator[tuple[str, V | None]]:
        total, answered, judged, in_a_row, silence = len(questions), 0, 0, 0, ""
        with ThreadPoolExecutor(self.workers) as pool:
            for key, future in self._as_done(pool, lambda messages: self._judge(messages, form), questions):
                verdict: V | None = None
                try:
                    verdict, reply = future.result()
                except _NoReplyError as error:
                    in_a_row, silence = in_a_row + 1, str(error)
                    if in_a_row == GONE_AFTER:
                        raise self._gone(silence, answered, total) from None
                else:
                    in_a_row, answered, judged = 0, answered + 1, judged + (verdict is not None)
                    if answered - judged == total or (answered >= ENOUGH_REPLIES and judged * 2 < answered):
                        raise self._nonsense(reply, answered - judged, answered)
                yield key, verdict
        if silence and not judged:
            raise self._gone(silence, answered, total)
        if silence:
            self.check()  # it may be gone since the last question or two
        if missed := total - judged:
            self.missed += missed
            print(f"judge: {missed} of {total} questions have no verdict", file=sys.stderr)

    def _as_done(
        self, pool: ThreadPoolExecutor, work: Callable[[Messages], R], questions: dict[str, Messages]
    ) -> Iterator[tuple[str, Future[R]]]:
        """Questions as they are done, failed ones too."""
        waiting = iter(questions.items())
        running = {pool.submit(work, messages): key for key, messages in islice(waiting, self.workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future
                # After a failure hear the others first: new questions to a dead judge hold up the end by a timeout.
                if not running or not future.exception():
                    more = islice(waiting, self.workers - len(running))
                    running |= {pool.submit(work, messages): key for key, messages in more}

    def _judge(self, messages: Messages, form: Form[V]) -> tuple[V | None, str]:
        """The verdict on one question, and the reply that holds it or fails to."""
        reply = ""
        try:
            reply = self._reply(messages)
            verdict = form.read(reply)
            if verdict is None:
                # At temperature 0 the bare question would bring the same reply. Some servers take no empty message.
                said = {"role": "assistant", "content": reply or "..."}
                reply = self._reply([*messages, said, {"role": "user", "content": form.reminder}])
                verdict = form.read(reply)
        except _RefusedError as refusal:
            return None, reply or str(refusal)
        return verdict, reply

    def _reply(self, messages: Messages) -> str:
        """What the judge says, without its thoughts: a verdict that it only considers is none."""
        key = self._key(messages)
        if key not in self._replies:
            self._replies.keep(key, self._complete(messages))
        return THOUGHT.sub("", self._replies[key]).strip()

    def _complete(self, messages: Messages) -> str:
        ask: Any = self._client.chat.completions.create  # its type of messages needs the client
        with self._failures():
            completion = ask(model=self.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS)
            return str(completion.choices[0].message.content or "")

    def _key(self, messages: Messages) -> str:
        return hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell failures apart: `_NoReplyError`, `_RefusedError`, and `UserError` for what will not mend itself."""
        import openai

        try:
            yield
        except openai.APITimeoutError:
            raise _NoReplyError(f"timed out after {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _NoReplyError(_start(str(error.__cause__ or "") or error.message)) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"judge {self.url} does not accept the key ({_start(error.message)})") from None
        except openai.NotFoundError as error:
            what = f"model {self.name!r} or the URL (/v1?)" if self.name else "URL (/v1?)"
            raise UserError(f"judge {self.url} does not know the {what}: {_start(error.message)}") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise _RefusedError(_start(error.message)) from None
        except openai.APIStatusError as error:
            raise _NoReplyError(_start(error.message)) from None
        except (openai.APIError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise _NoReplyError(f"its reply is no OpenAI chat: {_start(str(error))}") from None

    def _gone(self, reason: str, answered: int = 0, total: int = 0) -> JudgeGone:
        when = f"stopped answering after {answered} of {total} questions" if answered else "does not answer"
        return JudgeGone(
            f"judge {self.url} {when} ({reason}); the replies so far are kept and the same command continues"
        )

    def _nonsense(self, reply: str, count: int, answered: int) -> UserError:
        return UserError(
            f"judge {self.url} ({self.model}) gave no verdict in {count} of {answered} replies, such as "
            f"{_start(reply)!r}; take another one, or mend it and delete {self.cache}"
        )


class _Replies(dict[str, str]):
    """Replies by key, read from a JSONL file that only grows; a line torn by a kill is passed over."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            if data and not data.endswith(b"\n"):
                file.write(b"\n")
        for line in data.split(b"\n"):
            with suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                self[row["key"]] = row["reply"]

    def keep(self, key: str, reply: str) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        self[key] = reply


def _start(text: str) -> str:
    return " ".join(text.split())[:200]
