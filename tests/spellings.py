"""Small trained tokenizers of the kinds that GGUF can hold, and text that tells pre-tokenizers apart."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ffn_fusion.serving.gguf_vocab import PRE_NAMES

VOCAB_SIZE = 500
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARD_TEXTS = [
    "Hello, world! It's 2026; I'll pay $1,234.56 for 3333 of them. WE'VE, they'd, 'tis",
    "a  b   c    d\te\t\tf\n\ng\r\nh \n \n  i",
    "trailing blanks   ",
    "   leading blanks",
    "\n\n\n",
    "naïve café Größe Ørsted Œuvre ÀÉÎ",
    "Привет, мир! Как дела? нещо на Български",
    "日本語のテキストと中文字符，还有한국어",
    "العربية עברית",
    "🦙🦙 🚀 (normal) 😶‍🌫️ ✅ é",
    "def f(x):\n    return {'a': [1, 22, 333]} # ----====\n",
    "http://example.org/a_b-c?d=e%20f&g=1 ...!!!???",
    "² ½ Ⅻ ٣٤٥ ১২৩ 1²",
    "marks: हिन्दी ภาษาไทย តាន់ e\u0301a\u0300 iPhoneXS McDonald",
    "nbsp\u00a0here\u3000and\u2003there\u200bzero",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|endoftext|> text",
    "<|im_start|><|im_start|>",
    "'s 'T 're 'VE 'm 'Ll 'd's",
    "x" * 70 + " " * 70 + "0" * 20,
]
CORPUS = [*HARD_TEXTS, *(text.upper() for text in HARD_TEXTS), "the cat and the hat and then that thing there " * 20]
BYTE_LEVEL = sorted(PRE_NAMES.values())


def save_byte_level(style: str, folder: Path) -> Path:
    """Replace the tokenizer in `folder` by a byte-level one with the pre-tokenizer that llama.cpp calls `style`."""
    steps, ignore_merges = next(key for key, name in PRE_NAMES.items() if name == style)
    made = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [
        made[step] if step in made else pre_tokenizers.Split(Regex(step.removeprefix("split ")), "isolated")
        for step in steps
    ]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _save(tokenizer, folder, bos_token="<|im_start|>", eos_token="<|im_end|>")


def save_sentencepiece(style: str, folder: Path) -> Path:
    """Replace the tokenizer in `folder` by a SentencePiece-like one; `style` says where a blank is put before text."""
    alphabet = Tokenizer(models.BPE())
    alphabet.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in CORPUS],
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 300, show_progress=False),
    )
    pieces = [piece for piece, _ in sorted(alphabet.get_vocab().items(), key=lambda item: item[1])]
    known = {*pieces, "▁▁", "▁▁▁▁"}
    pieces = [*sorted(known - set(pieces), key=len), *(piece for piece in pieces if len(piece) > 1)] + [
        piece for piece in pieces if len(piece) == 1
    ]
    splits = [(piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in known and right in known]
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *pieces]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return _save(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special).save_pretrained(
        folder
    )
    return folder
