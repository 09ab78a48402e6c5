"""The detection network: official names, the multiply-adds of Table 3, data flow, boxes on images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_freeze import trained
from torch import Tensor

from espkernels import freeze, models
from espkernels.__main__ import main
from espkernels.models import checkpoint
from espkernels.models.boxes import overlaps
from espkernels.models.detection import CONFIGURATIONS, Configuration
from espkernels.models.matching import match
from espkernels.models.multibox_loss import multibox_loss
from espkernels.models.priors import map_sizes

# Image size, millions of multiply-adds with 21 and 81 classes in the released configuration, with 81 in the paper's.
TABLE_3 = [
    (512, 2520.07, 3217.58, 2817.40),
    (384, 1417.56, 1809.93, 1584.82),
    (300, 913.44, 1164.62, None),
    (256, 630.09, 804.50, 704.43),
]


@pytest.fixture(autouse=True)
def one_thread(same_each_time: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""


def built(*arguments, **options) -> models.ESPNetv2Detection:
    """A network without numbers, for its names and counts."""
    with torch.device("meta"):
        return models.espnetv2_detection(*arguments, **options)


def test_multiply_adds_and_parameters():
    voc, coco = (built(2.0, classes, 512, configuration="released") for classes in (21, 81))
    paper = built(2.0, 81, 512)
    for size, *millions in TABLE_3:
        found = [round(models.count(model, (size, size)).macs / 1e6, 2) for model in (voc, coco, paper)]
        expected = [want if want is not None else have for want, have in zip(millions, found, strict=True)]
        assert found == expected, size
    parameters = [models.count(model, (64, 64)).parameters for model in (voc, coco, paper)]
    assert parameters == [4_750_878, 5_812_878, 4_812_684]


def test_names_are_the_official_ones():
    def with_norm(first: str, norm: str, act: str) -> list[str]:
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{first}.weight", *(f"{norm}.{name}" for name in names), f"{act}.weight"]

    def cbr(name: str) -> list[str]:
        return with_norm(f"{name}.cbr.0", f"{name}.cbr.1", f"{name}.cbr.2")

    classification = [n for n in models.espnetv2(0.5, 3).state_dict() if not n.startswith("classifier.")]
    assert len(classification) == 485
    expected = [f"base_net.basenet.{name}" for name in classification]
    for level in (6, 7):
        expected += cbr(f"base_net.extra_level{level}.layer.0") + cbr(f"base_net.extra_level{level}.layer.1")
    expected.append("base_net.extra_level8.1.weight")
    for name, stages in (("3x3_5x5", 2), ("5x5_10x10", 3), ("10x10_19x19", 4), ("19x19_38x38", 4)):
        block = f"base_net.bu_{name}"
        expected += cbr(f"{block}.projection_layer") + cbr(f"{block}.merge_layer.2")
        expected += [f"{block}.stages.{i}.weight" for i in range(stages)] + [f"{block}.merge_layer.3.weight"]
        for inner in ("merge_layer.0", "br"):
            expected += with_norm("", f"{block}.{inner}.br.0", f"{block}.{inner}.br.1")[1:]
    for head in ("loc_layers", "cls_layers"):
        expected += [f"{head}.{i}.{kind}" for i in range(6) for kind in ("weight", "bias")]
    state = built(2.0, 21, 300, configuration="released").state_dict()
    assert len(state) == 659
    assert set(state) == set(expected)
    assert state["base_net.bu_5x5_10x10.projection_layer.cbr.0.weight"].shape == (256, 1792, 1, 1)
    assert state["base_net.bu_19x19_38x38.projection_layer.cbr.0.weight"].shape == (51, 768, 1, 1)
    assert [state[f"cls_layers.{i}.weight"].shape[:2] for i in range(6)] == [
        (126, channels) for channels in (256, 512, 1280, 512, 256, 128)
    ]
    without = {name for name in expected if not name.startswith("base_net.basenet.level5.4.")}
    assert set(built(2.0, 21, 300).state_dict()) == without


@pytest.mark.parametrize("size", [300, 97, 33])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_there_is_a_prior_for_every_result(configuration: str, size: int):
    model = models.espnetv2_detection(0.5, 4, size, configuration=configuration).eval()
    with torch.no_grad():
        maps = model.base_net(torch.zeros(2, 3, size, size))
        confidences, locations = model(torch.zeros(2, 3, size, size))
    assert tuple(map_.shape[2] for map_ in maps) == tuple(map_.shape[3] for map_ in maps) == map_sizes(size)
    assert model.priors.shape == locations.shape[1:]
    assert confidences.shape == (2, len(model.priors), 4)


def test_the_image_reaches_level_5_and_the_shortcut_learns():
    model = models.espnetv2_detection(0.5, 3, 64).train()
    confidences, locations = model(torch.randn(2, 3, 64, 64))
    (confidences.square().mean() + locations.square().mean()).backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None}
    assert dead == {f"base_net.basenet.level{i}_0.eesp.module_act.weight" for i in (2, 3, 4, 5)}


def test_the_maps_against_their_definition():
    """Each join sees the coarser map, enlarged, in its first channels and the finer one after it."""
    net = trained(models.espnetv2_detection(0.5, 3, 96, configuration="released")).double().eval().base_net
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        level3, level4, level5 = net.basenet(x)[2:]
        level6 = net.extra_level6.layer(level5)
        level7 = net.extra_level7.layer(level6)
        level8 = net.extra_level8[1](level7.mean(dim=(2, 3), keepdim=True)).clamp(min=0)
        expected = [level7, level8]
        for join, fine in (
            ("3x3_5x5", level6),
            ("5x5_10x10", level5),
            ("10x10_19x19", level4),
            ("19x19_38x38", level3),
        ):
            large = torch.nn.functional.interpolate(expected[0], fine.shape[2:], mode="bilinear", align_corners=True)
            expected.insert(0, getattr(net, f"bu_{join}")(torch.cat([large, fine], dim=1)))
        for found, want in zip(net(x), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_results_lie_in_the_order_of_the_priors():
    """Heads that answer with the number of their map, pixel and box: no weight has any part in it."""
    model = models.espnetv2_detection(0.5, 2, 64, configuration="released").eval()
    model.base_net = torch.nn.Identity()
    maps, expected = [], []
    for index, (side, channels) in enumerate(zip(map_sizes(64), (64, 128, 1024, 512, 256, 128), strict=True)):
        pixels = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
        maps.append(torch.cat([pixels, torch.zeros(1, channels - 1, side, side)], dim=1))
        for head, numbers in ((model.loc_layers[index], 4), (model.cls_layers[index], 2)):
            torch.nn.init.zeros_(head.weight)
            head.weight.data[:, 0] = 100.0
            head.bias.data = torch.arange(6 * numbers, dtype=torch.float32) + 10_000 * index
        expected += [(index, pixel, box) for pixel in range(side * side) for box in range(6)]
    with torch.no_grad():
        confidences, locations = model(maps)
    for numbers, found in ((4, locations), (2, confidences)):
        rows = [[10_000 * i + 100 * p + b * numbers + n for n in range(numbers)] for i, p, b in expected]
        assert found[0].tolist() == rows


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_plain_fused_and_frozen_networks_agree(configuration: str):
    model = trained(models.espnetv2_detection(0.5, 5, 96, configuration=configuration)).double().eval()
    plain = models.espnetv2_detection(0.5, 5, 96, configuration=configuration, plain=True).eval().double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)
        for network in (model, freeze(model)):
            for found, want in zip(network(x), expected, strict=True):
                # A hundred layers in float64, each adding at most a few thousand products: far below 1e-9.
                torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_boxes_come_in_pixels_of_the_photograph():
    """One prior of one class is certain and has no offset: its box, scaled, is all that is found."""
    model = models.espnetv2_detection(0.5, 4, 64).eval()
    number, label = 137, 2
    confidences = torch.zeros(2, len(model.priors), 4)
    confidences[..., 0] = 20.0
    confidences[1, number] = torch.tensor([0.0, 0.0, 20.0, 0.0])
    model.forward = lambda image: (confidences, torch.zeros(2, len(model.priors), 4))
    nothing, one = model.detect(torch.zeros(2, 3, 64, 64), [(480, 640), (200, 100)])
    assert (len(nothing), nothing.boxes.shape, nothing.labels.dtype) == (0, (0, 4), torch.int64)
    x, y, width, height = model.priors[number].double().tolist()
    corners = [100 * (x - width / 2), 200 * (y - height / 2), 100 * (x + width / 2), 200 * (y + height / 2)]
    assert one.labels.tolist() == [label]
    assert one.boxes[0].tolist() == pytest.approx(corners, rel=1e-5)
    assert one.scores.item() == pytest.approx(math.exp(20) / (math.exp(20) + 3), rel=1e-6)


def test_a_batch_finds_what_single_images_do_and_a_frozen_network_the_same():
    model = trained(models.espnetv2_detection(0.5, 6, 64)).double().eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    together = model.detect(x, least_score=0.2)
    assert all(len(found) for found in together)
    one_by_one = [model.detect(x[i : i + 1], least_score=0.2)[0] for i in range(3)]
    for alone in (one_by_one, freeze(model).detect(x, least_score=0.2)):
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.labels, other.labels)
            # Scores and boxes are float32, of results that agree in float64.
            torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-7)


def test_six_pictures_of_squares_are_learnt():
    """The whole way round: priors, matching, loss, gradients through every layer, decoding, suppression."""
    images, boxes, labels = torch.randn(6, 3, 64, 64) * 0.1, [], []
    for index, image in enumerate(images):
        side = int(torch.randint(16, 40, ()))
        x, y = (int(torch.randint(0, 64 - side, ())) for _ in range(2))
        image[index % 3, y : y + side, x : x + side] += 2
        boxes.append(torch.tensor([[x, y, x + side, y + side]]) / 64)
        labels.append(torch.tensor([index % 3 + 1]))
    model = models.espnetv2_detection(0.5, 4, 64).train()
    targets = [match(*objects, model.priors) for objects in zip(boxes, labels, strict=True)]
    classes, offsets = (torch.stack(part) for part in zip(*targets, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(multibox_loss(*model(images), classes, offsets)).backward()
        optimizer.step()
    # In training mode, whose batch statistics are those learnt with; running ones would want more steps.
    for found, box, label in zip(model.detect(images), boxes, labels, strict=True):
        best = found.scores.argmax()
        assert found.labels[best] == label
        assert overlaps(found.boxes[best : best + 1], box * 64).item() > 0.8


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_checkpoint_says_which_network_it_is_from(tmp_path: Path, name: str):
    source = trained(models.espnetv2_detection(0.5, 7, 300, configuration=name, in_channels=4))
    torch.save({f"module.{key}": tensor for key, tensor in source.state_dict().items()}, tmp_path / "ssd.pth")
    target = models.espnetv2_detection(0.5, 7, 512, configuration=name, in_channels=4)
    report = models.load_official(target, tmp_path / "ssd.pth")
    assert (report.loaded, report.stripped) == (len(source.state_dict()), True)
    assert report.network == "ESPNetv2 for detection (s = 0.5, 7 classes)"
    found = models.from_official(tmp_path / "ssd.pth", image_size=300)
    assert (found.image_size, found.num_classes, found.ratios) == (300, 7, CONFIGURATIONS[name].ratios)
    for model in (target, found):
        state = model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in source.state_dict().items())


def test_classification_weights_start_a_detection_network(tmp_path: Path):
    source, target = models.espnetv2(0.5, 10), models.espnetv2_detection(0.5, 3, 64, configuration="released")
    torch.save(source.state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match=r"ESPNetv2 for detection from classification weights, pass backbone=True"):
        models.load_official(target, tmp_path / "imagenet.pth")
    report = models.load_official(target, tmp_path / "imagenet.pth", backbone=True)
    assert (report.loaded, report.left_out) == (485, ("classifier.weight", "classifier.bias"))
    assert torch.equal(target.base_net.basenet.level5[4].conv.weight, source.level5[4].conv.weight)


def test_commands_know_a_detection_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = tmp_path / "ssd.pth"
    torch.save(models.espnetv2_detection(0.5, 3, 64).state_dict(), weights)
    (tmp_path / "photo.png").touch()
    assert main(["segment", str(tmp_path / "photo.png"), "--weights", str(weights), "-o", str(tmp_path / "o.png")]) == 2
    assert "is of an ESPNetv2Detection, expected a checkpoint for segmentation" in capsys.readouterr().err
    assert main(["explain", "--segmentation", "--weights", str(weights)]) == 2
    assert "is no checkpoint for segmentation" in capsys.readouterr().err


def test_incomplete_detection_checkpoints_are_not_known():
    state = models.espnetv2_detection(0.5, 3, 64).state_dict()
    del state["loc_layers.3.bias"]
    assert not checkpoint.identify(state).known


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_classes": 1}, "num_classes: got 1"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"scale": -1.0}, "scale: got -1.0"),
        ({"configuration": "code"}, "configuration: got 'code', expected 'paper', 'released'"),
        ({"configuration": Configuration(True, ((2.0,),))}, "ratios: got 1 tuples, expected 6"),
    ],
)
def test_bad_arguments_are_named(arguments, named: str):
    with pytest.raises(ValueError, match=named):
        models.espnetv2_detection(**{"scale": 0.5, "num_classes": 3, "image_size": 64, **arguments})


@pytest.mark.parametrize("shape", [(1, 3, 64, 65), (3, 64, 64)])
def test_an_image_of_another_size_has_no_priors(shape: tuple[int, ...]):
    model = models.espnetv2_detection(0.5, 3, 64)
    with pytest.raises(ValueError, match=r"image: got shape .*, expected \[B, C, 64, 64\]"):
        model.detect(Tensor(*shape))
