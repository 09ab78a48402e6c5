"""Somebody else's segmentation network frozen: our kernels where its blocks are the official ones, right where not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replaying import layers, photograph, the_plan
from somebody import BR, CB, CBR, Network
from somebody_segmentation import Mix, Pooling, Segmenter
from test_freeze import assert_same, image, trained
from torch import Tensor, nn

import espkernels
from espkernels import backends, models
from espkernels.frozen import FrozenAffine, FrozenConvolution
from espkernels.frozen_decoder import FrozenPyramidPooling

pytestmark = pytest.mark.usefixtures("threads")

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, nn.Module]:
    """Our network and somebody else's, of the same weights."""
    ours = trained(models.espnetv2_segmentation(0.5, 6, plain=True)).eval()
    theirs = Segmenter(6).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def kernels(model: Any) -> Counter[tuple[Any, ...]]:
    """Name, multiply-adds and bytes of the weights of each kernel in the plan; the order is the forward's own."""
    return Counter(step[:3] for step in the_plan(model).plan.steps())


# --- a whole network --------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("size", [(64, 96), (80, 48)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_the_kernels_and_bits_of_our_network(
    both: tuple[nn.Module, nn.Module], size: tuple[int, int], channels_last: bool
) -> None:
    ours, theirs = (espkernels.freeze(model) for model in both)
    x = photograph(2, 3, *size, channels_last=channels_last)
    assert torch.equal(theirs(x), ours(x))
    assert the_plan(theirs).refusal == ""
    assert kernels(theirs) == kernels(ours)


@torch.no_grad()
def test_against_the_model_itself_in_float64(both: tuple[nn.Module, nn.Module]) -> None:
    theirs = copy.deepcopy(both[1]).double()
    x = image(1, 3, 64, 48)
    frozen: Any = espkernels.freeze(theirs)
    assert_same(frozen(x), theirs(x), 1e-12)
    with espkernels.use_backend("reference"):
        assert_same(frozen(x), theirs(x), 1e-12)


@needs_library
@torch.no_grad()
def test_a_classifier_of_somebody_else_is_replayed() -> None:
    frozen: Any = espkernels.freeze(Network().eval())
    x = photograph(1, 3, 48, 64)
    assert torch.equal(frozen(x), layers(frozen, x))
    assert the_plan(frozen).refusal == ""


@needs_library
@torch.no_grad()
def test_explain_knows_the_layers_of_merged_kernels(both: tuple[nn.Module, nn.Module]) -> None:
    frozen = espkernels.freeze(both[1])
    found = espkernels.explain(frozen, photograph(1, 3, 32, 32))
    assert found.refusal == ""
    merges = [row.layer for row in found.rows if row.kernel == "resize"]
    assert merges == ["bu_br_l2.0", "bu_br_l3.0", "bu_br_l4.0", ""]  # the last is the forward's own


@needs_library
@torch.no_grad()
def test_the_image_is_pooled_once_for_all_down_samplers(both: tuple[nn.Module, nn.Module]) -> None:
    frozen: Any = espkernels.freeze(both[1])
    frozen(photograph(1, 3, 64, 64))
    pools = [step for step in the_plan(frozen).plan.steps() if step[0] == "average_pool"]
    # Four halvings of the image down to the fourth level, and one of the map in each of three down-samplers.
    assert len(pools) == 4 + 3


# --- blocks -----------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """The parts of a convolution block, used in another way."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], n: int = 6) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.PReLU(n)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


class Floored(Pooling):
    """The branches' sizes rounded down."""

    def size(self, side: int, scale: float) -> int:
        return max(5, int(side * scale))


class Swapped(Mix):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def with_another_shuffle() -> Pooling:
    block = Pooling(12, 4, 8)
    block.merge_layer[1] = Swapped(5)
    return block


def with_another_epsilon() -> Pooling:
    block = Pooling(12, 4, 8)
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1
    return block


def with_one_slope() -> nn.Module:
    block = CBR(6, 9, 3)
    block.act = nn.PReLU()
    return block


