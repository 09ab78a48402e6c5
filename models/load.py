"""Loading checkpoints of the official repositories, sacmehta/EdgeNets and sacmehta/ESPNetv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from espkernels.models import checkpoint
from espkernels.models.detection import Configuration, espnetv2_detection
from espkernels.models.espnetv2 import espnetv2
from espkernels.models.priors import ratios_of
from espkernels.models.segmentation import espnetv2_segmentation

__all__ = ["LoadReport", "from_official", "load_official"]

_SHOWN = 10


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_official` did.

    ``network`` says what the file holds, ``loaded`` how many tensors were copied. ``left_out`` are the file's tensors
    that were not used and ``kept`` the model's that were not overwritten: both empty unless ``backbone=True``.
    ``unwrapped`` is the entry of a training checkpoint that held the tensors, ``stripped`` tells whether a leading
    "module." was taken off the names.
    """

    path: Path
    network: str
    loaded: int
    left_out: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unwrapped: str | None = None
    stripped: bool = False

    def __str__(self) -> str:
        text = f"{self.path.name}: {self.network}, {self.loaded} tensors loaded"
        if self.left_out or self.kept:
            text += f", {len(self.left_out)} of the file left out, {len(self.kept)} of the model kept"
        return text


def load_official(model: nn.Module, path: str | PathLike[str], *, backbone: bool = False) -> LoadReport:
    """Copy an official checkpoint (``.pth`` or ``.safetensors``) into ``model``: all of it, or nothing.

    Names, shapes, kinds of numbers and finiteness of every tensor are checked before the first one is copied. Files
    of torch.save are read with ``weights_only=True`` only (:func:`checkpoint.read`).

    With ``backbone=True`` only levels 1 to 5, as many as the model has, are taken from the checkpoint and everything
    else in the model stays: how the official segmentation and detection networks start from ImageNet weights, and how
    a network starts on new classes.

    Raises ValueError for any mismatch, with a list of what is missing, unexpected or of another shape; the model is
    then as it was. Raises what :func:`checkpoint.read` raises for files that cannot be read.
    """
    return _load(model, checkpoint.read(path), backbone)


def from_official(
    path: str | PathLike[str], *, scale: float | None = None, plain: bool = False, image_size: int = 512
) -> nn.Module:
    """The network that an official checkpoint was saved from, with its weights, in evaluation mode.

    Scale, classes, input channels and a detection network's configuration follow from the shapes in the file; ``scale``
    may insist on one. ``plain`` is that of the networks; ``image_size`` that of a detection network, whose weights fit
    every size. Raises ValueError for a checkpoint of another network, and as :func:`load_official`.
    """
    file = checkpoint.read(path)
    identity = checkpoint.identify(file.tensors)
    scale = identity.scale if scale is None else scale
    if not identity.known or scale is None:
        raise ValueError(
            f"{path} holds {identity}: only ESPNetv2 for classification, segmentation or detection can be built"
        )
    model: nn.Module
    if identity.network == checkpoint.CLASSIFICATION:
        model = espnetv2(scale, identity.num_classes or 1000, identity.in_channels, plain=plain)
    elif identity.network == checkpoint.DETECTION:
        model = espnetv2_detection(
            scale,
            identity.num_classes or 21,
            image_size,
            configuration=Configuration(identity.expansion, tuple(map(ratios_of, identity.boxes))),
            in_channels=identity.in_channels,
            plain=plain,
        )
    else:
        classes = identity.num_classes or 20
        model = espnetv2_segmentation(scale, classes, base=identity.base, in_channels=identity.in_channels, plain=plain)
    _load(model, file, backbone=False)
    return model.eval()


def _load(model: nn.Module, file: checkpoint.Checkpoint, backbone: bool) -> LoadReport:
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("model: it lies on the meta device, where nothing can be loaded; call model.to_empty first")

    # From the model's names to the file's.
    names = _backbone_names(file.tensors, state) if backbone else {name: name for name in file.tensors}
    offered = {own: file.tensors[theirs] for own, theirs in names.items() if theirs in file.tensors}
    expected = {name: tensor for name, tensor in state.items() if not backbone or name in names}
    problems = _problems(offered, expected)
    if problems:
        raise ValueError("\n  ".join([_headline(file, state), *problems]))

    model.load_state_dict(offered, strict=not backbone)
    used = set(names.values())
    return LoadReport(
        path=file.path,
        network=str(checkpoint.identify(file.tensors)),
        loaded=len(offered),
        left_out=tuple(name for name in file.tensors if name not in used),
        kept=tuple(name for name in state if name not in offered),
        unwrapped=file.unwrapped,
        stripped=file.stripped,
    )


def _backbone_names(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, str]:
    """The model's backbone tensors, each with the name it would have in the file."""
    inner, outer = _backbone_prefix(model), _backbone_prefix(file)
    if inner is None:
        raise ValueError("backbone: the model has no levels of ESPNetv2, neither at the top nor in base_net")
    names = (name.removeprefix(inner) for name in model if name.startswith(inner + "level"))
    return {inner + name: (outer or "") + name for name in names}


def _backbone_prefix(names: Mapping[str, Tensor]) -> str | None:
    return next((p for p in ("", "base_net.", "base_net.basenet.") if p + "level1.conv.weight" in names), None)


def _problems(offered: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in offered]
    unexpected = [name for name in offered if name not in expected]
    shapes, kinds, not_finite = [], [], []
    for name in offered.keys() & expected.keys():
        theirs, own = offered[name], expected[name]
        if theirs.shape != own.shape:
            shapes.append(f"{name}: file {list(theirs.shape)}, model {list(own.shape)}")
        elif theirs.is_floating_point() != own.is_floating_point() or theirs.is_complex() != own.is_complex():
            kinds.append(f"{name}: file {theirs.dtype}, model {own.dtype}")
        elif theirs.is_floating_point() and not torch.isfinite(theirs.to(own.dtype)).all():
            not_finite.append(name)
    return [
        *_listed("missing in the file", missing),
        *_listed("unexpected in the file", unexpected),
        *_listed("of another shape", sorted(shapes)),
        *_listed("of another kind of number", sorted(kinds)),
        *_listed("not finite in the model's dtype", sorted(not_finite)),
    ]


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ["\n    ".join([f"{what} ({len(names)}):", *names[:_SHOWN], *more])]


def _headline(file: checkpoint.Checkpoint, state: Mapping[str, Tensor]) -> str:
    theirs, own = checkpoint.identify(file.tensors), checkpoint.identify(state)
    text = f"{file.path} does not fit, nothing was loaded: the file holds {theirs}, the model is {own}."
    if theirs.network == checkpoint.OLD_SEGMENTATION:
        text += (
            " It is a different network from the one of the paper and of EdgeNets, which espnetv2_segmentation is:"
            " these weights fit none of the networks here."
        )
    elif theirs.network == checkpoint.CLASSIFICATION and own.network in (checkpoint.SEGMENTATION, checkpoint.DETECTION):
        text += f" To start {own.network} from classification weights, pass backbone=True."
    elif theirs.network == own.network and theirs.known and (theirs.scale, theirs.base) == (own.scale, own.base):
        text += " To keep the backbone alone, pass backbone=True." if theirs.num_classes != own.num_classes else ""
    return text
