"""Gradients of operators, registered without what torch asks of their schemas in every forward pass.

Backward passes run as their forward passes were recorded: without an autocast around them, and refuse tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

__all__ = ["register_autograd"]

_gradients = Library("espkernels", "IMPL")


def register_autograd(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
) -> None:
    """``torch.library.register_autograd`` for an operator of this library.

    torch hands ``setup_context`` the arguments that were left at their defaults too, and for that asks the operator for
    the list of all its arguments once for each of them, in every forward pass: 0.2 ms for a training unit's, a tenth of
    the step of a small one. Here its autograd kernel reads a copy. A torch without that kernel registers by itself.
    """
    operator = getattr(torch.ops.espkernels, name.removeprefix("espkernels::")).default
    backward = _without_autocast(backward)
    try:
        from torch._library.autograd import Info, make_autograd_impl
    except ImportError:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        return
    schema = operator._schema
    arguments = tuple(
        SimpleNamespace(name=a.name, type=a.type, kwarg_only=a.kwarg_only, default_value=a.default_value)
        for a in schema.arguments
    )
    read: Any = SimpleNamespace(
        _schema=SimpleNamespace(arguments=arguments, returns=schema.returns),
        _namespace=operator._namespace,
        _opname=operator._opname,
        _overloadname=operator._overloadname,
        tags=operator.tags,
        redispatch=operator.redispatch,
    )
    kernel = make_autograd_impl(read, Info(backward, setup_context))

    def without_tangents(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, (*args, *kwargs.values()))):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; espkernels' functions have, which run the reference there"
            )
        return kernel(keyset, *args, **kwargs)

    _gradients.impl(operator._opname, without_tangents, "Autograd", with_keyset=True)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Operators of ours that a backward pass calls have rules for autocast; its forward pass has obeyed them."""

    def as_recorded(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return backward(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return backward(*args)

    return as_recorded
