"""The weights that training starts from: those of a checkpoint, whole or its backbone alone."""

from __future__ import annotations

from torch import nn

from espkernels.models import checkpoint, load

__all__ = ["load_start"]


def load_start(network: nn.Module, start: str, *, backbone: bool = False) -> None:
    """Copies the checkpoint ``start`` into ``network``: all of it where it is of such a network, else its backbone.

    With ``backbone=True`` it is the backbone in either case. Raises FileNotFoundError where there is no file, and
    ValueError for one that does not fit; ``network`` is then as it was.
    """
    try:
        file = checkpoint.read(start)
        if not backbone:
            own = checkpoint.identify(network.state_dict())
            backbone = checkpoint.identify(file.tensors).network != own.network
        load.load_official(network, start, backbone=backbone)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"start: {error}") from error
