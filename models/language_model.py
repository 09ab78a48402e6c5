"""The paper's language model: recurrent layers between an embedding and its transpose (section 4.4, Table 4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from espkernels.models.eru import ERU, State

__all__ = ["ERULanguageModel", "eru_language_model"]


class ERULanguageModel(nn.Module):
    """The model; :func:`eru_language_model` describes it.

    ``forward``: tokens [T, B] (int64), time first, and the states of the layers, None for zeros -> logits
    [T, B, vocabulary] of each next token, and the states after the last step, to go on from.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        layers: int,
        axis: str = "step",
        dropout: float = 0.5,
        plain: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, embedding)
        # The last layer is as wide as the embedding, whose weights the decoder shares.
        widths = [embedding, *[hidden] * (layers - 1), embedding]
        self.layers = nn.ModuleList(ERU(m, n, axis, plain) for m, n in itertools.pairwise(widths))
        self.decoder = nn.Linear(embedding, vocabulary)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def encode(self, tokens: Tensor, states: Sequence[State] | None = None) -> tuple[Tensor, list[State]]:
        """The last layer's outputs [T, B, embedding], before their dropout, and the states after the last step."""
        if tokens.dim() != 2 or len(tokens) == 0:
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, expected [T, B] with at least one step")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"states: got {len(states)}, expected {len(self.layers)}, one a layer")
        x, after = self.embedding(tokens), []
        for index, layer in enumerate(self.layers):
            x, state = layer(F.dropout(x, self.dropout, self.training), None if states is None else states[index])
            after.append(state)
        return x, after

    def forward(self, tokens: Tensor, states: Sequence[State] | None = None) -> tuple[Tensor, list[State]]:
        x, after = self.encode(tokens, states)
        return self.decoder(F.dropout(x, self.dropout, self.training)), after


def eru_language_model(
    vocabulary: int,
    embedding: int = 400,
    hidden: int = 320,
    layers: int = 3,
    *,
    axis: str = "step",
    dropout: float = 0.5,
    plain: bool = False,
) -> ERULanguageModel:
    """A language model of Efficient Recurrent Units over ``vocabulary`` words.

    The layers go from ``embedding`` to ``hidden`` numbers and back; embedding and softmax share their weights. With
    10,000 words (Penn Treebank), embedding 400 and 3 layers, ``hidden`` 320 has 7,062,720 parameters and 768 has
    15,111,488: the 7 M and 15 M of Table 4. ``axis`` is that of :class:`espkernels.models.eru.EESP1d`: "features"
    saves 0.2 % of them, "time" changes none. ``dropout`` comes after the embedding, between layers and after the last.

    A layer takes a chunk of T steps in one call of its unit and one of its recurrence; ``plain`` makes both of plain
    torch operations, with one Python step a token. Cut the states off between the chunks of a training with
    :meth:`State.detach`.

    Raises ValueError for widths that 4 does not divide, an unknown axis, and a count below 1.
    """
    return ERULanguageModel(vocabulary, embedding, hidden, layers, axis, dropout, plain)
