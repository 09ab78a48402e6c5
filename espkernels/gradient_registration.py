"""Gradients of operators, registered without what torch asks of their schemas in every forward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
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
    _gradients.impl(operator._opname, kernel, "Autograd", with_keyset=True)
