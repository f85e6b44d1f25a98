"""A tokenizer as llama.cpp reads it from a GGUF file.

llama.cpp has two models for us: `gpt2`, byte-level BPE with a pre-tokenizer known by name, and `llama`, SentencePiece
BPE with a score for each piece. What is written follows the tokenizer that transformers builds, not its files, because
transformers gives some classes a pre-tokenizer other than that of tokenizer.json. Of the `gguf` package's own readers,
one gives every piece the same score and the other guesses from files, so neither is used.

What no field can express, so that such text is cut otherwise than in transformers: llama.cpp does not normalise to NFC;
its `llama` model puts a blank before text that begins with one and after every special token, where a Metaspace that
prepends `first` does not; and its `tekken` is exact for letters without combining marks only.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import gguf

from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer

BLANK = "▁"
BYTE = re.compile("<0x[0-9A-F]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = rf"split {_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"split {_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
PRE_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_WORDS % r"\p{N}{1,3}" + _SPACES, "bytes"), True): "llama-bpe",
    ((_WORDS % r"\p{N}{1,3}" + _SPACES, "bytes"), False): "smaug-bpe",
    ((_WORDS % r"\p{N}" + _SPACES, "bytes"), False): "qwen2",
    ((_CASED + _SPACES, "bytes"), True): "tekken",
}
"""llama.cpp's name for (steps of a pre-tokenizer, whether whole words skip the merges)."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about the tokenizer; `tokens` and `types` have one entry for each row of the embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | list[dict[str, str]] | None

    def add_to(self, writer: Any) -> None:
        """Put every field into a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            # llama.cpp demands the key, and the writer drops empty lists: a merge of nothing never applies.
            writer.add_token_merges(self.merges or [""])
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(student: ModelFolder) -> Vocabulary:
    """The student's tokenizer for llama.cpp; `UserError` with one clause that says why it has no counterpart there."""
    tokenizer = load_tokenizer(student)
    if not tokenizer.is_fast:
        raise UserError(f"its tokenizer {type(tokenizer).__name__} has no tokenizer.json")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"]["type"]
    if kind != "BPE":
        raise UserError(f"its tokenizer is a {kind} model, and this export knows BPE")
    if data["model"].get("continuing_subword_prefix") or data["model"].get("end_of_word_suffix"):
        raise UserError("its tokenizer marks the parts of words, which llama.cpp's BPE does not")
    model = "llama" if data["model"]["byte_fallback"] else "gpt2"
    merges = [tuple(pair) for pair in data["model"]["merges"]]
    special = _special_tokens(tokenizer)
    tokens = _tokens(tokenizer, int(student.config.vocab_size))
    types = _types(tokenizer, tokens, model)
    add_bos, add_eos = _added(tokenizer)
    return Vocabulary(
        model=model,
        pre="default" if model == "llama" else _pre_name(data),
        tokens=[f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)],
        types=types,
        scores=_scores(tokens, types, merges) if model == "llama" else [],
        merges=[" ".join(pair) for pair in merges],
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=model == "llama" and _space_prefix(data),
        chat_template=_chat_template(tokenizer),
    )


def _tokens(tokenizer: Any, size: int) -> list[str | None]:
    """The spelling of each id, None for rows of the embedding that no token uses."""
    tokens: list[str | None] = [None] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
    return tokens


def _types(tokenizer: Any, tokens: Sequence[str | None], model: str) -> list[int]:
    added = tokenizer.added_tokens_decoder
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise UserError(f"its token {token.content!r} looks at the text beside it, which llama.cpp's tokens do not")

    def type_of(number: int, token: str | None) -> int:
        if token is None:
            return int(gguf.TokenType.UNUSED)
        if model == "llama" and number == tokenizer.unk_token_id:
            return int(gguf.TokenType.UNKNOWN)
        if number in added:
            return int(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        return int(gguf.TokenType.BYTE if model == "llama" and BYTE.fullmatch(token) else gguf.TokenType.NORMAL)

    return [type_of(number, token) for number, token in enumerate(tokens)]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if found["eos"] is None:
        raise UserError("its tokenizer names no end token, and llama.cpp would take token 11 for it")
    if found["bos"] is None:
        # Or chat templates would be shown token 11.
        found["bos"] = found["eos"]
    return {name: token for name, token in found.items() if token is not None}


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its start token before a text, and its end token after it."""
    plain, whole = (tokenizer("a", add_special_tokens=wanted)["input_ids"] for wanted in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise UserError(f"its tokenizer makes {whole} of {plain}, and llama.cpp adds a start and an end token only")


def _chat_template(tokenizer: Any) -> Any:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _pre_name(data: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    if data["normalizer"] not in (None, {"type": "NFC"}):
        raise UserError(f"its tokenizer normalises text ({_short(data['normalizer'])}), which llama.cpp does not")
    key = (_steps(data["pre_tokenizer"] or {"type": "None"}), bool(data["model"].get("ignore_merges")))
    if key not in PRE_NAMES:
        raise UserError(
            f"its tokenizer splits text by {_short(data['pre_tokenizer'])}, "
            f"which is none of llama.cpp's {', '.join(sorted(set(PRE_NAMES.values())))}"
        )
    return PRE_NAMES[key]


def _steps(step: dict[str, Any]) -> tuple[str, ...]:
    """A pre-tokenizer as a key of the table: `split REGEX`, `digits`, `gpt2`, `bytes`, or JSON if unknown."""
    match step:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(name for part in parts for name in _steps(part))
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            spelled = regex.replace("\r", r"\r").replace("\n", r"\n").replace(_CASELESS, _CONTRACTIONS)
            return (f"split {spelled}",)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return ("gpt2" if use_regex else "bytes",)
    return (json.dumps(step),)


def _short(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " ..."


def _space_prefix(data: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a blank before a text; `UserError` if it does anything else to it."""
    before = (data["normalizer"], data["pre_tokenizer"])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = {"type": "Prepend", "prepend": BLANK}
    match before:
        case (None, {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}):
            return bool(scheme != "never")
        case ({"type": "Sequence", "normalizers": steps}, None) if steps in ([prepend, replace], [replace]):
            return bool(steps[0] == prepend)
        case (normalizer, None) if normalizer == replace:
            return False
    raise UserError(f"its tokenizer prepares text by {_short(before)}, and llama.cpp marks blanks only")


def _scores(tokens: Sequence[str | None], types: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A score for each piece, so that the best-scored pair is the first of the merges.

    llama.cpp joins any two neighbours whose union is a piece; that is the same only if the merges hold every split of
    every piece, those of one piece in a row, as conversions from SentencePiece do.
    """
    made = [left + right for left, right in merges]
    runs = [piece for piece, _ in groupby(made)]
    known = {token for token in tokens if token is not None}
    normal = [token for token, kind in zip(tokens, types, strict=True) if token and kind == gguf.TokenType.NORMAL]
    splits = sum(piece[:at] in known and piece[at:] in known for piece in normal for at in range(1, len(piece)))
    if len(runs) != len(set(runs)) or splits != sum(piece in known for piece in made):
        raise UserError("its merges are not SentencePiece's: llama.cpp would join pieces that they keep apart")
    if missing := {f"<0x{byte:02X}>" for byte in range(256)} - known:
        raise UserError(f"its tokenizer falls back on bytes and lacks {len(missing)} of them, {min(missing)} first")
    rank = {piece: float(-number) for number, piece in enumerate(runs)}
    last = float(-len(runs))
    return [rank.get(token or "", last if len(token or "") > 1 else 0.0) for token in tokens]
