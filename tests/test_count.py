"""Parameters and multiply-adds against the paper's tables and the official networks' exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from espkernels import backends, models
from espkernels.freeze import freeze
from espkernels.models import count
from espkernels.models.pyramid_pooling import EfficientPyramidPooling
from espkernels.nn import CBR, EESP, DownSampler

# Scale, channels, parameters, multiply-adds in millions at 224x224; then the paper's figures (Table 2, Fig. 3).
TABLE_2 = [
    (0.5, (16, 32, 64, 128, 256, 1024), 1_241_332, 28.376, 1.24, 28),
    (1.0, (32, 64, 128, 256, 512, 1024), 1_670_072, 85.720, 1.67, 86),
    (1.25, (32, 80, 160, 320, 640, 1024), 1_965_440, 123.399, 1.97, 123),
    (1.5, (32, 96, 192, 384, 768, 1024), 2_314_856, 168.605, 2.31, 169),
    (1.75, (32, 112, 224, 448, 896, 1280), 3_032_432, 224.147, 3.03, 224),
    (2.0, (32, 128, 256, 512, 1024, 1280), 3_498_136, 284.806, 3.49, 284),
    (3.0, (32, 192, 384, 768, 1536, 1280), 5_901_432, 602.709, 5.9, 602),
]

# Multiply-adds and parameters of every stage; those of a level's units are the same.
STAGES = {
    1.0: {
        "level1": (10_838_016, 960),
        "level2_0": (3_364_928, 1_298),
        "level3_0": (2_421_776, 3_146),
        "level3.[0-2]": (4_917_248, 7_136),
        "level4_0": (1_997_828, 8_762),
        "level4.[0-6]": (4_465_664, 24_512),
        "level5_0": (1_718_528, 27_674),
        "level5.[0-2]": (4_239_872, 89_984),
        "level5.3": (225_792, 6_144),
        "level5.4": (6_422_528, 134_144),
        "classifier": (0, 1_025_000),
    },
    2.0: {
        "level1": (10_838_016, 960),
        "level2_0": (13_801_536, 4_866),
        "level3_0": (7_991_312, 8_762),
        "level3.[0-2]": (17_862_656, 24_512),
        "level4_0": (7_191_044, 27_674),
        "level4.[0-6]": (16_959_488, 89_984),
        "level5_0": (6_648_320, 96_218),
        "level5.[0-2]": (16_507_904, 343_808),
        "level5.3": (451_584, 12_288),
        "level5.4": (16_056_320, 331_520),
        "classifier": (0, 1_281_000),
    },
}

# Scale, parameters with 20 and 21 classes, millions of multiply-adds: 20 classes at 512x1024 (height x width) and
# 256x512, 21 classes at 384x384 and 256x256; parameters of levels 1 to 4.
SEGMENTATION = [
    (0.5, 80_342, 80_353, 596.25, 149.07, 168.07, 74.70, 62_354),
    (1.0, 234_010, 234_021, 1085.28, 271.33, 305.62, 135.84, 207_158),
    (1.25, 343_106, 343_117, 1408.97, 352.26, 396.66, 176.30, 310_638),
    (1.5, 468_362, 468_373, 1713.26, 428.33, 482.24, 214.34, 434_886),
    (1.75, 621_298, 621_309, 2219.92, 555.00, 624.74, 277.68, 579_902),
    (2.0, 789_242, 789_253, 2697.74, 674.46, 759.13, 337.41, 745_686),
]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""
    torch.set_num_threads(1)


def unit_of_last_digit(printed: float) -> float:
    text = repr(printed)
    return 10.0 ** -len(text.partition(".")[2]) if "." in text else 1.0


@pytest.mark.parametrize("row", TABLE_2, ids=[f"s={row[0]}" for row in TABLE_2])
def test_classification(row):
    scale, channels, parameters, millions, paper_parameters, paper_millions = row
    network = models.espnetv2(scale)
    result = count(network, (224, 224))
    assert result.parameters == parameters
    assert round(result.macs / 1e6, 3) == millions
    # The paper truncates some and rounds others, so it may be off by less than one unit of its last digit.
    assert abs(result.parameters / 1e6 - paper_parameters) < unit_of_last_digit(paper_parameters)
    assert abs(result.macs / 1e6 - paper_millions) < unit_of_last_digit(paper_millions)
    levels = [
        network.level1.act,
        network.level2_0.act,
        network.level3_0.act,
        network.level4_0.act,
        network.level5_0.act,
    ]
    assert (*(act.num_parameters for act in levels), network.classifier.in_features) == channels
    if scale in STAGES:
        for name, stage in STAGES[scale].items():
            stem, _, units = name.partition("[")
            names = [name] if not units else [f"{stem}{i}" for i in range(int(units[0]), int(units[2]) + 1)]
            for single in names:
                found = result.by_module[single]
                assert (found.macs, found.parameters) == stage, single


@pytest.mark.parametrize("row", SEGMENTATION, ids=[f"s={row[0]}" for row in SEGMENTATION])
def test_segmentation(row):
    scale, parameters_20, parameters_21, *millions, backbone = row
    city, voc = models.espnetv2_segmentation(scale, 20), models.espnetv2_segmentation(scale, 21)
    counts = [count(city, (512, 1024)), count(city, (256, 512)), count(voc, (384, 384)), count(voc, (256, 256))]
    assert [c.parameters for c in counts] == [parameters_20, parameters_20, parameters_21, parameters_21]
    assert [round(c.macs / 1e6, 2) for c in counts] == millions
    assert counts[0].by_module["base_net"].parameters == backbone


def test_segmentation_with_19_classes():
    result = count(models.espnetv2_segmentation(2.0, 19), (512, 1024))
    assert (result.parameters, round(result.macs / 1e6, 2)) == (787_968, 2665.43)


def test_table_6_rows_without_shortcut_and_without_fusion():
    without = count(models.espnetv2(1.0, long_range_shortcut=False, hff=False), (224, 224))
    assert (without.parameters, round(without.macs / 1e6, 3)) == (1_664_912, 84.333)
    with_shortcut = count(models.espnetv2(1.0, hff=False), (224, 224))
    assert (with_shortcut.parameters, round(with_shortcut.macs / 1e6, 3)) == (1_670_072, 85.720)


def test_table_5_row_without_dilation():
    result = count(models.espnetv2(1.25, dilated=False), (224, 224))
    assert (result.parameters, round(result.macs / 1e6, 3)) == (1_965_440, 123.399)


def test_plain_layers_count_the_same():
    ours, theirs = (count(models.espnetv2(0.5, plain=flag), (224, 160)) for flag in (False, True))
    assert (ours.parameters, ours.macs) == (theirs.parameters, theirs.macs)


@pytest.mark.parametrize(("m", "n", "stride", "size"), [(240, 240, 1, (14, 14)), (32, 96, 2, (9, 12))])
def test_one_unit_against_the_closed_form(m: int, n: int, stride: int, size: tuple[int, int]):
    result = count(EESP(m, n, stride), size, in_channels=m)
    pixels, after = math.prod(size), math.prod((side - 1) // stride + 1 for side in size)
    assert result.macs == pixels * m * n // 16 + after * (9 * n + n * n // 4)
    assert result.parameters == m * n // 16 + 9 * n + n * n // 4 + 27 * n // 4


def test_ordinary_convolutions_and_what_is_left_out():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=True),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, (3, 1), groups=4, dilation=2),
        nn.ConvTranspose2d(8, 5, 2, stride=2),
        nn.PReLU(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 7),
    )
    result = count(network, (21, 31))
    first, second, transposed = 10 * 15 * 8 * 3 * 9, 6 * 15 * 8 * 2 * 3, 6 * 15 * 8 * 5 * 4
    assert result.macs == first + second + transposed
    assert [result.by_module[str(i)].macs for i in range(8)] == [first, 0, second, transposed, 0, 0, 0, 0]
    assert result.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.skipif(backends.library is None, reason="the operators are not built")
def test_operators_called_directly_count_as_their_convolutions():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pyramid", torch.zeros(4, 6, 3, 3))
            self.register_buffer("merge", torch.zeros(24, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            operators = torch.ops.espkernels
            one = operators.spatial_pyramid(x, self.pyramid, [1, 2, 3, 4], 2, True)
            one = operators.group_pointwise(one, self.merge, 4, None, None, None, None)
            nothing = [None] * 7
            two = operators.pyramid_pointwise(x, self.pyramid, [1, 2, 3, 4], self.merge, 4, *nothing, 2, True)
            return one + two

    branches, merge = 5 * 6 * 24 * 9, 5 * 6 * 24 * 6
    assert count(Direct(), (10, 11), in_channels=6).macs == 2 * (branches + merge)


def test_a_frozen_network_counts_the_same_multiply_adds():
    for network in (models.espnetv2(0.5, 10), models.espnetv2_segmentation(0.5, 20)):
        assert count(freeze(network.eval()), (65, 96)).macs == count(network, (65, 96)).macs


class OwnWeight(nn.Module):
    """A convolution that is no nn.Conv2d, in front of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 5, 3, 3))
        self.next = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.next(nn.functional.conv2d(x, self.weight))


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (OwnWeight, 5),
        (lambda: EESP(64, 64), 64),
        (lambda: EESP(32, 96, 2), 32),
        (lambda: DownSampler(16, 32), 16),
        (lambda: CBR(8, 16, 1, groups=4), 8),
        (lambda: CBR(8, 16, 3, groups=8), 8),
        (lambda: EfficientPyramidPooling(16, 4, 8), 16),
        (lambda: nn.ConvTranspose2d(6, 4, 2, groups=2), 6),
    ],
)
def test_the_first_convolution_says_the_channels_of_the_image(build: Callable[[], nn.Module], channels: int):
    model = build().eval()
    expected = count(model, sample=torch.zeros(1, channels, 8, 8)).macs
    assert expected > 0
    assert [count(each, (8, 8)).macs for each in (model, freeze(model))] == [expected, expected]


