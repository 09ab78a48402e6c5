"""MS-COCO's layout for several labels an image, and a network that learns from it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from espkernels.models.data.coco import coco_detection, coco_labels
from espkernels.models.recipes import engine
from espkernels.models.recipes.detection import Detection
from espkernels.models.recipes.multilabel import MultiLabel

# Ids have gaps in the real annotations too; a category's number is its place among them.
CATEGORIES = {18: "green", 3: "red", 44: "blue"}
COLOURS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey noise with squares of up to three colours, some images without any."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for part, count in (("train", 96), ("val", 24)):
        (root / f"{part}2014").mkdir()
        images, annotations = [], []
        for i in range(count):
            image = Image.new("RGB", (64, 48), (128, 128, 128))
            for identity, name in CATEGORIES.items():
                if rng.random() < 0.5:
                    x, y = (int(v) for v in rng.integers(0, (44, 28)))
                    ImageDraw.Draw(image).rectangle((x, y, x + 20, y + 20), fill=COLOURS[name])
                    annotations.append({"image_id": 7 * i, "category_id": identity, "bbox": [x, y, 20, 20]})
            visible = np.asarray(image)
            noisy = np.clip(visible + rng.normal(0, 10, visible.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / f"{part}2014" / f"{i}.png")
            images.append({"id": 7 * i, "file_name": f"{i}.png"})
        categories = [{"id": identity, "name": name} for identity, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(content))
    return root


def test_layout(root: Path, tmp_path: Path) -> None:
    samples = coco_labels(root, "val", 2014, 32)
    assert samples.names == ["red", "green", "blue"] and len(samples) == 24
    content: dict[str, Any] = json.loads((root / "annotations" / "instances_val2014.json").read_text())
    numbers = {3: 0, 18: 1, 44: 2}
    for index in range(24):
        image, wanted = samples.sample(index, None)
        assert image.shape == (3, 32, 32)
        there = {numbers[a["category_id"]] for a in content["annotations"] if a["image_id"] == 7 * index}
        assert set(wanted.nonzero().flatten().tolist()) == there
    scenes, names = coco_detection(root, "val", 2014)
    assert names == samples.names
    for index, scene in enumerate(scenes):
        mine = [a for a in content["annotations"] if a["image_id"] == 7 * index]
        assert scene.labels.tolist() == [numbers[a["category_id"]] + 1 for a in mine]
        assert scene.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
    with pytest.raises(FileNotFoundError, match=r"there is no .*instances_val2017\.json; .*cocodataset"):
        coco_labels(root, "val", 2017, 32)
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_val2014.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"there is no .*0\.png, which .*lists"):
        coco_labels(tmp_path, "val", 2014, 32)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is no annotation of MS-COCO"):
        coco_labels(tmp_path, "val", 2014, 32)


@pytest.mark.parametrize("task", [MultiLabel, functools.partial(Detection, "coco", year=2014)], ids=["labels", "boxes"])
def test_train_and_val_have_the_same_categories(root: Path, tmp_path: Path, task: Any) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    next(one for one in content["categories"] if one["name"] == "blue")["name"] = "azure"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="train and val have other classes, such as azure"):
        task(data=str(tmp_path)).check()
    with pytest.raises(ValueError, match="the run and val have other classes, such as azure"):
        _ = task(data=str(root), labels=["red", "green", "azure"]).validation
    with pytest.raises(ValueError, match="the run and val have other classes, such as their order"):
        _ = task(data=str(root), labels=["green", "red", "blue"]).validation


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
def test_colours_are_learnt(root: Path, tmp_path: Path, plain: bool) -> None:
    task = MultiLabel(str(root), scale=0.5, size=64, batch=16, rate=0.05, workers=0, plain=plain)
    rows = engine.train(task, tmp_path / "run", engine.Settings(16))
    # Every label on every image would score two thirds: half of them are there.
    assert max(row["overall_f1"] for row in rows) > 85
    again, _ = engine.trained(tmp_path / "run")
    assert isinstance(again, MultiLabel) and again.labels == ["red", "green", "blue"]
