"""Texts as numbers: Penn Treebank's layout or one file of text, by words or by characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["END_OF_LINE", "UNKNOWN", "Vocabulary", "chunks", "columns", "parts_of", "tokens_of"]

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
PARTS = ("train", "valid", "test")
HOW_TO_GET = (
    "Mikolov's preparation of Penn Treebank (ptb.train.txt, ptb.valid.txt, ptb.test.txt) is in simple-examples.tgz"
)


class Vocabulary:
    """The words, or characters, of a text and their numbers; what it does not have becomes ``<unk>``.

    Raises ValueError for words that occur twice.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}
        if len(self.numbers) != len(self.words):
            raise ValueError(f"words: got {len(self.words)}, of which {len(self.numbers)} differ")

    @classmethod
    def of(cls, tokens: Sequence[str]) -> Vocabulary:
        """Those of ``tokens`` in the order in which they first occur, and ``<unk>``."""
        return cls([*dict.fromkeys(token for token in tokens if token != UNKNOWN), UNKNOWN])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> Tensor:
        """Their numbers [N] (int64). Raises ValueError for one that is unknown where there is no ``<unk>``."""
        other = self.numbers.get(UNKNOWN)
        numbers = [self.numbers.get(token, other) for token in tokens]
        if None in numbers:
            raise ValueError(f"text: {tokens[numbers.index(None)]!r} is not in the vocabulary of {len(self)}")
        return torch.tensor(numbers, dtype=torch.int64)


def tokens_of(text: str, characters: bool) -> list[str]:
    """Its characters, or its words with ``<eos>`` after each line."""
    if characters:
        return list(text)
    return [word for line in text.splitlines() for word in (*line.split(), END_OF_LINE)]


def parts_of(data: Path, characters: bool = False) -> dict[str, list[str]]:
    """The tokens of "train", "valid" and "test": Penn Treebank's files in a folder, or one file cut at 80 and 90 %.

    Raises FileNotFoundError for what is missing, and ValueError for a file that is no UTF-8 or too short.
    """
    if data.is_file():
        tokens = tokens_of(_read(data), characters)
        if len(tokens) < 20:
            raise ValueError(f"data: {data} has {len(tokens)} tokens, expected at least 20")
        cuts = [0, len(tokens) * 8 // 10, len(tokens) * 9 // 10, len(tokens)]
        return {part: tokens[cuts[i] : cuts[i + 1]] for i, part in enumerate(PARTS)}
    parts = {}
    for part in PARTS:
        path = data / f"ptb.{part}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no {path}. {HOW_TO_GET}; or give one file of any text")
        parts[part] = tokens_of(_read(path), characters)
    return parts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is no text in UTF-8: {error}") from error


def columns(tokens: Tensor, count: int) -> Tensor:
    """``tokens`` [N] cut into ``count`` runs of text side by side, [N // count, count]; what is left over is dropped.

    Raises ValueError where a run would have less than two tokens.
    """
    length = len(tokens) // count
    if length < 2:
        raise ValueError(f"batch: got {count}, expected at most {len(tokens) // 2} for {len(tokens)} tokens")
    return tokens[: length * count].view(count, length).T.contiguous()


def chunks(text: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [<= steps, B] and those that follow them, from the top of ``text`` [T, B] to its end."""
    for start in range(0, len(text) - 1, steps):
        end = min(start + steps, len(text) - 1)
        yield text[start:end], text[start + 1 : end + 1]
