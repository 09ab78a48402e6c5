"""The next word of a text: the paper's language model (section 4.4), trained by averaged gradient descent (NT-ASGD)."""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels.models.data.text import Vocabulary, chunks, columns, parts_of
from espkernels.models.eru import State
from espkernels.models.language_model import eru_language_model
from espkernels.models.recipes import schedules
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task, check_positive

__all__ = ["Language", "non_monotonic", "perplexity"]

# Runs of text that are scored side by side; few, since each forgets its beginning.
SCORED_COLUMNS = 10


def non_monotonic(scores: Sequence[float], patience: int) -> bool:
    """Whether the last of ``scores`` is worse (higher) than the best of those more than ``patience`` epochs before it.

    The trigger of NT-ASGD (Merity et al. 2017, algorithm 1), which averages the weights of all steps after it.
    """
    return len(scores) > patience + 1 and scores[-1] > min(scores[: -patience - 1])


@torch.no_grad()
def perplexity(network: nn.Module, text: Tensor, steps: int, device: torch.device) -> float:
    """e to the mean cross-entropy of each token of ``text`` [T, B] after the first row, states carried all through."""
    states: list[State] | None = None
    total = 0.0
    for tokens, following in chunks(text.to(device), steps):
        logits, states = network(tokens, states)
        total += F.cross_entropy(logits.flatten(0, 1).double(), following.flatten(), reduction="sum").item()
    mean = total / ((len(text) - 1) * text.shape[1])
    return math.exp(mean) if mean < 700 else math.inf


class Language(Task):
    """Efficient Recurrent Units as a language model, scored by perplexity.

    Args:
        data: a folder with Penn Treebank's three files, or one file of text.
        characters: its characters instead of its words.
        embedding, hidden, layers, axis, dropout: those of :func:`espkernels.models.eru_language_model`.
        batch, steps: runs of text side by side, and how far the gradient goes back.
        rate: of learning, the same in every epoch, over gradients cut to a length of 0.25.
        patience: epochs after which a perplexity that is no longer falling begins the averaging of weights.
        decay: weight decay.
        plain: the model is plain torch operations.
        words: the vocabulary; None for that of the training text, which then has to be there.
    """

    name = "language"
    score = "perplexity"
    higher_is_better = False
    longest_gradient = 0.25

    def __init__(
        self,
        data: str,
        characters: bool = False,
        embedding: int = 400,
        hidden: int = 320,
        layers: int = 3,
        axis: str = "step",
        dropout: float = 0.5,
        batch: int = 20,
        steps: int = 70,
        rate: float = 30.0,
        patience: int = 5,
        decay: float = 1.2e-6,
        seed: int = 0,
        plain: bool = False,
        words: Sequence[str] | None = None,
    ) -> None:
        check_positive(batch=batch, steps=steps, rate=rate, patience=patience)
        data = os.path.abspath(data)
        self.given: dict[str, Any] = dict(
            data=data, characters=characters, embedding=embedding, hidden=hidden, layers=layers, axis=axis,
            dropout=dropout, batch=batch, steps=steps, rate=rate, patience=patience, decay=decay, seed=seed,
            plain=plain,
        )  # fmt: skip
        self.data, self.characters, self.batch, self.steps = Path(data), characters, batch, steps
        self.rate, self.patience, self.decay = rate, patience, decay
        self.vocabulary = Vocabulary.of(self.parts["train"]) if words is None else Vocabulary(words)
        self.states: list[State] | None = None

    @functools.cached_property
    def parts(self) -> dict[str, list[str]]:
        """The tokens of training, validation and test; FileNotFoundError says what is missing."""
        return parts_of(self.data, self.characters)

    def check(self) -> None:
        columns(self.vocabulary.encode(self.parts["train"]), self.batch)
        columns(self.vocabulary.encode(self.parts["valid"]), 1)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="a folder with ptb.train.txt and so on, or one file of text")
        parser.add_argument("--characters", action="store_true", help="characters instead of words")
        parser.add_argument("--embedding", type=int, default=400, help="default 400")
        parser.add_argument("--hidden", type=int, default=320, help="default 320")
        parser.add_argument("--layers", type=int, default=3, help="default 3")
        parser.add_argument("--axis", default="step", choices=["step", "features", "time"])
        parser.add_argument("--dropout", type=float, default=0.5, help="default 0.5")
        parser.add_argument("--batch", type=whole_number(1), default=20, help="runs of text side by side; default 20")
        parser.add_argument("--steps", type=int, default=70, help="tokens that the gradient goes back; default 70")
        parser.add_argument("--rate", type=float, default=30.0, help="of learning; default 30")
        parser.add_argument("--patience", type=int, default=5, help="epochs before averaging may begin; default 5")
        parser.add_argument("--decay", type=float, default=1.2e-6, help="weight decay; default 1.2e-6")

    def options(self) -> dict[str, Any]:
        return self.given | {"words": self.vocabulary.words}

    def network(self) -> nn.Module:
        o = self.given
        return eru_language_model(
            len(self.vocabulary),
            o["embedding"],
            o["hidden"],
            o["layers"],
            axis=o["axis"],
            dropout=o["dropout"],
            plain=o["plain"],
        )

    def schedule(self, epochs: int) -> Schedule:
        return schedules.fixed(self.rate)

    def averages(self, rows: Sequence[Mapping[str, float]]) -> bool:
        scores = [row[self.score] for row in rows]
        return any(non_monotonic(scores[:count], self.patience) for count in range(1, len(scores) + 1))

    def optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), rate, weight_decay=self.decay)

    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        if self.batch % share.ranks:
            raise ValueError(f"batch: got {self.batch}, expected a multiple of the {share.ranks} processes")
        self.states = None
        text = columns(self.vocabulary.encode(self.parts["train"]), self.batch)
        every = chunks(text[:, share.rank :: share.ranks], self.steps)
        # A batch norm has no variance of a single value, which a last chunk of one step of one text would be.
        return [(tokens, following) for tokens, following in every if tokens.numel() > 1]

    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        tokens, following = (one.to(device) for one in batch)
        logits, states = network(tokens, self.states)
        self.states = [state.detach() for state in states]
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())

    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        tokens = self.vocabulary.encode(self.parts["valid"])
        text = columns(tokens, min(SCORED_COLUMNS, max(len(tokens) // 2, 1)))
        return {"perplexity": perplexity(network, text, self.steps, device)}
