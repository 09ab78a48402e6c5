"""Where a unit of modules runs as operators of whole units, what it keeps, and where its layers run one by one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_results import randomised, results, twin
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from espkernels import nn as fused
from espkernels import ops, use_backend
from espkernels.training import eesp_training

pytestmark = pytest.mark.usefixtures("same_each_time")

# --- batch norms ----------------------------------------------------------------------------------------------------


def _norms(layer: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in layer.modules() if isinstance(part, nn.BatchNorm2d)]


def _change(name: str, layer: nn.Module) -> None:
    for norm in _norms(layer):
        if name == "cumulative":
            norm.momentum = None
        elif name == "not tracked":
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        elif name == "tracking switched off":
            norm.track_running_stats = False
        elif name == "not affine":
            norm.affine, norm.weight, norm.bias = False, None, None  # type: ignore[assignment]
        elif name == "affine frozen":
            norm.requires_grad_(False)
        elif name == "running":
            norm.eval()
        elif name == "other eps":
            norm.eps = 0.1
    if name in ("first frozen", "middle frozen", "last frozen"):
        _norms(layer)[("first frozen", "last frozen", "middle frozen").index(name)].eval()


NORMS = ("cumulative", "not tracked", "tracking switched off", "not affine", "affine frozen", "running", "other eps")


@pytest.mark.parametrize("name", [*NORMS, "first frozen", "middle frozen", "last frozen"])
def test_norms_do_as_torch_does(name: str, fused_calls: list[str]) -> None:
    layer = randomised(fused.EESP(16, 32, r_lim=7)).double()
    _change(name, layer)
    other = twin(layer)
    for _ in range(3):  # buffers go on from step to step
        x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
        expected, actual = results(other, x), results(layer, x)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10)
    assert len(fused_calls) == 3


# --- what nobody needs, and what nobody may change --------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen",
    [
        "proj_1x1",
        "spp_dw",
        "conv_1x1_exp.conv",
        "proj_1x1.conv spp_dw conv_1x1_exp.conv",
        "proj_1x1 spp_dw br_after_cat conv_1x1_exp.bn module_act",
        "proj_1x1 br_after_cat conv_1x1_exp module_act",
    ],
)
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_that_nobody_needs(frozen: str, needs_x: bool, fused_calls: list[str]) -> None:
    layer = randomised(fused.EESP(16, 16)).double()
    for name in frozen.split():
        layer.get_submodule(name).requires_grad_(False)
    other, x = twin(layer), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    leaves = [x.clone().requires_grad_(needs_x) for _ in range(2)]
    for each, leaf in zip((layer, other), leaves, strict=True):
        each(leaf).square().sum().backward()
    pairs = [
        (leaves[0].grad, leaves[1].grad),
        *((p.grad, q.grad) for p, q in zip(layer.parameters(), other.parameters(), strict=True)),
    ]
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert fused_calls


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the maps that the graph keeps for the backward pass, x among them."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[2:] == x.shape[2:]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


@pytest.mark.parametrize(("memory", "maps"), [("save", 3.25), ("recompute", 2.25)])
def test_maps_kept_for_the_backward_pass(memory: str, maps: float) -> None:
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = fused.EESP(64, 64, memory=memory)
    assert kept(layer, x) == maps * x.nbytes
    assert kept(twin(layer), x) >= 6.75 * x.nbytes


# --- what torch and its users do --------------------------------------------------------------------------------------

PARTS = (
    "proj_1x1", "proj_1x1.conv", "proj_1x1.bn", "proj_1x1.act", "spp_dw.0", "spp_dw.3.conv", "br_after_cat",
    "br_after_cat.bn", "br_after_cat.act", "conv_1x1_exp", "conv_1x1_exp.conv", "conv_1x1_exp.bn", "module_act",
)  # fmt: skip


def assert_hook_fires(layer: nn.Module, name: str) -> None:
    other, x = twin(layer), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    seen: list[str] = []
    for each in (layer, other):
        each.get_submodule(name).register_forward_hook(lambda *args: seen.append(name) or 2 * args[2])
    torch.testing.assert_close(layer(x), other(x), rtol=1e-10, atol=1e-10)
    assert seen == [name, name]


@pytest.mark.parametrize("name", PARTS)
def test_hooks_fire_in_training(name: str, fused_calls: list[str]) -> None:
    assert_hook_fires(randomised(fused.EESP(16, 16)).double(), name)
    assert not fused_calls


def test_other_layers_run_one_by_one(fused_calls: list[str]) -> None:
    def doubled(layer: Any) -> None:
        nn.utils.parametrizations.weight_norm(layer.proj_1x1.conv)

    def one_slope(layer: Any) -> None:
        layer.module_act = nn.PReLU().double()

    def another_norm(layer: Any) -> None:
        layer.br_after_cat.bn = nn.GroupNorm(1, 16).double()

    def more_in_a_container(layer: Any) -> None:
        norm, act = layer.br_after_cat.children()
        layer.br_after_cat = nn.Sequential(OrderedDict(bn=norm, act=act, drop=nn.Dropout2d(1.0)))

    def another_container(layer: Any) -> None:
        class Doubled(type(layer.spp_dw[0])):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = 2 * super().forward(x)
                return result

        layer.spp_dw[0].__class__ = Doubled

    def no_eps(layer: Any) -> None:
        layer.br_after_cat.bn.eps = 0.0

    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    for change in (more_in_a_container, another_container):
        layer = randomised(fused.EESP(16, 16)).double()
        other = twin(layer)
        change(layer)
        change(other)
        torch.testing.assert_close(layer(x), other(x), rtol=1e-10, atol=1e-10)
        assert not fused_calls
    layer = randomised(fused.EESP(16, 16)).double()
    no_eps(layer)
    with pytest.raises(ValueError, match="eps"):
        layer(x)
    for change in (doubled, one_slope, another_norm):
        layer = randomised(fused.EESP(16, 16)).double()
        change(layer)
        layer(torch.randn(2, 16, 5, 6, dtype=torch.float64)).sum().backward()
        assert not fused_calls
    nn.SyncBatchNorm.convert_sync_batchnorm(fused.EESP(16, 16))(torch.randn(2, 16, 5, 6)).sum().backward()
    with use_backend("reference"):
        fused.EESP(16, 16)(torch.randn(2, 16, 5, 6)).sum().backward()
    assert not fused_calls


def test_tensors_with_a_history_in_place_of_parameters(fused_calls: list[str]) -> None:
    layer = randomised(fused.EESP(16, 16)).double().eval().requires_grad_(False)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    gradients = []
    for each in (layer, twin(layer)):
        learned = []
        for name, parameter in list(each.named_parameters()):
            owner, _, short = name.rpartition(".")
            module = each.get_submodule(owner)
            delattr(module, short)
            learned.append(parameter.detach().clone().requires_grad_())
            setattr(module, short, learned[-1])
        gradients.append(torch.autograd.grad(each(x).square().sum(), learned))
    assert len(fused_calls) == 1
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_network_called_twice_in_a_step() -> None:
    # The norms of the first call run one by one, on a contiguous map, those of the second in operators.
    layer = randomised(fused.BR(16)).double()
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    gradients = []
    for each in (layer, twin(layer)):
        loss = each(x).square().sum() + each(x.contiguous(memory_format=torch.channels_last)).sum()
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_branches_in_several_memory_formats() -> None:
    layer: Any = randomised(fused.EESP(16, 16)).double().to(memory_format=torch.channels_last)
    layer.spp_dw[1].conv.weight = nn.Parameter(layer.spp_dw[1].conv.weight.detach().contiguous())
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    expected, actual = results(twin(layer), x), results(layer, x)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-10, atol=1e-10)


def test_a_float32_graph_is_differentiated_in_float32_inside_autocast() -> None:
    x, weight, grad = torch.randn(2, 4, 6, 7, requires_grad=True), torch.randn(4, 4, 3, 3), torch.randn(2, 16, 6, 7)
    y = ops.spatial_pyramid(x, weight, [1, 2, 3, 1])
    expected = torch.autograd.grad(y, x, grad, retain_graph=True)
    with torch.autocast("cpu"):
        assert torch.equal(*expected, *torch.autograd.grad(y, x, grad))


def test_second_derivative_says_what_has_none() -> None:
    layer, x = fused.EESP(16, 16), torch.randn(2, 16, 5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="espkernels::eesp_training has no second derivative"):
        grad.sum().backward()


def test_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espkernels.fused_unit.eesp_training", eesp_training)
    layer = randomised(fused.EESP(16, 16)).double()
    expected = copy.deepcopy(layer)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        """Traces the backward pass and the updates of the buffers too, as every real backend does."""
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    for _ in range(2):
        a, b = results(compiled, x), results(expected, x)
        for key, value in b.items():
            torch.testing.assert_close(a[f"_orig_mod.{key}" if f"_orig_mod.{key}" in a else key], value)
    assert len(graphs) == 1
    assert "espkernels.eesp_training.default" in [str(node.target) for node in graphs[0].graph.nodes]


def test_compiled_training_takes_any_size() -> None:
    layer, graphs = fused.EESP(16, 16).double(), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
    for size in range(5, 17):
        compiled(torch.randn(2, 16, size, 2 * size + 1, dtype=torch.float64)).sum().backward()
    assert graphs.frame_count <= 2


# --- without gradients -----------------------------------------------------------------------------------------------


@pytest.fixture
def inference_calls(calls_of: Callable[[Any, str], list[str]]) -> list[str]:
    """A word for each call of what follows a unit's reduction without gradients."""
    return calls_of(ops, "pyramid_pointwise")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "unit",
    [
        (16, 16),
        (16, 32),
        (16, 16, 2),
        (16, 32, 2, 4, 9, "avg"),
        (12, 18, 1, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("hff", [True, False], ids=["hff", "no-hff"])
@torch.no_grad()
def test_without_gradients(unit: Any, hff: bool, layout: torch.memory_format, inference_calls: list[str]) -> None:
    layer = randomised(fused.EESP(*unit, hff=hff)).double().eval()
    x = torch.randn(2, unit[0], 7, 6, dtype=torch.float64).contiguous(memory_format=layout)
    actual = layer(x)
    torch.testing.assert_close(actual, twin(layer)(x), rtol=1e-10, atol=1e-10)
    assert actual.is_contiguous(memory_format=layout)
    assert len(inference_calls) == 1


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_norms_without_gradients(name: str, inference_calls: list[str]) -> None:
    layer = randomised(fused.EESP(16, 32, r_lim=7)).double().eval()
    _change(name, layer)
    x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(layer)(x), rtol=1e-10, atol=1e-10)
    assert bool(inference_calls) == (name != "not tracked")  # it takes the statistics of the batch


@torch.no_grad()
def test_bfloat16_without_gradients(inference_calls: list[str]) -> None:
    """Closer to the truth than the layers, which round each of their results: 3 stored maps instead of 7."""
    layer = randomised(fused.EESP(64, 64)).bfloat16().eval()
    x = torch.randn(2, 64, 9, 10).bfloat16()
    truth = twin(layer).double()(x.double())
    ours, layers = ((each(x).double() - truth).norm() for each in (layer, twin(layer)))
    assert ours < layers
    assert inference_calls


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_hooks_fire_without_gradients(name: str, inference_calls: list[str]) -> None:
    assert_hook_fires(randomised(fused.EESP(16, 16)).double().eval(), name)
    assert not inference_calls


@torch.no_grad()
def test_autocast_without_gradients_decides_layer_by_layer(inference_calls: list[str]) -> None:
    layer = randomised(fused.EESP(16, 16)).eval()
    with torch.autocast("cpu"):
        layer(torch.randn(2, 16, 5, 6))
    assert not inference_calls


@torch.no_grad()
def test_weights_edited_in_place_count_without_gradients() -> None:
    layer, x = randomised(fused.EESP(16, 16)).double().eval(), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    layer(x)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1.25)
    torch.testing.assert_close(layer(x), twin(layer)(x), rtol=1e-10, atol=1e-10)
