"""Detection's data, augmentation and score, and a detector that learns from squares and discs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from plain_layers import assert_same_way

from espkernels.__main__ import main
from espkernels.models.average_precision import COCO_THRESHOLDS, AveragePrecision
from espkernels.models.classes import VOC
from espkernels.models.data.objects import Scene
from espkernels.models.data.ssd_augmentation import augmented
from espkernels.models.data.voc import voc_detection
from espkernels.models.detections import Detections
from espkernels.models.recipes import detection, engine
from espkernels.models.recipes.detection import Detection
from espkernels.models.recipes.start import load_start

SIZE = 128
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>
<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def write_voc(root: Path, part: str, count: int, seed: int) -> None:
    """Red squares ("bird") and blue discs ("car") of 30 to 60 pixels on noise."""
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{part}{i}" for i in range(count)]
    (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
    for name in names:
        image, objects = Image.new("RGB", (SIZE, SIZE), (128, 128, 128)), []
        for kind in rng.permutation(["bird", "car"])[: rng.integers(1, 3)]:
            side = int(rng.integers(30, 60))
            x, y = (int(v) for v in rng.integers(0, SIZE - side, 2))
            draw = ImageDraw.Draw(image)
            if kind == "bird":
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=(210, 40, 30))
            else:
                draw.ellipse((x, y, x + side - 1, y + side - 1), fill=(30, 60, 220))
            objects.append(OBJECT.format(x + 1, y + 1, x + side, y + side, name=kind, difficult=0))
        noisy = np.clip(np.asarray(image) + rng.normal(0, 12, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("VOCdevkit")
    write_voc(root / "VOC2007", "trainval", 96, 0)
    write_voc(root / "VOC2007", "test", 16, 1)
    return root


def test_voc_layout(voc: Path, tmp_path: Path) -> None:
    scenes = voc_detection(voc / "VOC2007", ["test"])
    assert len(scenes) == 16 and {int(label) for scene in scenes for label in scene.labels} == {
        VOC.names.index("bird"), VOC.names.index("car"),
    }  # fmt: skip
    for scene in scenes:
        red = np.asarray(Image.open(scene.file).convert("RGB")).astype(int)
        for box in scene.boxes[scene.labels == VOC.names.index("bird")].int().tolist():
            left, top, right, bottom = box
            middle = red[(top + bottom) // 2, (left + right) // 2]
            assert right - left >= 30 and abs(int(middle[0]) - int(middle[2])) > 60
    write_voc(tmp_path, "trainval", 1, 2)
    annotation = tmp_path / "Annotations" / "trainval0.xml"
    annotation.write_text("<annotation>" + OBJECT.format(3, 4, 10, 20, name="cat", difficult=1) + "</annotation>")
    (scene,) = voc_detection(tmp_path, ["trainval"])
    assert scene.boxes.tolist() == [[2, 3, 10, 20]] and scene.difficult.tolist() == [True]
    annotation.write_text("<annotation>" + OBJECT.format(3, 4, 10, 20, name="fox", difficult=1) + "</annotation>")
    with pytest.raises(ValueError, match=r"trainval0\.xml is no annotation of PASCAL VOC: .*not in tuple"):
        voc_detection(tmp_path, ["trainval"])
    annotation.write_text("<annotation>")
    with pytest.raises(ValueError, match=r"trainval0\.xml is no annotation"):
        voc_detection(tmp_path, ["trainval"])
    annotation.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*trainval0\.xml, which .*trainval\.txt lists"):
        voc_detection(tmp_path, ["trainval"])


def test_boxes_stay_on_their_objects() -> None:
    # A bright square on black: whatever is done to the image, its pixels fill the box and lie nowhere else.
    image = Image.new("RGB", (120, 90), (0, 0, 0))
    ImageDraw.Draw(image).rectangle((30, 20, 69, 59), fill=(250, 250, 250))
    boxes = torch.tensor([[30 / 120, 20 / 90, 70 / 120, 60 / 90]])
    kinds = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        found, moved, labels = augmented(image, boxes, torch.tensor([3]), generator)
        assert labels.tolist() == [3] and moved.min() >= 0 and moved.max() <= 1
        pixels = np.asarray(found.convert("L")).astype(int)
        height, width = pixels.shape
        left, top, right, bottom = (moved[0] * torch.tensor([width, height, width, height])).tolist()
        inside = pixels[int(top) + 2 : int(bottom) - 2, int(left) + 2 : int(right) - 2]
        assert inside.size > 0 and inside.min() > 110  # contrast and brightness halve it at most
        outside = pixels.copy()
        outside[max(int(top) - 2, 0) : int(bottom) + 3, max(int(left) - 2, 0) : int(right) + 3] = 0
        # A canvas of ImageNet's mean is at most 124 where its colours are not changed: they change before it is laid.
        assert outside.max() <= 125
        kinds.add(((width, height) == (120, 90), width > 120))
        again = augmented(image, boxes, torch.tensor([3]), torch.Generator().manual_seed(seed))
        assert torch.equal(again[1], moved) and np.array_equal(np.asarray(again[0]), np.asarray(found))
    assert len(kinds) == 3  # as it was, a part, a larger canvas


def by_hand(found: list[Any], true: list[Any], threshold: float, rule: str) -> float:
    """Average precision of one class as VOC's development kit computes it, in plain Python."""

    def overlap(a: list[float], b: list[float]) -> float:
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    objects = sum(not difficult for _, _, difficult in true)
    taken: set[int] = set()
    right, wrong, curve = 0, 0, []
    for image, _, box in sorted(found, key=lambda one: -one[1]):
        candidates = [(overlap(box, b), i) for i, (im, b, _) in enumerate(true) if im == image]
        best, i = max(candidates, default=(0.0, -1))
        if best >= threshold and true[i][2]:
            continue
        if best >= threshold and i not in taken:
            taken.add(i)
            right += 1
        else:
            wrong += 1
        curve.append((right / objects, right / (right + wrong)))
    if rule == "eleven":
        return sum(max((p for r, p in curve if r >= t / 10 - 1e-12), default=0.0) for t in range(11)) / 11
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[i:])
        before = recall
    return area


