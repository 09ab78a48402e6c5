"""Priors, box coding, matching, the MultiBox loss and suppression, each against a slow version with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from espkernels.models.box_coding import decode, encode
from espkernels.models.boxes import centres, corners, overlaps
from espkernels.models.detections import detections
from espkernels.models.matching import match
from espkernels.models.multibox_loss import hardest_negatives, multibox_loss
from espkernels.models.priors import map_sizes, prior_boxes, ratios_of
from espkernels.models.suppression import BLOCK, suppress

SIX = tuple(map(ratios_of, (6, 6, 6, 6, 6, 6)))
MIXED = tuple(map(ratios_of, (4, 6, 6, 6, 4, 4)))
# Sides of the squares in pixels, and pixels between centres, as SSD's configuration files have them.
OFFICIAL = {
    300: ((38, 19, 10, 5, 3, 1), (30, 77, 125, 172, 220, 267, 315), (8, 16, 32, 64, 100, 300)),
    512: ((64, 32, 16, 8, 4, 1), (52, 133, 214, 295, 376, 457, 538), (8, 16, 32, 64, 128, 512)),
}


@pytest.fixture(autouse=True)
def one_thread(same_each_time: None) -> None:
    """Small tensors gain nothing from more, and lose much where the processors are shared."""


@pytest.mark.parametrize("size", OFFICIAL)
@pytest.mark.parametrize("ratios", [SIX, MIXED], ids=["six", "mixed"])
def test_priors_of_the_official_sizes(size: int, ratios: tuple[tuple[float, ...], ...]):
    maps, sides, strides = OFFICIAL[size]
    assert map_sizes(size) == maps
    expected = []
    for index, side in enumerate(maps):
        small, large = sides[index] / size, math.sqrt(sides[index] * sides[index + 1]) / size
        shapes = [(small, small), (large, large)]
        for ratio in ratios[index]:
            wide, narrow = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        for row in range(side):
            for column in range(side):
                x, y = (column + 0.5) * strides[index] / size, (row + 0.5) * strides[index] / size
                expected += [[min(value, 1.0) for value in (x, y, *shape)] for shape in shapes]
    priors = prior_boxes(size, ratios)
    # Stored in float32: half a unit in the last place of numbers up to 1.
    np.testing.assert_allclose(priors.numpy(), np.array(expected), rtol=0, atol=2**-24)


@pytest.mark.parametrize(("size", "six"), [(512, 32_742), (384, 18_420), (300, 11_640), (256, 8_190), (1, 36)])
def test_numbers_of_priors(size: int, six: int):
    assert len(prior_boxes(size, SIX)) == six
    assert len(prior_boxes(size, MIXED)) == sum(
        side * side * boxes for side, boxes in zip(map_sizes(size), (4, 6, 6, 6, 4, 4), strict=True)
    )


def some_boxes(count: int, seed: int = 0) -> Tensor:
    """Corners of ``count`` boxes, their sides from 0.05 to 0.55."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 0.6
    return torch.cat([low, low + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.05], dim=1)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - both
    return both / union if union > 0 else 0.0


def test_overlaps_against_their_definition():
    one, other = some_boxes(13, 1), some_boxes(9, 2)
    other[3, 2:] = other[3, :2]  # a point
    expected = [[overlap(a, b) for b in other.tolist()] for a in one.tolist()]
    # A handful of float64 operations on numbers around 1.
    np.testing.assert_allclose(overlaps(one, other).numpy(), expected, rtol=1e-13, atol=1e-15)
    assert overlaps(other[3:4], other[3:4]).item() == 0.0


def test_forms_and_offsets_go_back_and_forth():
    boxes, priors = some_boxes(50, 3), centres(some_boxes(50, 4))
    # Additions and one exponential of a logarithm, in float64.
    torch.testing.assert_close(corners(centres(boxes)), boxes, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(decode(encode(boxes, priors), priors), boxes, rtol=1e-12, atol=1e-14)


def test_offsets_by_hand():
    """A prior of 0.2 x 0.4 at (0.5, 0.5); a box of twice its height, moved by half its width."""
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]], dtype=torch.float64)
    box = torch.tensor([[0.5, 0.1, 0.7, 0.9]], dtype=torch.float64)
    expected = torch.tensor([[0.5 / 0.1, 0.0, 0.0, math.log(2) / 0.2]], dtype=torch.float64)
    torch.testing.assert_close(encode(box, prior), expected, rtol=1e-12, atol=1e-12)


