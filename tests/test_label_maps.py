"""Segmentation's data in the layouts of Cityscapes and PASCAL VOC, its score, and a network that learns from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from plain_layers import assert_same_way

from espkernels.__main__ import main
from espkernels.models import espnetv2, segment
from espkernels.models.classes import VOC
from espkernels.models.data.cityscapes import CLASS_WEIGHTS, LABEL_IDS, cityscapes, train_ids
from espkernels.models.data.label_maps import IGNORED, LabelMaps
from espkernels.models.data.voc import voc_segmentation
from espkernels.models.mean_iou import ConfusionCounter
from espkernels.models.recipes import engine
from espkernels.models.recipes.segmentation import Segmentation

SIZE = 64


def write_voc(root: Path, train: int, val: int) -> None:
    """Squares (class 1, reddish) and discs (class 2, bluish) on grey noise, borders of 255 as VOC has them."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        names = [f"{part}{i}" for i in range(count)]
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image, classes = Image.new("RGB", (SIZE, SIZE), (120, 120, 120)), Image.new("P", (SIZE, SIZE), 0)
            for label, colour in ((1, (200, 60, 50)), (2, (50, 80, 210))):
                x, y = (int(v) for v in rng.integers(4, SIZE - 28, 2))
                box = (x, y, x + 24, y + 24)
                for canvas, fill, edge in ((image, colour, colour), (classes, label, 255)):
                    draw = ImageDraw.Draw(canvas)
                    (draw.rectangle if label == 1 else draw.ellipse)(box, fill=fill, outline=edge)
            noisy = np.clip(np.asarray(image) + rng.normal(0, 15, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            classes.putpalette([c for colour in VOC.colours for c in colour])
            classes.save(root / "SegmentationClass" / f"{name}.png")


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("VOC2012")
    write_voc(root, 48, 8)
    return root


def test_voc_layout(voc: Path, tmp_path: Path) -> None:
    samples = voc_segmentation(voc, "train", (32, 48), (0.5, 2.0))
    assert len(samples) == 48
    image, classes = samples.sample(0, None)
    assert image.shape == (3, 32, 48) and classes.shape == (SIZE, SIZE)
    assert set(classes.unique().tolist()) == {0, 1, 2, IGNORED}
    with pytest.raises(FileNotFoundError, match=r"there is no .*train\.txt.*host\.robots"):
        voc_segmentation(tmp_path, "train", (32, 32), (0.5, 2.0))


def test_extra_annotations_are_taken_where_they_are(tmp_path: Path) -> None:
    write_voc(tmp_path, 2, 1)
    (tmp_path / "SegmentationClassAug").mkdir()
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text("train1\nval0\n")
    with pytest.raises(FileNotFoundError, match=r"there is no .*SegmentationClassAug.train1\.png, which .*train_aug"):
        voc_segmentation(tmp_path, "train", (32, 32), (0.5, 2.0))
    for name in ("train1", "val0"):
        (tmp_path / "SegmentationClassAug" / f"{name}.png").write_bytes(
            (tmp_path / "SegmentationClass" / f"{name}.png").read_bytes()
        )
    assert [image.stem for image, _ in voc_segmentation(tmp_path, "train", (8, 8), (1, 1)).files] == ["train1", "val0"]
    assert len(voc_segmentation(tmp_path, "val", (8, 8), (1, 1))) == 1


def test_cityscapes_layout(tmp_path: Path) -> None:
    for folder in ("leftImg8bit/train/bonn", "gtFine/train/bonn"):
        (tmp_path / folder).mkdir(parents=True)
    ids = np.arange(34, dtype=np.uint8).repeat(4)[None].repeat(20, 0)
    Image.fromarray(np.zeros((20, 136, 3), np.uint8)).save(tmp_path / "leftImg8bit/train/bonn/bonn_0_leftImg8bit.png")
    with pytest.raises(FileNotFoundError, match=r"bonn_0_gtFine_labelIds\.png for .*cityscapes-dataset"):
        cityscapes(tmp_path, "train", (10, 68), (0.5, 1.0))
    Image.fromarray(ids).save(tmp_path / "gtFine/train/bonn/bonn_0_gtFine_labelIds.png")
    _, classes = cityscapes(tmp_path, "train", (10, 68), (0.5, 1.0)).sample(0, None)
    # Road is 7, sidewalk 8, building 11 ... bicycle 33; 29 and 30, caravan and trailer, are not scored.
    found = {int(ids[0, 4 * i]): int(classes[0, 4 * i]) for i in range(34)}
    assert [found[i] for i in LABEL_IDS] == list(range(19)) and found[7] == 0 and found[33] == 18
    assert {found[i] for i in range(34) if i not in LABEL_IDS} == {IGNORED}
    assert train_ids(np.array([255], np.uint8)) == IGNORED
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*val"):
        cityscapes(tmp_path, "val", (10, 68), (0.5, 1.0))


def test_image_and_classes_go_through_the_same(tmp_path: Path) -> None:
    # The red of every pixel says its class; only pixels beside another class may be mixed.
    rng = np.random.default_rng(3)
    classes = rng.integers(0, 5, (6, 8)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
    Image.fromarray(np.stack([50 * classes + 5] * 3, -1).astype(np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(classes).save(tmp_path / "map.png")
    files = [(tmp_path / "image.png", tmp_path / "map.png")]
    samples = LabelMaps(files, (70, 90), (0.5, 2.0), lambda numbers: numbers, 255)
    padded = 0
    for seed in range(20):
        image, labels = samples.sample(0, torch.Generator().manual_seed(seed))
        assert image.shape == (3, 70, 90) and labels.shape == (70, 90)
        red = (image[0] * segment.STD[0] + segment.MEAN[0]) * 255
        wanted = torch.where(labels == IGNORED, 0, 50 * labels + 5).float()
        # Resizing mixes with the next pixels, those beyond the crop too.
        around = torch.nn.functional.pad(wanted[None, None], (2, 2, 2, 2), value=-1)
        inside = (around.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4) == wanted[..., None]).all(-1)[0, 0]
        assert inside.float().mean() > 0.1
        assert (red - wanted)[inside].abs().max() < 1
        padded += int((labels == IGNORED).any())
    assert 0 < padded < 20


def test_confusion_counter_beside_sets_of_pixels() -> None:
    rng = np.random.default_rng(1)
    given, true = rng.integers(0, 4, (2, 3, 9, 7))
    true[0, :2] = 255
    counter = ConfusionCounter(5)
    for one, other in zip(given, true, strict=True):
        counter.add(torch.from_numpy(one), torch.from_numpy(other))
    pixels = [(i, int(g), int(t)) for i, (g, t) in enumerate(zip(given.flat, true.flat, strict=True)) if t != 255]
    ious = []
    for label in range(4):
        a, b = {i for i, g, _ in pixels if g == label}, {i for i, _, t in pixels if t == label}
        ious.append(len(a & b) / len(a | b))
    assert counter.ious()[:4].tolist() == pytest.approx(ious) and counter.ious()[4].isnan()
    assert counter.mean() == pytest.approx(float(np.mean(ious)))
    assert counter.accuracy() == pytest.approx(sum(g == t for _, g, t in pixels) / len(pixels))
    with pytest.raises(ValueError, match="given: got a class of 5"):
        counter.add(torch.tensor([5]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"given: got shape \[1\]"):
        counter.add(torch.tensor([0]), torch.tensor([0, 1]))


def shapes(voc: Path, **options: Any) -> Segmentation:
    default = dict(data=str(voc), scale=0.5, size=(SIZE, SIZE), batch=12, zoom=(0.8, 1.25), rate=0.004, workers=0)
    return Segmentation("voc", **default | options)  # type: ignore[arg-type]


def test_plain_layers_go_the_same_way(voc: Path, tmp_path: Path) -> None:
    assert_same_way(lambda plain: shapes(voc, batch=24, plain=plain), tmp_path, 1e-3)


def test_the_start_is_opened_once_and_stored_whole(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(espnetv2(0.5, 10).state_dict(), tmp_path / "start.pth")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = dict(data=os.path.relpath(voc), batch=24, start="start.pth")
    rows = engine.train(shapes(voc, **options), tmp_path / "run", engine.Settings(1))
    (tmp_path / "start.pth").unlink()
    assert engine.train(shapes(voc, **options), tmp_path / "run", engine.Settings(1)) == rows
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    task, network = engine.trained(tmp_path / "run")
    assert task.options()["data"] == str(voc) and task.options()["start"] == str(tmp_path / "start.pth")
    found = engine.scores(task, network, torch.device("cpu"))
    assert found["miou"] == pytest.approx(rows[0]["miou"])


def test_a_batch_without_a_pixel_that_counts_is_no_loss(voc: Path) -> None:
    task, network = shapes(voc), torch.nn.Conv2d(3, 21, 1)
    images = torch.randn(2, 3, 4, 4)
    loss = task.loss(network, (images, torch.full((2, 4, 4), 255)), torch.device("cpu"))
    loss.backward()
    assert loss.item() == 0 and network.weight.grad is not None and not network.weight.grad.any()


def test_a_class_that_the_network_lacks_is_named(voc: Path, tmp_path: Path) -> None:
    shutil.copytree(voc, tmp_path, dirs_exist_ok=True)
    map_ = tmp_path / "SegmentationClass" / "train0.png"
    Image.fromarray(np.full((SIZE, SIZE), 30, np.uint8)).save(map_)
    with pytest.raises(ValueError, match=r"train0\.png has class 30, expected 0 to 20 or 255"):
        voc_segmentation(tmp_path, "train", (32, 48), (0.5, 2.0)).sample(0, None)


def test_the_loss_and_the_descent_of_cityscapes() -> None:
    task = Segmentation("cityscapes", "none", scale=0.5)
    logits, labels = torch.randn(2, 20, 3, 4), torch.randint(0, 19, (2, 3, 4))
    labels[0, 0] = 255
    network: Any = lambda images: logits  # noqa: E731
    found = task.loss(network, (logits, labels), torch.device("cpu"))
    counted = labels != 255
    weight = torch.tensor(CLASS_WEIGHTS)[labels[counted]]
    right = logits.permute(0, 2, 3, 1).log_softmax(-1)[counted].gather(1, labels[counted][:, None])[:, 0]
    torch.testing.assert_close(found, -(weight * right).sum() / weight.sum())
    whole = task.network()
    groups = task.optimizer(whole, 1.0).param_groups
    assert [group["factor"] for group in groups] == [1.0, 10.0]
    assert sum(len(group["params"]) for group in groups) == len(list(whole.parameters()))


def test_every_norm_of_the_second_stage_is_frozen() -> None:
    task = Segmentation("voc", "none", scale=0.5, frozen_norms=True)
    network = task.network()
    learnt = {id(p) for group in task.optimizer(network, 0.1).param_groups for p in group["params"]}
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 60 and not any(id(p) in learnt for norm in norms for p in norm.parameters())


@pytest.mark.slow
def test_shapes_are_learnt(voc: Path, tmp_path: Path) -> None:
    rows = engine.train(shapes(voc), tmp_path / "run", engine.Settings(24))
    # All background would score a third of the background's share of 0.8.
    assert max(row["miou"] for row in rows) > 70
    # A second stage begins with the first one's weights, and its batch norms keep their scale.
    best = str(tmp_path / "run" / "best.safetensors")
    second = shapes(voc, rate=0.001, start=best, frozen_norms=True)
    rows = engine.train(second, tmp_path / "second", engine.Settings(1))
    assert rows[0]["miou"] > 50
    _, before = engine.trained(tmp_path / "run")
    _, after = engine.trained(tmp_path / "second")
    norms = [name for name, part in after.named_modules() if isinstance(part, torch.nn.BatchNorm2d)]
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert norms and not any({f"{name}.weight", f"{name}.bias"} & changed for name in norms)
    assert any(name.endswith("conv.weight") for name in changed)
    # The weights are those of any checkpoint.
    output = tmp_path / "overlay.png"
    arguments = ["segment", str(voc / "JPEGImages" / "val0.jpg"), "--weights", best, "--size", "64", "64"]
    assert main([*arguments, "-o", str(output)]) == 0 and output.exists()
    assert main(["evaluate", "segmentation", "--folder", str(tmp_path / "run")]) == 0