@pytest.mark.parametrize("rule", ["eleven", "area"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_average_precision_beside_plain_python(rule: str, threshold: float) -> None:
    rng = np.random.default_rng(5)
    counter = AveragePrecision(2, [threshold], rule)
    found: dict[int, list[Any]] = {1: [], 2: []}
    true: dict[int, list[Any]] = {1: [], 2: []}
    for image in range(12):
        corners = rng.uniform(0, 60, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, (6, 2))], axis=1)
        labels, difficult = rng.integers(1, 3, 6), rng.random(6) < 0.2
        guessed = np.concatenate([boxes + rng.normal(0, 4, boxes.shape), boxes[::-1] + 3])
        guessed[:, 2:] = np.maximum(guessed[:, 2:], guessed[:, :2] + 1)
        guesses = np.concatenate([labels, rng.integers(1, 3, 6)])
        scores = rng.random(12)
        for box, label, hard in zip(boxes, labels, difficult, strict=True):
            true[int(label)].append((image, box.tolist(), bool(hard)))
        for box, label, score in zip(guessed, guesses, scores, strict=True):
            found[int(label)].append((image, float(score), box.tolist()))
        counter.add(
            Detections(torch.from_numpy(guessed), torch.from_numpy(scores), torch.from_numpy(guesses)),
            torch.from_numpy(boxes),
            torch.from_numpy(labels),
            torch.from_numpy(difficult),
        )
    expected = [by_hand(found[label], true[label], threshold, rule) for label in (1, 2)]
    assert counter.averages()[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert counter.mean() == pytest.approx(sum(expected) / 2)
    assert 0.1 < counter.mean() < 0.95


def test_coco_rule_in_closed_form() -> None:
    # Two objects, three detections: right, wrong, right. Precision 1 up to recall 1/2, then 2/3: 51 and 50 of 101.
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    found = Detections(
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]), torch.tensor([0.9, 0.8, 0.7]),
        torch.ones(3, dtype=torch.int64),
    )  # fmt: skip
    counter = AveragePrecision(1, COCO_THRESHOLDS, "coco")
    counter.add(found, boxes, torch.ones(2, dtype=torch.int64))
    assert counter.mean() == pytest.approx((51 + 50 * 2 / 3) / 101)
    # A box that overlaps two objects takes the one that is left; VOC's rule calls it wrong.
    twice = Detections(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 1]))
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14]])
    for rule, expected in (("coco", 1.0), ("area", 0.5)):
        counter = AveragePrecision(1, [0.5], rule)
        counter.add(twice, near, torch.ones(2, dtype=torch.int64))
        assert counter.mean() == pytest.approx(expected)
    assert AveragePrecision(3).mean() == 0
    with pytest.raises(ValueError, match="rule: got 'mean'"):
        AveragePrecision(1, rule="mean")


