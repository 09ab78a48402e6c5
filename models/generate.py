"""Text from a language model, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["generate"]


def generate(
    network: nn.Module,
    prompt: Tensor,
    length: int,
    temperature: float = 1.0,
    most_likely: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """``length`` tokens that go on from ``prompt`` [N] (int64), N at least 1, each drawn from the network's softmax.

    ``temperature`` divides the logits; ``most_likely`` lets only so many of the likeliest tokens be drawn, 1 always the
    likeliest. The same ``seed`` draws the same text. Raises ValueError for an empty prompt, a temperature that is not
    above 0, and a ``length`` or ``most_likely`` below 1.
    """
    if prompt.dim() != 1 or len(prompt) == 0:
        raise ValueError(f"prompt: got shape {list(prompt.shape)}, expected [N] with at least one token")
    if length < 1:
        raise ValueError(f"length: got {length}, expected at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected more than 0")
    if most_likely is not None and most_likely < 1:
        raise ValueError(f"most_likely: got {most_likely}, expected at least 1")
    return _drawn(network, prompt, length, temperature, most_likely, torch.Generator().manual_seed(seed))


@torch.no_grad()
def _drawn(
    network: nn.Module,
    prompt: Tensor,
    length: int,
    temperature: float,
    most_likely: int | None,
    generator: torch.Generator,
) -> Iterator[int]:
    tokens, states = prompt[:, None], None
    for _ in range(length):
        logits, states = network(tokens, states)
        last = logits[-1, 0].double() / temperature
        if most_likely is not None:
            kept = last.topk(min(most_likely, len(last)))
            last = torch.full_like(last, -torch.inf).scatter(0, kept.indices, kept.values)
        token = int(torch.multinomial(last.softmax(0), 1, generator=generator))
        yield token
        tokens = torch.tensor([[token]])
