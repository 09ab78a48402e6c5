"""Which modules of a model are running, so that what a forward pass does can be told by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["running"]


def _ignored(names: list[str]) -> None:
    pass


@contextmanager
def running(model: nn.Module, before: Callable[[list[str]], None] = _ignored) -> Iterator[list[str]]:
    """The names of the modules of ``model`` that are running, outermost first, without its own.

    The list follows every forward pass in the ``with`` block; ``before`` is called with it ahead of each change. The
    hooks are global ones, because layers of this library step out of their fused path for hooks of their own.
    """
    names = {id(module): name for name, module in model.named_modules() if name}
    now: list[str] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            before(now)
            now.append(names[id(module)])

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            before(now)
            now.pop()

    entering = register_module_forward_pre_hook(enter)
    leaving = register_module_forward_hook(leave)
    try:
        yield now
    finally:
        entering.remove()
        leaving.remove()
