"""Reading a checkpoint file safely, and telling which network it belongs to from its names and shapes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from espkernels.models.priors import MAPS

__all__ = ["Checkpoint", "Identity", "identify", "read"]

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
        raise FileNotFoundError(f"path: there is no file {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors, unwrapped = _unwrap(path, content)
    stripped = all(name.startswith("module.") for name in tensors)
    if stripped:
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Checkpoint(path, tensors, unwrapped, stripped)


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something other than tensors and plain data, or is no checkpoint at all; it is not loaded,"
            f" since that could run code from the file. Save the state_dict() alone. torch says: {_refusal(error)}"
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint, it is damaged or cut off: {_short(error)}") from error


def _refusal(error: Exception) -> str:
    """torch's reason, without its advice to load the file unsafely."""
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return reason[1].partition(" Please use")[0][:200] if reason else "no reason given"


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path}: reading a safetensors file needs the package safetensors") from error
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {_short(error)}") from error


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
        classifier = tensors.get("classifier.weight")
        classes = None if classifier is None else classifier.shape[0]
        return Identity(CLASSIFICATION, True, scale, classes, in_channels)
    last, before = tensors.get("bu_dec_l4.merge_layer.3.weight"), tensors.get("bu_dec_l3.merge_layer.3.weight")
    if last is None or before is None:
        return Identity(UNKNOWN, False)
    return Identity(SEGMENTATION, True, scale, last.shape[0], in_channels, before.shape[0] // 2)


def _detection(tensors: Mapping[str, Tensor]) -> Identity:
    prefix = "base_net.basenet."
    heads = [(tensors.get(f"loc_layers.{i}.bias"), tensors.get(f"cls_layers.{i}.bias")) for i in range(MAPS)]
    boxes = tuple(len(locations) // 4 for locations, _ in heads if locations is not None)
    scale, last = _scale(tensors, prefix), heads[-1][1]
    if scale is None or last is None or len(boxes) != MAPS or 0 in boxes:
        return Identity(DETECTION, False, scale)
    channels = tensors[prefix + "level1.conv.weight"].shape[1]
    expansion = prefix + "level5.4.conv.weight" in tensors
    return Identity(DETECTION, True, scale, len(last) // boxes[-1], channels, boxes=boxes, expansion=expansion)


def _scale(tensors: Mapping[str, Tensor], prefix: str) -> float | None:
    """The scale from the width of level 2, which is 64 s; None where the tensors are not ESPNetv2's."""
    stem, slopes = tensors.get(prefix + "level1.conv.weight"), tensors.get(prefix + "level2_0.act.weight")
    if stem is None or stem.dim() != 4 or slopes is None or slopes.dim() != 1:
        return None
    return slopes.shape[0] / 64
