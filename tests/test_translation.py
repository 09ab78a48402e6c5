"""What a forward does between its layers runs as kernels of ours while it is recorded, several operations as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaying import own, photograph, the_plan
from somebody import CBR
from somebody_segmentation import Weighting
from test_freeze import assert_same, trained
from torch import Tensor, nn

import espkernels
from espkernels import backends

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("threads"),
]


class Decoder(nn.Module):
    """A stem, and what is done with its map."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = CBR(3, 8, 3, 2)
        self.small = CBR(8, 8, 3, 2)
        self.norm = nn.Sequential(nn.BatchNorm2d(8), nn.PReLU(8))
        self.weighting = Weighting(8, 8)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, self.stem(x))


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def reused(model: Any, x: Tensor) -> Tensor:
    """The enlarged map is wanted twice: merged, and as it is."""
    y = enlarged(model.small(x), x)
    return model.norm(y + x) + y


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "enlarge and add": (lambda m, x: m.norm(enlarged(m.small(x), x) + x), ["resize"]),
    "add to the enlarged": (lambda m, x: m.norm(x + enlarged(m.small(x), x)), ["resize"]),
    "weighted": (lambda m, x: m.norm(enlarged(m.small(x), x) + m.weighting(x)), ["resize"]),
    "without a norm": (lambda m, x: enlarged(m.small(x), x) + x, ["resize"]),
    "two enlarged": (lambda m, x: enlarged(m.small(x), x) + enlarged(m.small(x), x), ["resize", "resize"]),
    "norm of the enlarged": (lambda m, x: m.norm(enlarged(m.small(x), x)), ["resize"]),
    "three addends": (lambda m, x: m.norm(enlarged(m.small(x), x) + x + x), ["resize", "affine", "affine"]),
    "reused": (reused, ["resize", "resize"]),
    "sum": (lambda m, x: m.norm(x + x), ["affine", "affine"]),
    "norm twice": (lambda m, x: m.norm(m.norm(x)), ["affine", "affine"]),
    "classes": (lambda m, x: enlarged(m.small(x), x).argmax(1), ["resized_argmax"]),
    "classes of a merge": (lambda m, x: (enlarged(m.small(x), x) + x).argmax(1), ["resize", "resized_argmax"]),
    "rectified": (lambda m, x: m.norm(x).relu(), ["affine", "affine"]),
    "concatenated": (lambda m, x: torch.cat([m.norm(x), enlarged(m.small(x), x), x], 1), ["affine", "resize"]),
    "another layout": (lambda m, x: m.norm(x).contiguous(), ["affine", "change_layout"]),
}


@pytest.mark.parametrize("name", WAYS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_operations_that_become_one_kernel(name: str) -> None:
    way, expected = WAYS[name]
    model = trained(Decoder(way)).eval()
    frozen: Any = espkernels.freeze(model)
    x = photograph(2, 3, 21, 18)
    result = frozen(x)
    recorded = the_plan(frozen)
    assert recorded.refusal == ""
    kinds = {"resize", "affine", "resized_argmax", "change_layout"}
    assert [step[0] for step in recorded.plan.steps() if step[0] in kinds] == expected
    exact = copy.deepcopy(model).double()(x.double())
    assert result.shape == exact.shape
    if result.dtype == torch.int64:
        # Random numbers: no two channels of a pixel are as near as rounding.
        assert torch.equal(result, exact)
    else:
        assert_same(result, exact, 1e-5)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a weight alone": (lambda m, x: m.weighting(x), "mul"),
    "a gate alone": (lambda m, x: m.weighting.wt_layer(x), "sigmoid"),
    "a weighted map, normed": (lambda m, x: m.norm(m.weighting(x)), "mul"),
    "a scaled sum": (lambda m, x: torch.add(x, x, alpha=2), "add"),
    "the largest anywhere": (lambda m, x: x.argmax(2), "argmax"),
    "a constant added": (lambda m, x: x + 1.0, "add"),
    "the map of one image": (lambda m, x: x + torch.ones(1, 8, *x.shape[2:]), "affine"),
    "a pooling that counts no padding": (
        lambda m, x: F.avg_pool2d(m.norm(x), 3, 2, 1, count_include_pad=False),
        "avg_pool2d",
    ),
    "a pooling with a divisor": (lambda m, x: F.avg_pool2d(m.norm(x), 3, 2, 1, divisor_override=5), "avg_pool2d"),
}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name.replace(" ", "-").replace(",", ""))
@torch.no_grad()
def test_what_no_kernel_does_is_refused_and_right(name: str) -> None:
    way, reason = REFUSED[name]
    frozen: Any = espkernels.freeze(trained(Decoder(way)).eval())
    x = photograph(2, 3, 21, 18)
    assert torch.equal(frozen(x), own(frozen, x))
    recorded = the_plan(frozen)
    assert recorded.plan is None and reason in recorded.refusal, recorded.refusal
