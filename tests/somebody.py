"""Somebody else's model: the layers as the official code structures them, knowing nothing of this library.

Attributes and state_dict keys are the official ones, forwards are the paper's sequence in plain torch modules. Classes
stand in a module of their own so that they can be pickled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Down", "Network", "Unit"]


class CBR(nn.Module):
    def __init__(self, m: int, n: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(m, n, size, stride=stride, padding=size // 2, bias=False, groups=groups)
        self.bn = nn.BatchNorm2d(n)
        self.act = nn.PReLU(n)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(input)))


class CB(nn.Module):
    def __init__(self, m: int, n: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(m, n, size, padding=size // 2, bias=False, groups=groups)
        self.bn = nn.BatchNorm2d(n)

    def forward(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input))


class BR(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(n)
        self.act = nn.PReLU(n)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.bn(input))


class Branch(nn.Module):
    def __init__(self, n: int, dilation: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride, dilation, dilation, groups=n, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


class Unit(nn.Module):
    """An EESP unit: another name, another constructor, the official attributes."""

    def __init__(
        self, m: int, n: int, dilations: tuple[int, ...] = (1, 2, 3, 4), stride: int = 1, down: str = "esp"
    ) -> None:
        super().__init__()
        k = len(dilations)
        self.stride = stride
        self.proj_1x1 = CBR(m, n // k, 1, groups=k)
        self.k_sizes = [1 + 2 * dilation for dilation in dilations]
        self.spp_dw = nn.ModuleList(Branch(n // k, dilation, stride) for dilation in dilations)
        self.conv_1x1_exp = CB(n, n, 1, groups=k)
        self.br_after_cat = BR(n)
        self.module_act = nn.PReLU(n)
        self.downAvg = down == "avg"

    def forward(self, input: Tensor) -> Tensor:
        reduced = self.proj_1x1(input)
        maps = [self.spp_dw[0](reduced)]
        for branch in list(self.spp_dw)[1:]:
            maps.append(maps[-1] + branch(reduced))
        result = self.conv_1x1_exp(self.br_after_cat(torch.cat(maps, 1)))
        if self.stride == 2 and self.downAvg:
            return result
        if result.size() == input.size():
            result = result + input
        return self.module_act(result)

    def widest(self) -> int:
        """A method of the user's own."""
        return max(self.k_sizes)


class Down(nn.Module):
    """A down-sampler; without ``reinf`` it has no ``inp_reinf`` at all."""

    def __init__(self, m: int, n: int, dilations: tuple[int, ...] = (1, 2, 3, 4), reinf: bool = True) -> None:
        super().__init__()
        self.eesp = Unit(m, n - m, dilations, 2, "avg")
        self.avg = nn.AvgPool2d(kernel_size=3, padding=1, stride=2)
        if reinf:
            self.inp_reinf = nn.Sequential(CBR(3, 3, 3), CB(3, n, 1))
        self.act = nn.PReLU(n)

    def forward(self, input: Tensor, input2: Tensor | None = None) -> Tensor:
        pooled = self.avg(input)
        output = torch.cat([pooled, self.eesp(input)], 1)
        if input2 is not None:
            while True:
                input2 = F.avg_pool2d(input2, kernel_size=3, padding=1, stride=2)
                if input2.size(2) == pooled.size(2):
                    break
            output = output + self.inp_reinf(input2)
        return self.act(output)


class Network(nn.Module):
    """The shape of an ESPNetv2, small: every kind of layer once, one unit twice, and one that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = CBR(3, 16, 3, 2)
        self.level2_0 = Down(16, 32)
        self.level3_0 = Down(32, 48, (1, 1, 2, 3), reinf=False)
        self.level3 = nn.ModuleList([Unit(48, 48), Unit(48, 48, (1, 1, 1, 2))])
        self.again = self.level3[0]
        self.unused = Unit(48, 48)
        self.head = nn.Conv2d(48, 5, 1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, tensor in (*self.named_parameters(), *self.named_buffers()):
                if tensor.is_floating_point():
                    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    positive = tensor.dim() < 2 and not name.endswith(("bias", "running_mean"))
                    tensor.copy_(0.5 + values if positive else values - 0.5)
                    if name.endswith("act.weight"):
                        tensor.mul_(0.4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.level2_0(self.level1(image), image)
        x = self.level3_0(x)
        for unit in self.level3:
            x = unit(x)
        return self.head(self.again(x))