def test_crowds_of_coco() -> None:
    ones = torch.ones(2, dtype=torch.int64)
    crowd, easy = torch.tensor([[0.0, 0, 200, 200], [300, 300, 320, 320]]), torch.tensor([True, False])
    found = Detections(torch.tensor([[10.0, 10, 30, 30], [300, 300, 320, 320]]), torch.tensor([0.9, 0.8]), ones)
    # Inside a crowd of a hundred times its area: neither right nor wrong. Outside of it, or by VOC's rule, wrong.
    for rule, boxes, expected in (("coco", crowd, 1.0), ("coco", crowd + 31, 0.5), ("area", crowd, 0.5)):
        counter = AveragePrecision(1, [0.5], rule)
        there = torch.cat([boxes[:1], crowd[1:]])
        counter.add(found, there, ones, easy)
        assert counter.mean() == pytest.approx(expected), rule
    # An object that counts is taken before one that does not, though that one fits better.
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    counter = AveragePrecision(1, [0.5], "coco")
    counter.add(Detections(near[1:], torch.tensor([0.9]), ones[:1]), near, ones, torch.tensor([False, True]))
    assert counter.mean() == pytest.approx(1.0)


def test_coco_counts_the_best_hundred_of_an_image() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    for wrong, expected in ((99, 1 / 100), (100, 0.0)):
        found = torch.cat([torch.full((wrong, 4), 50.0) + torch.tensor([0.0, 0, 9, 9]), boxes])
        counter = AveragePrecision(1, [0.5], "coco")
        labels = torch.ones(wrong + 1, dtype=torch.int64)
        counter.add(Detections(found, torch.linspace(1, 0.5, wrong + 1), labels), boxes, torch.tensor([1]))
        assert counter.mean() == pytest.approx(expected)


def test_the_score_and_the_descent_of_voc(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Detection("voc", "none", labels=["a", "b"])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    scene = Scene(Path("x"), boxes, torch.ones(3).long(), torch.tensor([False, False, True]))
    task.__dict__["validation"] = SimpleNamespace(scenes=[scene])
    batches = [(torch.zeros(1, 3, 4, 4), torch.tensor([[60, 60]]), torch.tensor([0]))]
    monkeypatch.setattr(detection, "evaluation_batches", lambda *_: batches)
    network: Any = SimpleNamespace(
        detect=lambda x, sizes: [Detections(boxes[:1], torch.tensor([0.9]), torch.tensor([1]))]
    )
    # One of two objects that count: precision 1 at recalls 0 to 0.5, six of eleven.
    assert task.evaluate(network, torch.device("cpu"))["map"] == pytest.approx(600 / 11)
    (group,) = task.optimizer(torch.nn.Linear(1, 1), 0.1).param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_plain_layers_go_the_same_way(voc: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(scale=0.5, image_size=64, batch=48, rate=0.004, workers=0)
    assert_same_way(lambda plain: Detection("voc", str(voc), plain=plain, **options), tmp_path, 1e-3)


@pytest.mark.slow
def test_squares_and_discs_are_found(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Detection("voc", str(voc), scale=0.5, image_size=SIZE, batch=16, rate=0.004, workers=0)
    rows = engine.train(task, tmp_path / "run", engine.Settings(10))
    # Twenty classes, of which two occur; boxes at random places would score next to nothing.
    assert max(row["map"] for row in rows) > 40
    photograph = voc / "VOC2007" / "JPEGImages" / "test0.jpg"
    output = tmp_path / "found.png"
    arguments = ["detect", str(photograph), "--folder", str(tmp_path / "run"), "-o", str(output)]
    assert main([*arguments, "--least-score", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert Image.open(output).size == (SIZE, SIZE) and "->" in printed
    second = Detection("voc", str(voc), scale=0.5, image_size=64, start=str(tmp_path / "run" / "best.safetensors"))
    network = second.network()
    load_start(network, str(second.start))
    own = network.state_dict()
    _, first = engine.trained(tmp_path / "run")
    assert all(torch.equal(own[name], value) for name, value in first.state_dict().items())
