"""Scores and loss of several labels an image, against numpy that counts label by label."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from espkernels import models
from espkernels.models.multilabel import MultiLabelCounter, MultiLabelScores, multilabel_loss


def batch(images: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, classes, generator=generator), torch.rand(images, classes, generator=generator) < 0.1


def slow_scores(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """Precision, recall and F1 as their textbook definitions, one class and one image at a time."""

    def three(right: int, given: int, wanted: int) -> tuple[float, float, float]:
        precision, recall = right / given if given else 0.0, right / wanted if wanted else 0.0
        return precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0

    counts = []
    for label in range(logits.shape[1]):
        given = {i for i in range(len(logits)) if 1 / (1 + math.exp(-logits[i, label])) > 0.5}
        wanted = {i for i in range(len(logits)) if targets[i, label]}
        counts.append((len(given & wanted), len(given), len(wanted)))
    of_classes = [three(*count) for count in counts]
    return [sum(column) / len(counts) for column in zip(*of_classes, strict=True)] + list(
        three(*(sum(column) for column in zip(*counts, strict=True)))
    )


@pytest.mark.parametrize(("images", "classes"), [(200, 80), (3, 80), (1, 1)])
def test_scores_against_a_count_of_every_label(images: int, classes: int):
    logits, targets = batch(images, classes, seed=images)
    counter = MultiLabelCounter(classes)
    for start in range(0, images, 64):
        counter.add(logits[start : start + 64], targets[start : start + 64].float())
    found = counter.scores()
    # Quotients of whole numbers and means of at most 80 of them, in float64.
    assert list(vars(found).values()) == pytest.approx(slow_scores(logits.numpy(), targets.numpy()), rel=1e-12)


def test_scores_by_hand():
    """Three classes: two of three right with one too many; never given; never wanted nor given."""
    counter = MultiLabelCounter(3)
    logits = torch.tensor([[1.0, -1, -1], [1, -1, -1], [1, -1, -1], [-1, -1, -1]])
    counter.add(logits, torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]))
    assert counter.counts.tolist() == [[2, 0, 0], [1, 0, 0], [1, 2, 0]]
    assert counter.scores() == MultiLabelScores(
        *(pytest.approx(2 / 3 / 3) for _ in range(3)), pytest.approx(2 / 3), pytest.approx(2 / 5), pytest.approx(1 / 2)
    )


def test_nothing_counted_scores_nothing():
    assert MultiLabelCounter(4).scores() == MultiLabelScores(0, 0, 0, 0, 0, 0)


def test_the_module_is_there_without_an_import_of_its_own():
    program = "import espkernels; espkernels.models.multilabel.multilabel_loss"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_loss_is_the_sum_over_labels_of_the_mean_over_images():
    logits, targets = batch(7, 80, seed=1)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    expected = -np.where(targets.numpy(), np.log(p), np.log(1 - p)).sum(axis=1).mean()
    # Logarithms and a sum of 560 terms in float32, each off by a few units in the last place.
    assert multilabel_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_reaches_the_output_of_every_label():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = models.espnetv2(0.5, 80)
    multilabel_loss(network(torch.zeros(2, 3, 32, 32)), torch.ones(2, 80)).backward()
    # A logit of 0 and a target of 1: the derivative of every bias is -1/2.
    assert network.classifier.bias.grad.tolist() == pytest.approx([-0.5] * 80, abs=0.05)


def test_shapes_that_do_not_fit_are_named():
    counter = MultiLabelCounter(5)
    with pytest.raises(ValueError, match=r"targets: got shape \[2, 4\] with logits \[2, 5\]"):
        counter.add(torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"logits: got 4 labels, expected 5"):
        counter.add(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"targets: got shape \[5\]"):
        multilabel_loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"num_classes: got 0"):
        MultiLabelCounter(0)