def test_the_model_is_left_as_it_was():
    network = models.espnetv2(0.5, 4).train()
    network.level3.eval()
    flags = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
    count(network, (64, 64))
    assert [module.training for module in network.modules()] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()] == hooks
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in network.parameters())
    assert network(torch.zeros(1, 3, 64, 64)).device.type == "cpu"
    assert backends.current() != "reference"


def test_no_memory_is_needed_for_huge_images_and_none_for_the_model():
    with torch.device("meta"):
        network = models.espnetv2_segmentation(0.5, 20)
    # Maps of this image would take petabytes.
    assert count(network, (2**22, 2**22)).macs > 2**44 * 1000


def test_a_model_of_something_else_than_images_is_counted_on_a_sample():
    network = nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(5, 4, 3, groups=1), nn.Linear(4, 2))
    found = count(network, sample=torch.zeros(7, 5, dtype=torch.int64))
    assert (found.macs, found.parameters) == (7 * 4 * 4 * 5 * 3, 9 * 6 + 4 * 5 * 3 + 4 + 4 * 2 + 2)
    for options in ({}, {"size": (5, 5), "sample": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"size: got .* sample, expected either of them"):
            count(network, **options)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,)])
def test_a_bad_size_is_named(size):
    with pytest.raises(ValueError, match=r"size: got"):
        count(nn.Conv2d(3, 3, 1), size)
