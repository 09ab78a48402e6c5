"""Registering a gradient: as torch does it, without its questions in every forward pass."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import espkernels
from espkernels import backends, gradient_registration

pytestmark = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


def test_a_forward_pass_asks_for_no_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._library import utils

    fill_defaults, schemas = utils.fill_defaults, []

    def watched(schema: Any, *given: Any) -> Any:
        schemas.append(schema)
        return fill_defaults(schema, *given)

    monkeypatch.setattr(utils, "fill_defaults", watched)
    espkernels.group_pointwise(torch.randn(1, 4, 3, 3), torch.randn(6, 2).requires_grad_(), 2)
    assert len(schemas) == 1
    assert not isinstance(schemas[0], torch._C.FunctionSchema)


def test_what_is_kept_is_the_operators_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._library import autograd

    kept: list[Any] = []
    monkeypatch.setattr(autograd, "make_autograd_impl", lambda operator, info: kept.append(operator))
    monkeypatch.setattr(gradient_registration._gradients, "impl", lambda *given, **options: None)
    for name in ("group_pointwise", "pyramid_pointwise", "eesp_training"):
        gradient_registration.register_autograd(f"espkernels::{name}", lambda ctx, grad: grad)
        schema = getattr(torch.ops.espkernels, name).default._schema
        assert len(kept[-1]._schema.arguments) == len(schema.arguments)
        for copy, argument in zip(kept[-1]._schema.arguments, schema.arguments, strict=True):
            assert (copy.name, copy.kwarg_only) == (argument.name, argument.kwarg_only)
            assert copy.default_value == argument.default_value
            assert str(copy.type) == str(argument.type)


def test_a_torch_without_that_kernel_registers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "torch._library.autograd", None)
    monkeypatch.setattr(
        torch.library, "register_autograd", lambda *given, **options: registered.append((given, options))
    )

    def backward(ctx: Any, grad: Any) -> Any:
        return grad

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    gradient_registration.register_autograd("espkernels::group_pointwise", backward, setup_context=save)
    (((name, found), options),) = registered
    assert (name, options) == ("espkernels::group_pointwise", {"setup_context": save})
    assert found(None, "a gradient") == "a gradient"