def slow_match(boxes: Tensor, labels: Tensor, priors: Tensor, threshold: float) -> tuple[list[int], list[int]]:
    """Class and object of every prior, one prior after another; object -1 for the background."""
    shares = np.array([[overlap(box, prior) for prior in corners(priors).tolist()] for box in boxes.tolist()])
    objects = [int(shares[:, p].argmax()) if shares[:, p].max() >= threshold else -1 for p in range(len(priors))]
    for g in range(len(boxes)):
        objects[int(shares[g].argmax())] = g
    return [int(labels[g]) if g >= 0 else 0 for g in objects], objects


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 7])
def test_matching_against_a_loop_over_priors(count: int, seed: int):
    priors = centres(some_boxes(80, seed))
    boxes, labels = some_boxes(count, 100 + seed), torch.arange(1, count + 1)
    classes, offsets = match(boxes, labels, priors)
    expected, objects = slow_match(boxes, labels, priors, 0.45)
    assert classes.tolist() == expected
    for p, g in enumerate(objects):
        if g >= 0:
            torch.testing.assert_close(offsets[p], encode(boxes[g], priors[p]))


def test_every_object_gets_a_prior_and_the_later_of_two_the_same_one():
    priors = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    tiny = torch.tensor([[0.10, 0.10, 0.11, 0.11], [0.80, 0.80, 0.81, 0.81], [0.20, 0.20, 0.21, 0.21]])
    classes, _ = match(tiny, torch.tensor([3, 4, 5]), priors)
    assert classes.tolist() == [5, 4]
    classes, offsets = match(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), priors)
    assert classes.tolist() == [0, 0]
    assert offsets.shape == (2, 4)


@pytest.mark.parametrize(
    ("boxes", "labels", "named"),
    [
        ([[0.1, 0.1, 0.1, 0.2]], [1], "boxes: got one whose right"),
        ([[0.1, 0.1, 0.3, 0.2]], [0], "labels: got 0"),
        ([[0.1, 0.1, 0.3, 0.2]], [1, 2], r"boxes: got shape \[1, 4\], expected \[2, 4\]"),
    ],
)
def test_objects_that_cannot_be_matched_are_named(boxes: list[list[float]], labels: list[int], named: str):
    with pytest.raises(ValueError, match=named):
        match(torch.tensor(boxes), torch.tensor(labels), prior_boxes(64, SIX))


def slow_loss(confidences: np.ndarray, locations: np.ndarray, classes: np.ndarray, offsets: np.ndarray) -> list[float]:
    class_sum = offset_sum = positives = 0.0
    for image in range(len(classes)):
        exponents = np.exp(confidences[image])
        logs = np.log(exponents / exponents.sum(axis=1, keepdims=True))
        found = [p for p in range(len(logs)) if classes[image, p] > 0]
        others = sorted((p for p in range(len(logs)) if classes[image, p] == 0), key=lambda p: logs[p, 0])
        for p in [*found, *others[: 3 * len(found)]]:
            class_sum -= logs[p, classes[image, p]]
        for p in found:
            away = np.abs(locations[image, p] - offsets[image, p])
            offset_sum += np.where(away < 1, away**2 / 2, away - 0.5).sum()
        positives += len(found)
    return [class_sum / max(positives, 1), offset_sum / max(positives, 1)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_the_loss_against_a_loop(share: float):
    generator = torch.Generator().manual_seed(5)
    confidences = torch.randn(3, 60, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    locations = torch.randn(3, 60, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(3, 60, 4, generator=generator, dtype=torch.float64) * 2
    classes = torch.randint(1, 5, (3, 60), generator=generator)
    classes[torch.rand(3, 60, generator=generator) >= share] = 0
    classes[2] = 0  # an image without objects adds nothing
    losses = multibox_loss(confidences, locations, classes, offsets)
    expected = slow_loss(*(t.detach().numpy() for t in (confidences, locations, classes, offsets)))
    # Sums of a few hundred terms in float64.
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-12)
    sum(losses).backward()
    assert not confidences.grad[2].any()
    assert bool(locations.grad[0].any()) == bool(classes[0].any())


def test_of_equal_negatives_the_earlier_ones_count():
    positive = torch.tensor([[False, True, False, False, False, False]])
    losses = torch.tensor([[1.0, 9.0, 2.0, 1.0, 1.0, 1.0]])
    assert hardest_negatives(losses, positive, 3).tolist() == [[True, False, True, True, False, False]]


def test_half_precision_results_are_summed_in_float32():
    classes = torch.ones(1, 3000, dtype=torch.int64)
    confidences = torch.zeros(1, 3000, 2, dtype=torch.bfloat16)
    losses = multibox_loss(confidences, torch.zeros(1, 3000, 4).bfloat16(), classes, torch.ones(1, 3000, 4))
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert [float(loss) for loss in losses] == pytest.approx([math.log(2), 4 * 0.5], rel=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 6, 3), (2, 6, 4), (2, 5), (2, 5, 4)],
        [(2, 6, 3), (2, 6, 4), (2, 6), (2, 5, 4)],
        [(2, 6, 3), (2, 5, 4), (2, 6), (2, 5, 4)],
        [(2, 6, 3), (2, 5, 4), (2, 6), (2, 6, 4)],
        [(2, 6, 3), (2, 6), (2, 6), (2, 6)],
    ],
)
def test_targets_that_do_not_fit_are_named(shapes: list[tuple[int, ...]]):
    confidences, locations, classes, offsets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"classes, offsets: got shapes \[2, [56]\] and \["):
        multibox_loss(confidences, locations, classes.long(), offsets)


