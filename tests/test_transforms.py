"""torch.func and forward-mode AD: kernels have no rules for them, so the reference runs, and says so where it must not.

Compared with the same networks and operators in plain torch operations, float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import espkernels
from espkernels import reference

DILATIONS = [1, 2]


def pyramid(module, x, weight, pointwise):
    return module.spatial_pyramid(x, weight, DILATIONS)


def pointwise(module, x, weight, pointwise):
    return module.group_pointwise(x, pointwise[:, : x.shape[1] // 2], 2)


def unit(module, x, weight, pointwise):
    return module.pyramid_pointwise(x, weight, DILATIONS, pointwise, 2)


@pytest.fixture(params=[pyramid, pointwise, unit])
def operator(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """One of the operators, ours and plain, of (x [B, 4, H, W], weight [2, 4, 3, 3], pointwise [6, 4])."""
    of = request.param
    return lambda *tensors: of(espkernels, *tensors), lambda *tensors: of(reference, *tensors)


def arguments(*batch: int) -> list[Tensor]:
    """Maps of 4 channels of 5x6, and the weights of the operators, each `batch` times."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 5, 6), (2, 4, 3, 3), (6, 4))
    return [torch.randn(*batch, *size, dtype=torch.float64, generator=generator) for size in sizes]


def assert_same(ours: object, plain: object) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_operators_under_vmap(operator):
    ours, plain = operator
    given = arguments(3)
    expected = torch.stack([plain(*one) for one in zip(*given, strict=True)])
    assert_same(vmap(ours)(*given), expected)


def test_operators_carry_tangents(operator):
    ours, plain = operator
    given, tangents = arguments(), arguments(1)
    tangents = [tangent[0].flip(0) for tangent in tangents]
    # A central difference of products of two or three arguments is off by the square of its step.
    step = 1e-4
    ahead, behind = (plain(*(a + sign * step * t for a, t in zip(given, tangents, strict=True))) for sign in (1, -1))
    quotient = (ahead - behind) / (2 * step)
    with forward_ad.dual_level():
        result = ours(*(forward_ad.make_dual(a, t) for a, t in zip(given, tangents, strict=True)))
        found = forward_ad.unpack_dual(result)
    assert_same(found.primal, plain(*given))
    torch.testing.assert_close(found.tangent, quotient, rtol=1e-6, atol=1e-6)
    assert_same(jvp(ours, tuple(given), tuple(tangents))[1], found.tangent)


def test_tangents_that_no_kernel_carries_are_refused():
    x, weight, _ = (a.requires_grad_() for a in arguments())
    y = espkernels.spatial_pyramid(x, weight, DILATIONS)
    with forward_ad.dual_level():
        grad_y = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match="spatial_pyramid_backward_input has no forward-mode derivative"):
            torch.autograd.grad(y, x, grad_y)


def test_operators_have_jacobians(operator):
    ours, _ = operator
    x, *weights = (a[:1] if a.dim() == 4 and a.shape[1] == 4 and a.shape[2] == 5 else a for a in arguments())
    # Through autograd as it always is, one row of the Jacobian at a time.
    expected = torch.autograd.functional.jacobian(lambda x: ours(x, *weights), x)
    assert_same(jacrev(lambda x: ours(x, *weights))(x), expected)
    assert_same(jacfwd(lambda x: ours(x, *weights))(x), expected)


def test_batched_gradients_of_a_down_sampler():
    unit = espkernels.nn.DownSampler(4, 12, 2).double()
    x = arguments()[0]
    for whole in (True, False):  # without eval mode its gradient is one operator's
        rows = torch.autograd.functional.jacobian(unit.train(whole), x, vectorize=True)
        assert_same(rows, torch.autograd.functional.jacobian(unit, x))


@pytest.fixture(params=["classification", "segmentation"])
def plain_network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "classification":
        return espkernels.models.espnetv2(0.5, 7, plain=True).double().eval()
    return espkernels.models.espnetv2_segmentation(0.5, 4, plain=True).double().eval()


def replaced(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    espkernels.replace(network)
    return network


@pytest.mark.parametrize("made", [replaced, espkernels.freeze])
def test_networks_in_eval_mode(plain_network, made):
    ours = made(plain_network)
    x, tangent = torch.randn(2, 2, 2, 3, 48, 32, dtype=torch.float64).unbind()
    assert_same(vmap(ours)(x), torch.stack([plain_network(one) for one in x]))
    assert_same(jvp(ours, (x[0],), (tangent[0],)), jvp(plain_network, (x[0],), (tangent[0],)))
    assert_same(
        grad(lambda image: ours(image).square().sum())(x[0]),
        grad(lambda image: plain_network(image).square().sum())(x[0]),
    )
    assert_same(ours(x[1]), plain_network(x[1]))  # and no transform is left behind


def test_replaced_networks_train_as_functions(plain_network):
    ours = replaced(plain_network)
    x = torch.randn(2, 3, 48, 32, dtype=torch.float64)

    def gradients(network: nn.Module) -> dict[str, Tensor]:
        network.train()
        parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            torch.manual_seed(0)  # of the dropout
            kept = {name: buffer.clone() for name, buffer in buffers.items()}
            return functional_call(network, (parameters, kept), (x,)).square().mean()

        return grad(loss)(parameters)

    assert_same(gradients(ours), gradients(plain_network))


def test_another_backend_is_not_left_silently():
    given = arguments(3)
    with espkernels.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for, but transforms"):
        vmap(lambda *one: pyramid(espkernels, *one))(*given)
    with espkernels.use_backend("reference"):
        vmap(lambda *one: pyramid(espkernels, *one))(*given)
