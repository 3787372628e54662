"""What decoders are trained on: text as tokens, or sequences of a task that only their context can solve."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from icl_dual import assets
from icl_dual.paper_tasks import load_task
from icl_dual.storage import AssetError

N_BYTES = 256
MIN_TEXTS = 40
"""Of fewer, there may be none to validate on."""
START = "<|endoftext|>"
"""The token with which every sequence begins."""


@dataclass(frozen=True, repr=False)
class Corpus:
    """Text as tokens: a line after the other, training and validation apart."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    train: Int[Tensor, " train_token"]
    validation: Int[Tensor, " validation_token"]

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, {len(self.train)} tokens to train on, {len(self.validation)} to validate, "
            f"d_vocab={self.d_vocab})"
        )

    @property
    def d_vocab(self) -> int:
        """The vocabulary's size."""
        return len(self.tokenizer)

    @cached_property
    def digest(self) -> str:
        """A hash of its tokens."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(tokens.to(torch.int32).numpy().tobytes())
        return digest.hexdigest()[:16]

    def blocks(self, split: Literal["train", "validation"], length: int) -> Int[Tensor, "sequence pos"]:
        """A split cut into sequences of a length, each behind the start token; what is left at the end is dropped.

        Raises:
            ValueError: there is no such split, or not one whole sequence in it.
        """
        if split not in ("train", "validation"):
            raise ValueError(f"expected the split train or validation, got {split!r}")
        tokens: Tensor = getattr(self, split)
        if length < 2:
            raise ValueError(f"expected sequences of two tokens at least, got a length of {length}")
        n = len(tokens) // (length - 1)
        if not n:
            raise ValueError(
                f"{self.name}: expected a {split} split of {length - 1} tokens at least, got {len(tokens)}: use more "
                "text, or a shorter context"
            )
        start = tokens.new_full((n, 1), self.tokenizer.vocab[START])
        return torch.cat((start, tokens[: n * (length - 1)].view(n, length - 1)), dim=1)

    def training_sequences(self, length: int, n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        """Sequences to learn from: all there are, whatever the number or seed."""
        return self.blocks("train", length)

    def labels(self, sequences: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence pos"]:
        """Every token is predicted."""
        return sequences


def build_corpus(name: str, train: Sequence[str], validation: Sequence[str], d_vocab: int) -> Corpus:
    """Learn a byte-level vocabulary on the training texts, and tokenize both splits by it.

    Raises:
        ValueError: a split has no text, they share one, or the vocabulary is too small for every byte.
    """
    if d_vocab < N_BYTES + 1:
        raise ValueError(
            f"expected a vocabulary of every byte and a start token, {N_BYTES + 1} at least, got {d_vocab}"
        )
    for split, texts in (("training", train), ("validation", validation)):
        if not any(text.strip() for text in texts):
            raise ValueError(f"{name}: expected text in the {split} split, got none")
    if shared := set(train) & set(validation):
        raise ValueError(f"{name}: expected other texts to validate than to train, got {min(shared)!r} in both")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        train,
        trainers.BpeTrainer(vocab_size=d_vocab, special_tokens=[START], initial_alphabet=alphabet, show_progress=False),
    )
    line_break = made.token_to_id("Ċ")

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.tensor([token for text in made.encode_batch(list(texts)) for token in (*text.ids, line_break)])

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, eos_token=START, pad_token=START)
    return Corpus(name, tokenizer, tokens(train), tokens(validation))


def load_corpus(source: str | PathLike[str], d_vocab: int) -> Corpus:
    """A corpus of real text.

    Args:
        source: `agnews`, the news of the paper's task, of which it trains on those that serve as demonstrations and
            validates on those for selection; a `.txt` file, a text a line; or a data set on the hub with a `text`
            column. Of the last two a twentieth, by each text's hash, validates.
        d_vocab: the size of the vocabulary that is learned.

    Raises:
        ValueError: it is no such file, or has too few texts.
        AssetError: it cannot be had.
    """
    if source == "agnews":
        task = load_task("agnews")
        pools = task.demonstrations(task.n_demonstrations, seed=0), task.queries(split="selection")
        train, validation = ([dict(example.fields)["text"] for example in pool] for pool in pools)
        return build_corpus("agnews", train, validation, d_vocab)
    path = Path(source)
    if path.is_dir() or path.suffix in (".csv", ".json", ".jsonl", ".parquet"):
        raise ValueError(
            f"expected agnews, a .txt file with a text a line, or a data set on the hub, got {str(source)!r}"
        )
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AssetError(f"expected a readable UTF-8 file of text at {path}, got {error}") from error
    else:
        rows = list(assets.hub_rows(str(source), "train"))
        if rows and "text" not in rows[0]:
            raise ValueError(f"{source}: expected a column 'text', got {sorted(rows[0])}")
        lines = [str(row["text"]).replace("\n", " ") for row in rows]
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < MIN_TEXTS:
        raise ValueError(
            f"{source}: expected {MIN_TEXTS} different texts at least, one a line, of which about every twentieth "
            f"validates, got {len(texts)}"
        )
    held_out = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] % 20 == 0}
    return build_corpus(str(source), [text for text in texts if text not in held_out], sorted(held_out), d_vocab)


@dataclass(frozen=True)
class LabelMapping:
    """A task that only its context can solve: pairs x y of which every sequence draws its own mapping from x to y."""

    n_x: int = 8
    n_y: int = 4
    n_pairs: int = 16
    name: ClassVar[str] = "label mapping"
    tokenizer: ClassVar[None] = None

    @property
    def d_vocab(self) -> int:
        """A start token, every x and every y."""
        return 1 + self.n_x + self.n_y

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 1 + 2 * self.n_pairs

    @property
    def digest(self) -> str:
        """Its sizes say it all."""
        return f"{self.n_x} to {self.n_y}, {self.n_pairs} pairs"

    def training_sequences(self, length: int, n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        """n sequences to learn from: token 0, then pairs of a random x and the label that x has in the sequence."""
        if length != self.length:
            raise ValueError(f"expected a context of {self.length} tokens for {self.n_pairs} pairs, got {length}")
        rng = torch.Generator().manual_seed(seed)
        mapping = torch.randint(self.n_y, (n, self.n_x), generator=rng)
        x = torch.randint(self.n_x, (n, self.n_pairs), generator=rng)
        pairs = torch.stack((1 + x, 1 + self.n_x + mapping.gather(1, x)), dim=-1)
        return torch.cat((torch.zeros(n, 1, dtype=torch.long), pairs.flatten(1)), dim=1)

    def ceiling(self, n_before: int) -> float:
        """The best accuracy there can be after so many pairs: that of knowing all x seen, and guessing at others."""
        unseen = (1 - 1 / self.n_x) ** n_before
        return 1 - unseen + unseen / self.n_y

    def labels(self, sequences: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence pos"]:
        """Only the labels of pairs are predicted."""
        asked = torch.full_like(sequences, -100)
        asked[:, 2::2] = sequences[:, 2::2]
        return asked


Data = Corpus | LabelMapping
