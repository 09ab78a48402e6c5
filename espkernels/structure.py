"""Recognising the EESP unit and the down-sampler in any model by what they are made of, never by their class.

The classes may come from either official repository or from a user's copy. What the modules of a layer are can be
checked and is, one by one; what its ``forward`` does with them cannot: :func:`espkernels.replace` with ``verify`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from espkernels.fused_shortcut import pooling_difference
from espkernels.nn import containers

__all__ = ["Layer", "is_unit", "recognise"]

_EESP = {"proj_1x1", "spp_dw", "conv_1x1_exp", "br_after_cat", "module_act"}
_DOWN_SAMPLER = {"eesp", "avg", "act"}
# What the forward of our EESP reads from its module.
_READ = ("stride", "dilations", "down_method", "hff", "container_types")


class _Different(Exception):
    """The sentence that says how a module differs from the layer it looks like."""


@dataclass
class Layer:
    """A module that looks like one of the two layers; ``reason`` says why it is not, or is empty.

    ``attributes`` are those that the forward of :mod:`espkernels.nn` reads and its constructor would have set.
    """

    name: str
    module: nn.Module
    kind: str
    reason: str = ""
    attributes: dict[str, object] = field(default_factory=dict)

    @property
    def inputs(self) -> list[list[int]]:
        """The channels of the maps that each kind of call takes, 0 where it takes None."""
        if self.kind == "EESP":
            return [[_channels(self.module, "proj_1x1.conv")]]
        x = _channels(self.module, "eesp.proj_1x1.conv")
        has_shortcut = self.module._modules.get("inp_reinf") is not None
        return [[x, 0], [x, _channels(self.module, "inp_reinf.0.conv")]] if has_shortcut else [[x, 0]]


def recognise(model: nn.Module) -> Iterator[Layer]:
    """Every module in ``model`` that has the parts of an EESP unit or of a down-sampler, once, with its first name."""
    modules = list(model.named_modules())
    in_down_sampler = {id(module.eesp) for _, module in modules if _names(module) >= _DOWN_SAMPLER}
    for name, module in modules:
        if is_unit(module):
            layer = Layer(name, module, "EESP")
        elif _names(module) >= _DOWN_SAMPLER:
            layer = Layer(name, module, "DownSampler")
        else:
            continue
        try:
            _require(not isinstance(module, torch.jit.ScriptModule), "a scripted module")
            if layer.kind == "EESP":
                layer.attributes = _eesp(module, id(module) in in_down_sampler)
            else:
                _down_sampler(module)
        except _Different as difference:
            layer.reason = str(difference)
        yield layer


def is_unit(module: nn.Module) -> bool:
    """Whether the module has the parts of an EESP unit."""
    return _names(module) >= _EESP


def _names(module: nn.Module) -> set[str]:
    return set(module._modules.keys())  # a scripted module's are no dictionary


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Different(reason)


def _channels(module: nn.Module, name: str) -> int:
    """What the convolution ``name`` of a recognised layer takes."""
    conv = _part(module, name)
    assert isinstance(conv, nn.Conv2d)
    return conv.in_channels


def _only(module: nn.Module, name: str, expected: Collection[str]) -> None:
    """``module`` has the parts ``expected`` and no others, and no tensors of its own: its forward would use them."""
    parts = {part for part, child in module._modules.items() if child is not None}
    tensors = [key for own in (module._parameters, module._buffers) for key, value in own.items() if value is not None]
    missing, other = sorted(set(expected) - parts), sorted((parts - set(expected)) | set(tensors))
    _require(not missing, f"{name} has no {', '.join(missing)}")
    _require(not other, f"{name} also holds {', '.join(other)}")


def _part(module: nn.Module, name: str) -> nn.Module:
    part: nn.Module = module
    for step in name.split("."):
        child = part._modules.get(step)
        if child is None:
            raise _Different(f"there is no {name}")
        part = child
    return part


def _is(module: nn.Module, name: str, expected: type[nn.Module]) -> None:
    actual = parametrize.type_before_parametrizations(module)
    _require(actual is expected, f"{name} is a {actual.__name__}, not a {expected.__name__}")


def _conv(unit: nn.Module, name: str, size: int, groups: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """The convolution ``name`` of ``unit``: square, without bias, padded with zeros to keep the size at stride 1."""
    conv = _part(unit, name)
    _is(conv, name, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    _require(conv.bias is None, f"{name} has a bias")
    pad = dilation * (size - 1) // 2
    expected = {
        "kernel_size": (size, size),
        "stride": (stride, stride),
        "dilation": (dilation, dilation),
        "padding": (pad, pad),
        "padding_mode": "zeros",
        "groups": groups,
    }
    for key, value in expected.items():
        actual = getattr(conv, key)
        _require(actual == value, f"{name} has {key} {actual}, not {value}")
    _require(isinstance(conv.weight, Tensor), f"{name} has no weight tensor")
    return conv


def _norm(unit: nn.Module, name: str, channels: int) -> None:
    norm = _part(unit, name)
    # The module is called as it is, so any batch norm will do: synchronised, frozen or a copy of one.
    kind = type(norm).__name__
    is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in kind
    _require(is_norm, f"{name} is a {kind}, not a batch norm")
    actual = getattr(norm, "num_features", channels)
    _require(actual == channels, f"{name} has {actual} channels, not {channels}")


def _prelu(unit: nn.Module, name: str, channels: int) -> None:
    prelu = _part(unit, name)
    _is(prelu, name, nn.PReLU)
    assert isinstance(prelu, nn.PReLU)
    actual = prelu.weight.numel()
    _require(actual == channels, f"{name} has {actual} slopes, not one for each of {channels} channels")


def _eesp(unit: nn.Module, in_down_sampler: bool) -> dict[str, object]:
    _only(unit, "the unit", _EESP)
    _only(_part(unit, "proj_1x1"), "proj_1x1", ("conv", "bn", "act"))
    _only(_part(unit, "conv_1x1_exp"), "conv_1x1_exp", ("conv", "bn"))
    _only(_part(unit, "br_after_cat"), "br_after_cat", ("bn", "act"))
    _is(_part(unit, "spp_dw"), "spp_dw", nn.ModuleList)
    k = len(_part(unit, "spp_dw")._modules)
    _require(1 <= k <= 8, f"spp_dw holds {k} branches, not 1 to 8")

    reduce = _conv(unit, "proj_1x1.conv", 1, k)
    channels = reduce.out_channels
    _norm(unit, "proj_1x1.bn", channels)
    _prelu(unit, "proj_1x1.act", channels)

    dilations: list[int] = []
    for index in range(k):
        _only(_part(unit, f"spp_dw.{index}"), f"spp_dw.{index}", ("conv",))
    first = _part(unit, "spp_dw.0.conv")
    stride = first.stride[0] if isinstance(first, nn.Conv2d) else 1
    _require(stride in (1, 2), f"spp_dw.0.conv has stride {stride}, not 1 or 2")
    for index in range(k):
        name = f"spp_dw.{index}.conv"
        part = _part(unit, name)
        dilation = part.dilation[0] if isinstance(part, nn.Conv2d) else 1
        branch = _conv(unit, name, 3, channels, stride, dilation)
        _require(
            branch.in_channels == branch.out_channels == channels,
            f"{name} takes {branch.in_channels} channels to {branch.out_channels}, not {channels} to {channels}",
        )
        dilations.append(dilation)

    expand = _conv(unit, "conv_1x1_exp.conv", 1, k)
    total = k * channels
    _require(
        expand.in_channels == expand.out_channels == total,
        f"conv_1x1_exp.conv takes {expand.in_channels} channels to {expand.out_channels}, not {total} to {total}",
    )
    _norm(unit, "conv_1x1_exp.bn", total)
    _norm(unit, "br_after_cat.bn", total)
    _prelu(unit, "br_after_cat.act", total)
    _prelu(unit, "module_act", total)

    for name in _READ:
        _require(not isinstance(getattr(type(unit), name, None), property), f"its class computes {name} itself")
    down_method = _down_method(unit, stride, in_down_sampler)
    return {
        "stride": stride,
        "dilations": tuple(dilations),
        "down_method": down_method,
        "hff": _hff(unit),
        "container_types": tuple(map(type, containers(unit))),
    }


def _down_method(unit: nn.Module, stride: int, in_down_sampler: bool) -> str:
    named = vars(unit).get("down_method")
    if named in ("avg", "esp"):
        return str(named)
    official = vars(unit).get("downAvg")
    if isinstance(official, bool):
        return "avg" if official else "esp"
    _require(
        stride == 1 or in_down_sampler,
        "a strided unit outside a down-sampler, with neither downAvg nor down_method to say whether its PReLU runs",
    )
    return "avg" if in_down_sampler else "esp"


def _hff(unit: nn.Module) -> bool:
    hff = vars(unit).get("hff", True)
    _require(isinstance(hff, bool), f"its attribute hff is {hff!r}, not a bool")
    return bool(hff)


def _down_sampler(unit: nn.Module) -> None:
    parts = set(_DOWN_SAMPLER)
    if unit._modules.get("inp_reinf") is not None:
        parts.add("inp_reinf")
    _only(unit, "the unit", parts)
    eesp = _part(unit, "eesp")
    _require(_names(eesp) >= _EESP, f"eesp is a {type(eesp).__name__} without the parts of an EESP unit")
    try:
        attributes = _eesp(eesp, True)
    except _Different as difference:
        raise _Different(f"eesp is different: {difference}") from None
    _require(attributes["stride"] == 2, "eesp has stride 1, not 2")

    avg = _part(unit, "avg")
    _is(avg, "avg", nn.AvgPool2d)
    assert isinstance(avg, nn.AvgPool2d)
    reason = pooling_difference(avg)
    _require(not reason, reason)

    reduce, expand = _part(eesp, "proj_1x1.conv"), _part(eesp, "conv_1x1_exp.conv")
    assert isinstance(reduce, nn.Conv2d)
    assert isinstance(expand, nn.Conv2d)
    channels = reduce.in_channels + expand.out_channels
    _prelu(unit, "act", channels)
    if "inp_reinf" in parts:
        _shortcut(unit, channels)


def _shortcut(unit: nn.Module, channels: int) -> None:
    shortcut = _part(unit, "inp_reinf")
    _is(shortcut, "inp_reinf", nn.Sequential)
    _only(shortcut, "inp_reinf", ("0", "1"))
    _only(_part(shortcut, "0"), "inp_reinf.0", ("conv", "bn", "act"))
    _only(_part(shortcut, "1"), "inp_reinf.1", ("conv", "bn"))
    inner = _conv(unit, "inp_reinf.0.conv", 3, 1).out_channels
    _norm(unit, "inp_reinf.0.bn", inner)
    _prelu(unit, "inp_reinf.0.act", inner)
    outer = _conv(unit, "inp_reinf.1.conv", 1, 1)
    _require(
        (outer.in_channels, outer.out_channels) == (inner, channels),
        f"inp_reinf.1.conv takes {outer.in_channels} channels to {outer.out_channels}, not {inner} to {channels}",
    )
    _norm(unit, "inp_reinf.1.bn", channels)
