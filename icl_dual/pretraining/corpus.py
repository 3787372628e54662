"""Training data for decoders: text as tokens, or sequences of a task that only the context can solve."""

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
"""Number of bytes, each of which is a token of every vocabulary."""
MIN_TEXTS = 40
"""Fewest texts of a corpus: with fewer, the validation split may be empty."""
START = "<|endoftext|>"
"""The token at the start of every sequence."""


@dataclass(frozen=True, repr=False)
class Corpus:
    """Text as tokens, with a line break after each text, in a training and a validation split."""

    name: str
    """The corpus's name in results."""
    tokenizer: PreTrainedTokenizerFast
    """The tokenizer; its vocabulary was learned on the training split."""
    train: Int[Tensor, " train_token"]
    """Token ids of the training split."""
    validation: Int[Tensor, " validation_token"]
    """Token ids of the validation split."""

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, {len(self.train)} tokens to train on, {len(self.validation)} to validate, "
            f"d_vocab={self.d_vocab})"
        )

    @property
    def d_vocab(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.tokenizer)

    @cached_property
    def digest(self) -> str:
        """Return a short hash of the token ids of both splits."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(tokens.to(torch.int32).numpy().tobytes())
        return digest.hexdigest()[:16]

    def blocks(self, split: Literal["train", "validation"], length: int) -> Int[Tensor, "sequence pos"]:
        """Cut a split into sequences of equal length, each with the start token first.

        Args:
            split: `train` or `validation`.
            length: tokens of a sequence, the start token included; at least 2. An incomplete last sequence is dropped.

        Raises:
            ValueError: there is no such split, or it is shorter than one sequence.
        """
        if split not in ("train", "validation"):
            raise ValueError(f"expected split as 'train' or 'validation', got {split!r}")
        tokens: Tensor = getattr(self, split)
        if length < 2:
            raise ValueError(f"expected length of at least 2 tokens, got {length}: the first is the start token")
        n = len(tokens) // (length - 1)
        if not n:
            raise ValueError(
                f"{self.name}: expected a {split} split of at least {length - 1} tokens, got {len(tokens)}: use more "
                "text, or a shorter context"
            )
        start = tokens.new_full((n, 1), self.tokenizer.vocab[START])
        return torch.cat((start, tokens[: n * (length - 1)].view(n, length - 1)), dim=1)

    def training_sequences(self, length: int, n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        """Return all sequences of the training split, whatever `n` and `seed` are."""
        return self.blocks("train", length)

    def labels(self, sequences: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence pos"]:
        """Return the tokens to predict: all of them."""
        return sequences


def build_corpus(name: str, train: Sequence[str], validation: Sequence[str], d_vocab: int) -> Corpus:
    """Learn a byte-level vocabulary on the training texts, and tokenise both splits with it.

    Args:
        name: the corpus's name in results.
        train: the texts of the training split.
        validation: the texts of the validation split.
        d_vocab: size of the vocabulary, at least 257: every byte and a start token.

    Raises:
        ValueError: a split has no text, both share a text, or the vocabulary is too small.
    """
    if d_vocab < N_BYTES + 1:
        raise ValueError(
            f"expected d_vocab of at least {N_BYTES + 1}, every byte and a start token, got {d_vocab}: choose a larger "
            "one"
        )
    for split, texts in (("training", train), ("validation", validation)):
        if not any(text.strip() for text in texts):
            raise ValueError(f"{name}: expected text in the {split} split, got none: add texts to it")
    if shared := set(train) & set(validation):
        raise ValueError(
            f"{name}: expected different texts in the training and the validation split, got {min(shared)!r} in both: "
            "leave it out of one"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        train,
        trainers.BpeTrainer(vocab_size=d_vocab, special_tokens=[START], initial_alphabet=alphabet, show_progress=False),
    )
    line_break = bpe.token_to_id("Ċ")

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.tensor([token for text in bpe.encode_batch(list(texts)) for token in (*text.ids, line_break)])

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=START, eos_token=START, pad_token=START)
    return Corpus(name, tokenizer, tokens(train), tokens(validation))


def load_corpus(source: str | PathLike[str], d_vocab: int) -> Corpus:
    """Load real text and learn a vocabulary on it.

    Args:
        source: `agnews`, the news of the paper's task: its demonstrations are the training split, its selection pool is
            the validation split. Or a `.txt` file with one text a line, or a data set on the hub with a `text` column:
            of these, about a twentieth of the texts, chosen by hash, is the validation split.
        d_vocab: size of the vocabulary to learn.

    Raises:
        ValueError: the source is of another kind, or has too few texts.
        AssetError: the source cannot be read or fetched.
    """
    if source == "agnews":
        task = load_task("agnews")
        pools = task.demonstrations(task.n_demonstrations, seed=0), task.queries(split="selection")
        train, validation = ([dict(example.fields)["text"] for example in pool] for pool in pools)
        return build_corpus("agnews", train, validation, d_vocab)
    path = Path(source)
    if path.is_dir() or path.suffix in (".csv", ".json", ".jsonl", ".parquet"):
        raise ValueError(
            "expected source as agnews, a .txt file with one text a line, or a data set on the hub, got "
            f"{str(source)!r}: write the texts into a .txt file"
        )
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AssetError(
                f"expected a readable UTF-8 text file at {path}, got {error}: check the path and the encoding"
            ) from error
    else:
        rows = list(assets.hub_rows(str(source), "train"))
        if rows and "text" not in rows[0]:
            raise ValueError(
                f"{source}: expected a column 'text', got {sorted(rows[0])}: write that column into a .txt file"
            )
        lines = [str(row["text"]).replace("\n", " ") for row in rows]
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < MIN_TEXTS:
        raise ValueError(
            f"{source}: expected at least {MIN_TEXTS} different texts, one a line, got {len(texts)}: about a twentieth "
            "of them is the validation split, add more"
        )
    held_out = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] % 20 == 0}
    return build_corpus(str(source), [text for text in texts if text not in held_out], sorted(held_out), d_vocab)


@dataclass(frozen=True)
class LabelMapping:
    """A task that only the context can solve: pairs (x, y), with a new random mapping from x to y in every sequence."""

    n_x: int = 8
    """Number of different x."""
    n_y: int = 4
    """Number of different y, the labels."""
    n_pairs: int = 16
    """Pairs in a sequence."""
    name: ClassVar[str] = "label mapping"
    tokenizer: ClassVar[None] = None

    @property
    def d_vocab(self) -> int:
        """Return the size of the vocabulary: a start token, every x and every y."""
        return 1 + self.n_x + self.n_y

    @property
    def length(self) -> int:
        """Return the number of tokens in a sequence: the start token and the pairs."""
        return 1 + 2 * self.n_pairs

    @property
    def digest(self) -> str:
        """Return the task's sizes, which determine its sequences."""
        return f"{self.n_x} to {self.n_y}, {self.n_pairs} pairs"

    def training_sequences(self, length: int, n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        """Return n sequences: the start token 0, then pairs of a random x and the label of this x in the sequence.

        Args:
            length: tokens of a sequence; must be `self.length`.
            n: number of sequences.
            seed: the seed of the mappings and pairs.

        Raises:
            ValueError: `length` is not the task's.
        """
        if length != self.length:
            raise ValueError(
                f"expected a context of {self.length} tokens for {self.n_pairs} pairs, got {length}: set n_ctx of the "
                "preset"
            )
        rng = torch.Generator().manual_seed(seed)
        mapping = torch.randint(self.n_y, (n, self.n_x), generator=rng)
        x = torch.randint(self.n_x, (n, self.n_pairs), generator=rng)
        pairs = torch.stack((1 + x, 1 + self.n_x + mapping.gather(1, x)), dim=-1)
        return torch.cat((torch.zeros(n, 1, dtype=torch.long), pairs.flatten(1)), dim=1)

    def best_accuracy(self, n_before: int) -> float:
        """Return the best possible accuracy after `n_before` pairs: right for each x in them, a guess for others."""
        p_new = (1 - 1 / self.n_x) ** n_before
        return 1 - p_new + p_new / self.n_y

    def labels(self, sequences: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence pos"]:
        """Return the tokens to predict: the labels of pairs; -100, which the loss ignores, at all other positions."""
        labels = torch.full_like(sequences, -100)
        labels[:, 2::2] = sequences[:, 2::2]
        return labels


TrainingData = Corpus | LabelMapping
"""What `train` can learn from."""
