"""Small tokenizers of many families, trained on a few words: each splits text by the rules of its family."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

WORDS = (
    "no yes maybe Text: Label: film good bad Sentence: Positive Negative Review: number great terrible a the is it was"
)
VOCABULARY = 640
"""The size of a vocabulary that holds the tokens of every family."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
    "message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{% for message in messages %}{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{{ (bos_token if loop.first else '') + turn }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""With the system prompt in the last turn of the user."""
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = message['role'].replace('assistant', 'model') %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
REASONING_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""With empty thoughts before an answer, which the generation prompt has without `enable_thinking` only."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def _byte_level(split: str, specials: list[str], start: str | None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = options.get("normalizer")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Line breaks and punctuation, so that tokens of several of them exist.
    texts = [f" {WORDS} \n\n (A)\n (B)\n\n {WORDS}.\n", "\n\n", ")\n", ":\n"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=430, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = _template(tokenizer, start) if start else processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _template(tokenizer: Tokenizer, single: str) -> processors.TemplateProcessing:
    names = [part for part in single.split() if part != "$A"]
    special = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(names)]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)


def _sentence_piece(specials: list[str], **parts: Any) -> Tokenizer:
    """Byte-pair encoding over text with "▁" for spaces, and bytes for characters that are not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    words = WORDS.split()
    texts = ["▁".join(["", *words[at:], *words[:at]]) for at in range(len(words))]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=[*specials, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.pre_tokenizer, tokenizer.normalizer = parts.get("pre_tokenizer"), parts.get("normalizer")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(parts.get("strips")))
    if start := parts.get("start"):
        tokenizer.post_processor = _template(tokenizer, start)
    return tokenizer


def gpt2() -> PreTrainedTokenizerFast:
    """No template."""
    end = "<|endoftext|>"
    return _fast(_byte_level(_GPT2, [end], None), bos_token=end, eos_token=end)


def llama2() -> PreTrainedTokenizerFast:
    """A "▁" before every text, no pre-tokenizer, one start token."""
    prepends = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentence_piece(["<unk>", "<s>", "</s>"], normalizer=prepends, start="<s> $A", strips=True)
    return _fast(tokenizer, LLAMA2_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama3() -> PreTrainedTokenizerFast:
    """Bytes, punctuation in one token with line breaks, one start token."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(_LLAMA3, specials, "<|begin_of_text|> $A")
    return _fast(tokenizer, LLAMA3_CHAT, bos_token=specials[0], eos_token=specials[1])


def mistral() -> PreTrainedTokenizerFast:
    """A "▁" before the first word only, one start token."""
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = _sentence_piece(specials, pre_tokenizer=space, start="<s> $A", strips=True)
    return _fast(tokenizer, MISTRAL_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def qwen() -> PreTrainedTokenizerFast:
    """Bytes of normalised text, no start token at all."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(_QWEN, specials, None, normalizer=normalizers.NFC())
    return _fast(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma() -> PreTrainedTokenizerFast:
    """Spaces as "▁", none is put before a text; one start token."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    parts: dict[str, Any] = {
        "normalizer": normalizers.Replace(" ", "▁"),
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
    }
    tokenizer = _sentence_piece(specials, start="<bos> $A", **parts)
    return _fast(tokenizer, GEMMA_CHAT, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def bloom() -> PreTrainedTokenizerFast:
    """Bytes, words split at spaces and punctuation only; no start token."""
    tokenizer = _byte_level(_BLOOM, ["<unk>", "<s>", "</s>", "<pad>"], None)
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def t5() -> PreTrainedTokenizerFast:
    """Unigrams, line breaks are spaces and several spaces are one; an end token and no start token."""
    tokenizer = Tokenizer(models.Unigram())
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([one_space, normalizers.Strip(left=True, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    characters = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=240,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=characters,
        show_progress=False,
    )
    words = WORDS.split()
    tokenizer.train_from_iterator([" ".join(words[at:] + words[:at]) for at in range(len(words))] * 3, trainer)
    tokenizer.post_processor = _template(tokenizer, "$A </s>")
    return _fast(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def chatglm() -> PreTrainedTokenizerFast:
    """Two start tokens and an end token."""
    specials = ["[gMASK]", "<sop>", "<eop>"]
    return _fast(_byte_level(_GPT2, specials, "[gMASK] <sop> $A <eop>"), eos_token="<eop>")


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    family.__name__: cache(family) for family in (gpt2, llama2, llama3, mistral, qwen, gemma, bloom, t5, chatglm)
}


def _fast(tokenizer: Tokenizer, chat_template: str | None = None, **tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it from a folder."""
    folder = Path(mkdtemp(prefix="tokenizer-"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **tokens).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which does not say where tokens lie: characters, and two of them for the merged pairs."""

    def __init__(self, merged: tuple[str, ...] = (), **options: Any) -> None:
        self.merged = merged
        self.pieces = [*(chr(code) for code in range(10, 127)), *merged]
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        tokens: list[str] = []
        while text:
            pair = next((pair for pair in self.merged if text.startswith(pair)), text[0])
            tokens.append(pair)
            text = text.removeprefix(pair)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]