def slow_suppress(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Every candidate against all kept ones, O(N^2), in numpy."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    kept: list[int] = []
    for i in order:
        if all(overlap(boxes[i].tolist(), boxes[k].tolist()) <= threshold for k in kept):
            kept.append(i)
    return kept


@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.0, 0.2, 0.45, 0.8, 1.0]),
    levels=st.sampled_from([1, 3, 1000]),
    most=st.sampled_from([None, 0, 1, 5]),
)
def test_suppression_against_one_box_after_another(
    count: int, seed: int, threshold: float, levels: int, most: int | None
):
    boxes = some_boxes(count, seed)
    scores = torch.randint(0, levels, (count,), generator=torch.Generator().manual_seed(seed)) / levels
    assert suppress(boxes, scores, threshold, most).tolist() == slow_suppress(boxes, scores, threshold)[:most]


@pytest.mark.parametrize("most", [None, 40])
def test_suppression_over_several_blocks(most: int | None):
    count = 2 * BLOCK + 77
    boxes, scores = some_boxes(count, 8), torch.rand(count, generator=torch.Generator().manual_seed(8))
    assert suppress(boxes, scores, 0.6, most).tolist() == slow_suppress(boxes, scores, 0.6)[:most]


def test_a_chain_of_boxes_each_over_the_next_keeps_every_other_one():
    left = torch.arange(100, dtype=torch.float64) * 0.4
    boxes = torch.stack([left, torch.zeros(100), left + 1, torch.ones(100)], dim=1)
    scores = torch.linspace(1, 0.5, 100)
    assert suppress(boxes, scores, 0.4).tolist() == list(range(0, 100, 2))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_boxes_without_scores_are_named(shape: tuple[int, int]):
    with pytest.raises(ValueError, match=r"boxes, scores: got shapes"):
        suppress(torch.zeros(shape), torch.zeros(2))


def test_detections_class_by_class():
    """Three boxes almost in one place: of a class the best is kept, another class does not see it."""
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.5, 0.51, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    shares = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.05, 0.9, 0.05], [0.992, 0.004, 0.004]])
    found = detections(shares.log()[None], torch.zeros(1, 4, 4), priors, [(10, 20)])[0]
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7], rel=1e-5)
    assert found.boxes[0].tolist() == pytest.approx([6.0, 3.1, 14.0, 7.1], rel=1e-5)
    # The second best of each class overlaps the best by 0.19 / 0.21 = 0.9 and comes back where that is allowed.
    for most, labels in ((200, [1, 1, 1, 2, 2, 2]), (1, [1, 2])):
        again = detections(shares.log()[None], torch.zeros(1, 4, 4), priors, [(1, 1)], overlap=0.97, most=most)
        assert again[0].labels.tolist() == labels


@pytest.mark.parametrize(("count", "sizes"), [(5, 1), (4, 2)])
def test_results_that_do_not_fit_the_priors_are_named(count: int, sizes: int):
    with pytest.raises(ValueError, match=r"confidences, locations: got|sizes: got 2"):
        detections(torch.zeros(1, count, 3), torch.zeros(1, count, 4), torch.zeros(4, 4), [(1, 1)] * sizes)
