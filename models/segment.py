"""Segmenting a photograph: preparation as in EdgeNets, forward, the class of every pixel, a coloured overlay."""

from __future__ import annotations

import time
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from espkernels.models.classes import ClassSet, of_count
from espkernels.models.recipes.run_folder import write_atomically
from espkernels.replay import Replayed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Segmentation", "overlay", "preprocess", "segment"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
OPACITY = 0.55
# Below this share of the pixels a class is left out of the legend.
LEGEND_SHARE = 0.001


@dataclass(frozen=True)
class Segmentation:
    """The result for one photograph.

    ``classes`` [H, W] uint8 holds the class of every pixel at the size the network saw, ``shares`` maps the names of
    the classes that occur to their share of those pixels (largest first, the sum is 1), ``seconds`` is the time of
    the forward pass.
    """

    classes: npt.NDArray[np.uint8]
    shares: dict[str, float]
    seconds: float
    class_set: ClassSet


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFilter
        import PIL.ImageFont
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("reading and drawing images needs Pillow: pip install 'espkernels[images]'") from error
    return PIL


def read_image(path: str | PathLike[str]) -> Image:
    """The photograph at ``path`` in RGB, turned the way its EXIF data says.

    Of 16 bits a channel the upper 8 are taken. Raises ValueError, naming the file, for one that is missing, damaged or
    no image, and for numbers that have no known range, of 32 bits or floating point.
    """
    pil = _pillow()
    try:
        with pil.Image.open(path) as image:
            upright: Image = _of_bytes(pil.ImageOps.exif_transpose(image)).convert("RGB")
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return upright


def _of_bytes(image: Image) -> Image:
    """``image`` with numbers to 255; Pillow's own conversion cuts larger ones off there."""
    if image.mode.startswith("I;16"):
        return _pillow().Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits a channel")
    return image


def preprocess(image: Image, size: tuple[int, int]) -> Tensor:
    """A photograph as the network's input [1, 3, H, W] float32: resized to ``size`` (height, width) bilinearly,
    RGB / 255, minus the mean and over the deviation of ImageNet."""
    pil = _pillow()
    resized = image.convert("RGB").resize((size[1], size[0]), pil.Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32) / 255.0)
    normalized = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalized.permute(2, 0, 1).unsqueeze(0).contiguous()


def segment(
    model: nn.Module, image: Image | str | PathLike[str], size: tuple[int, int], class_set: ClassSet | None = None
) -> Segmentation:
    """Segment one photograph with ``model`` (in evaluation mode) at ``size`` (height, width).

    ``class_set`` names the classes; left out, it follows from the number of the network's outputs.
    Raises ValueError for an unreadable image, a model in training mode and a class set of another length.
    """
    if model.training:
        raise ValueError("model: it is in training mode; call model.eval() first")
    if isinstance(image, (str, PathLike)):
        image = read_image(image)
    # A frozen model has buffers alone, and among them vectors in float32 beside weights in half types.
    weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    like = max(weights, key=Tensor.dim, default=torch.empty(0))
    x = preprocess(image, size).to(like.device, like.dtype)
    with torch.inference_mode():
        started = time.perf_counter()
        classes, count = _classes(model, x)
        seconds = time.perf_counter() - started
    if count > 256:
        raise ValueError(f"model: it tells {count} classes apart, a map of uint8 holds 256")
    class_set = class_set or of_count(count)
    if len(class_set) != count:
        raise ValueError(f"class_set: {len(class_set)} names, but the network tells {count} classes apart")
    counts = np.bincount(classes.flatten().numpy(), minlength=len(class_set))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    shares = {class_set.names[i]: float(counts[i] / counts.sum()) for i in order}
    return Segmentation(classes.numpy(), shares, seconds, class_set)


def _classes(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The class map of the one image in ``x`` on the CPU, and how many classes there are."""
    count = getattr(model, "num_classes", None)
    if isinstance(model, Replayed) and isinstance(count, int):
        return model.classes(x)[0].cpu(), count
    logits = model(x)
    return logits.argmax(dim=1)[0].to("cpu", torch.uint8), logits.shape[1]


def overlay(image: Image, result: Segmentation) -> Image:
    """The photograph with every class laid over it in its colour, and a legend with the shares below.

    Pixels of the background class keep the photograph's colours, with a white line where another class begins.
    Returns a new RGB image, of the photograph's width unless that is too narrow for the legend.
    """
    pil = _pillow()
    photo = image.convert("RGB")
    labels = np.asarray(pil.Image.fromarray(result.classes).resize(photo.size, pil.Image.Resampling.NEAREST))
    colours = np.array(result.class_set.colours, dtype=np.float32)[labels]
    pixels = np.asarray(photo, dtype=np.float32)
    mixed = pixels + (colours - pixels) * OPACITY
    if result.class_set.background is not None:
        empty = labels == result.class_set.background
        mixed[empty] = pixels[empty]
        # A white line round what was found: some colours are too dark to tell from the photograph.
        thickness = 3 + 2 * (photo.width // 600)
        grown = pil.Image.fromarray(empty).convert("L").filter(pil.ImageFilter.MaxFilter(thickness))
        mixed[(np.asarray(grown) > 0) & ~empty] = 255.0
    coloured = pil.Image.fromarray(mixed.round().astype(np.uint8))
    legend = _legend(photo.width, result)
    out: Image = pil.Image.new("RGB", (legend.width, photo.height + legend.height), "white")
    out.paste(coloured, (0, 0))
    out.paste(legend, (0, photo.height))
    return out


def _legend(width: int, result: Segmentation) -> Image:
    pil = _pillow()
    letter = max(11, min(28, round(width / 50)))
    font = pil.ImageFont.load_default(size=letter)
    colours = dict(zip(result.class_set.names, result.class_set.colours, strict=True))
    rows = [(name, share) for name, share in result.shares.items() if share >= LEGEND_SHARE]
    texts = [f"{name} {100 * share:.1f} %" for name, share in rows]
    gap, box = letter // 2, letter
    cell = max(int(font.getlength(text)) for text in texts) + box + 3 * gap
    width = max(width, cell + gap)
    columns = (width - gap) // cell
    line = round(1.6 * letter)
    legend: Image = pil.Image.new("RGB", (width, line * -(-len(texts) // columns) + gap), "white")
    draw = pil.ImageDraw.Draw(legend)
    background = result.class_set.background
    empty = None if background is None else result.class_set.names[background]
    for index, ((name, _), text) in enumerate(zip(rows, texts, strict=True)):
        left, top = gap + index % columns * cell, gap + index // columns * line
        fill = "white" if name == empty else colours[name]
        draw.rectangle((left, top, left + box, top + box), fill=fill, outline="black")
        draw.text((left + box + gap, top + box / 2), text, fill="black", font=font, anchor="lm")
    return legend


def save(image: Image, path: str | PathLike[str]) -> None:
    """Write ``image`` to ``path`` so that the file appears whole or not at all; the ending gives the format."""
    write_atomically(Path(path), image.save)
