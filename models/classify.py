"""Naming what is on an image: a trained run, its network frozen, and a picture of the five likeliest names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Guess", "classify", "draw_guesses"]

SHOWN = 5


@dataclass(frozen=True)
class Guess:
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@torch.no_grad()
def classify(network: nn.Module, image: Tensor, labels: Sequence[str]) -> list[Guess]:
    """The five likeliest of ``labels`` for ``image`` [3, H, W], the likeliest first.

    Raises ValueError where the network has another number of outputs.
    """
    logits = network(image[None])[0]
    if len(logits) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, expected {len(logits)}, one an output of the network")
    found = logits.double().softmax(0).topk(min(SHOWN, len(labels)))
    return [Guess(labels[i], p) for p, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]


def draw_guesses(image: Image, guesses: Sequence[Guess]) -> Image:
    """The image beside a bar for each guess."""
    import PIL.Image

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'espkernels[train]'") from error
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    photograph, bars = figure.subplots(1, 2)
    photograph.imshow(image)
    photograph.axis("off")
    shown = list(reversed(guesses))
    drawn = bars.barh([guess.label for guess in shown], [100 * guess.probability for guess in shown])
    bars.bar_label(drawn, fmt="%.1f")
    bars.set(xlim=(0, 115), xlabel="probability, percent")
    canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
