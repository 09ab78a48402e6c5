"""Reading a checkpoint file safely, and telling which network it belongs to from its names and shapes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from espkernels.models.priors import MAPS

__all__ = ["Checkpoint", "Identity", "content", "identify", "read"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under the names that a network uses.

    ``unwrapped`` is the entry of a training checkpoint that held them, None for a plain file; ``stripped`` tells
    whether a leading "module." was taken off every name.
    """

    path: Path
    tensors: dict[str, Tensor]
    unwrapped: str | None
    stripped: bool


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is for: ``network`` in words, ``known`` where this project has that network.

    ``base`` is that of a segmentation network, ``boxes`` the prior boxes a pixel on each map of a detection network and
    ``expansion`` whether its level 5 ends with the grouped 1x1 convolution.
    """

    network: str
    known: bool
    scale: float | None = None
    num_classes: int | None = None
    in_channels: int = 3
    base: int = 16
    boxes: tuple[int, ...] = ()
    expansion: bool = True

    def __str__(self) -> str:
        details = []
        if self.scale is not None:
            details.append(f"s = {self.scale}")
        if self.num_classes is not None:
            details.append(f"{self.num_classes} classes")
        return f"{self.network} ({', '.join(details)})" if details else self.network


CLASSIFICATION = "ESPNetv2 for classification"
SEGMENTATION = "ESPNetv2 for segmentation"
DETECTION = "ESPNetv2 for detection"
OLD_SEGMENTATION = "the segmentation network of the older ESPNetv2 repository"
UNKNOWN = "a network that is not known here"


def read(path: str | PathLike[str]) -> Checkpoint:
    """The tensors of a ``.safetensors`` file, or of a file of torch.save holding nothing but tensors and plain data.

    Nothing in the file is executed: torch.load runs with ``weights_only=True`` and there is no other way. Training
    checkpoints are unwrapped and one leading "module." (a data-parallel container's) is stripped.

    Raises FileNotFoundError where there is no file, ImportError where a safetensors file cannot be read for want of
    the package, and ValueError for a file that is damaged, unsafe, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors, unwrapped = _unwrap(path, content(path))
    stripped = all(name.startswith("module.") for name in tensors)
    if stripped:
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Checkpoint(path, tensors, unwrapped, stripped)


def content(path: Path) -> object:
    """All that a file holds, tensors and plain data, for which nothing in it is executed.

    Raises ImportError and ValueError as :func:`read` does.
    """
    load = _loader(path)
    try:
        return load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something other than tensors and plain data, or is no checkpoint at all; it is not loaded,"
            f" since that could run code from the file. Save the state_dict() alone. torch says: {_refusal(error)}"
        ) from error
    except Exception as error:  # there is no end to what damaged bytes raise: IndexError, AssertionError, struct.error
        raise ValueError(f"{path} is damaged or cut off, it cannot be read as a checkpoint: {_short(error)}") from error


def _loader(path: Path) -> Callable[[Path], object]:
    """What reads a file of this ending."""
    if path.suffix != ".safetensors":
        return partial(torch.load, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path}: reading a safetensors file needs the package safetensors") from error
    return load_file


def _refusal(error: Exception) -> str:
    """torch's reason, without its advice to load the file unsafely."""
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return reason[1].partition(" Please use")[0][:200] if reason else "no reason given"


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _unwrap(path: Path, content: object) -> tuple[dict[str, Tensor], str | None]:
    unwrapped = None
    if isinstance(content, Mapping):
        unwrapped = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if unwrapped is not None:
            content = content[unwrapped]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict: got {type(content).__name__}, expected names with tensors")
    strange = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"{path} holds entries that are not tensors with a name: {', '.join(strange[:5])}")
    return dict(content), unwrapped


def identify(tensors: Mapping[str, Tensor]) -> Identity:
    """Which network a state dict belongs to, and its scale, classes and input channels."""
    if any(name.startswith(("net.", "proj_L4_C.")) for name in tensors) and "net.level1.conv.weight" in tensors:
        return Identity(OLD_SEGMENTATION, False)
    if "base_net.basenet.level1.conv.weight" in tensors:
        return _detection(tensors)
    prefix = "base_net." if "base_net.level1.conv.weight" in tensors else ""
    scale = _scale(tensors, prefix)
    if scale is None:
        return Identity(UNKNOWN, False)
    in_channels = tensors[prefix + "level1.conv.weight"].shape[1]
    if not prefix:
        return Identity(CLASSIFICATION, True, scale, _length(tensors, "classifier.weight", 2), in_channels)
    last, before = (_length(tensors, f"bu_dec_l{level}.merge_layer.3.weight", 4) for level in (4, 3))
    if last is None or before is None:
        return Identity(UNKNOWN, False)
    return Identity(SEGMENTATION, True, scale, last, in_channels, before // 2)


def _detection(tensors: Mapping[str, Tensor]) -> Identity:
    prefix = "base_net.basenet."
    locations = [_length(tensors, f"loc_layers.{i}.bias", 1) for i in range(MAPS)]
    boxes = tuple(length // 4 for length in locations if length is not None)
    scale, last = _scale(tensors, prefix), _length(tensors, f"cls_layers.{MAPS - 1}.bias", 1)
    if scale is None or last is None or len(boxes) != MAPS or 0 in boxes:
        return Identity(DETECTION, False, scale)
    channels = tensors[prefix + "level1.conv.weight"].shape[1]
    expansion = prefix + "level5.4.conv.weight" in tensors
    return Identity(DETECTION, True, scale, last // boxes[-1], channels, boxes=boxes, expansion=expansion)


def _scale(tensors: Mapping[str, Tensor], prefix: str) -> float | None:
    """The scale from the width of level 2, which is 64 s; None where the tensors are not ESPNetv2's."""
    stem = _length(tensors, prefix + "level1.conv.weight", 4)
    slopes = _length(tensors, prefix + "level2_0.act.weight", 1)
    return None if stem is None or slopes is None else slopes / 64


def _length(tensors: Mapping[str, Tensor], name: str, dims: int) -> int | None:
    """The first of the ``dims`` dimensions of the tensor ``name``, None where there is no such tensor."""
    tensor = tensors.get(name)
    return None if tensor is None or tensor.dim() != dims else tensor.shape[0]