# Blocks, and what they become; None stays what it was.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module] | None]] = {
    "convolution": (lambda: CBR(6, 9, 3, 2), FrozenConvolution),
    "convolution with one slope": (with_one_slope, FrozenConvolution),
    "convolution without activation": (lambda: CB(6, 9, 3), FrozenConvolution),
    "norm and activation": (lambda: BR(6), FrozenAffine),
    "norm and activation in a row": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.PReLU(6)), FrozenAffine),
    "norm": (lambda: nn.BatchNorm2d(6), FrozenAffine),
    "activation": (lambda: nn.PReLU(6), FrozenAffine),
    "pooling": (lambda: Pooling(12, 4, 8), FrozenPyramidPooling),
    "last pooling": (lambda: Pooling(12, 4, 8, last_layer_br=False), FrozenPyramidPooling),
    "pooling with another epsilon": (with_another_epsilon, FrozenPyramidPooling),
    "pooling of other sizes": (lambda: Floored(12, 4, 8), None),
    "pooling with another shuffle": (with_another_shuffle, None),
    "parts in another order": (lambda: Named(lambda m, x: m.conv(m.act(m.bn(x)))), None),
    "parts and a shortcut": (lambda: Named(lambda m, x: x + m.act(m.bn(m.conv(x)))), None),
    "parts and two results": (lambda: Named(lambda m, x: (m.act(m.bn(m.conv(x))),) * 2), None),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("name", BLOCKS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_blocks(name: str) -> None:
    build, kind = BLOCKS[name]
    block = trained(build()).double().eval()
    channels = next(t.shape[-3] if t.dim() == 4 else len(t) for t in block.parameters())
    x = image(2, {"last pooling": 12}.get(name, 12 if "pooling" in name else 6), 21, 19)
    assert channels
    random = torch.get_rng_state()
    frozen = espkernels.freeze(nn.ModuleList([block]))[0]
    assert torch.equal(torch.get_rng_state(), random)
    first = frozen[0] if isinstance(block, nn.Sequential) else frozen
    assert isinstance(first, kind if kind is not None else type(block))
    expected, actual = block(x), frozen(x)
    for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (actual, expected)), strict=True):
        assert_same(one, other, 1e-13)


@torch.no_grad()
def test_a_block_with_hooks_stays() -> None:
    ran = []
    block = CBR(3, 4, 3).eval()
    block.bn.register_forward_hook(lambda *_: ran.append(1))
    frozen = espkernels.freeze(nn.Sequential(block))
    assert not ran
    frozen(photograph(1, 3, 9, 9))
    assert ran == [1]


@torch.no_grad()
def test_an_activation_of_features() -> None:
    block = trained(nn.Sequential(nn.Linear(6, 9), nn.PReLU(9))).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_same(espkernels.freeze(block)(x), block(x), 1e-14)


@torch.no_grad()
def test_a_unit_that_cannot_be_folded_still_runs() -> None:
    unit = espkernels.nn.EESP(16, 16).double().eval()
    unit.br_after_cat.bn = nn.BatchNorm2d(16, track_running_stats=False).double().eval()
    x = image(2, 16, 7, 9)
    assert_same(espkernels.freeze(nn.Sequential(unit))(x), unit(x), 1e-13)


class Other(nn.Module):
    """Another unit than EESP in our down-sampler."""

    def __init__(self, m: int, n: int, stride: int, *_: Any, **__: Any) -> None:
        super().__init__()
        self.body = CBR(m, n, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OtherDownSampler(espkernels.nn.DownSampler):
    eesp_type = Other  # type: ignore[assignment]


@pytest.mark.parametrize("foldable", [True, False], ids=["another-unit", "no-statistics"])
@torch.no_grad()
def test_a_down_sampler_of_other_parts_still_runs(foldable: bool) -> None:
    kind = OtherDownSampler if foldable else espkernels.nn.DownSampler
    block = trained(kind(16, 48)).double().eval()
    if not foldable:
        block.eesp.br_after_cat.bn = nn.BatchNorm2d(32, track_running_stats=False).double().eval()
    x, photo = image(2, 16, 11, 14), image(2, 3, 41, 55)
    frozen = espkernels.freeze(block)
    assert_same(frozen(x), block(x), 1e-13)
    assert_same(frozen(x, photo), block(x, photo), 1e-13)


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [0, 1], ids=["ours", "theirs"])
@torch.no_grad()
def test_classes_without_logits(both: tuple[nn.Module, nn.Module], of: int) -> None:
    frozen: Any = espkernels.freeze(both[of])
    x = photograph(2, 3, 48, 64)
    expected = frozen(x).argmax(1).to(torch.uint8)
    found = frozen.classes(x)
    assert found.dtype == torch.uint8 and torch.equal(found, expected)
    if backends.library is not None:
        plan = {key[0]: recorded.plan for key, recorded in frozen.plans.items()}["classes"]
        names = [step[0] for step in plan.steps()]
        assert names[-1] == "resized_argmax" and plan.output_bytes == [48 * 64]
    with espkernels.use_backend("reference"):
        assert (frozen.classes(x) == expected).float().mean() > 0.999  # other roundings of near ties


@torch.no_grad()
def test_classes_of_many_and_of_no_map() -> None:
    head: Any = espkernels.freeze(nn.Sequential(nn.Conv2d(3, 300, 1)).eval())
    x = photograph(1, 3, 5, 4)
    assert head.classes(x).dtype == torch.int64 and torch.equal(head.classes(x), head(x).argmax(1))
    classifier: Any = espkernels.freeze(models.espnetv2(0.5, num_classes=10).eval())
    with pytest.raises(ValueError, match=r"shape \[1, 10\], expected logits"):
        classifier.classes(photograph(1, 3, 32, 32))
