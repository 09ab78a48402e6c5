"""ImageNet's layout, its crops, and what is classified from it, on images that the test writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from espkernels.__main__ import main
from espkernels.models.classify import Guess, draw_guesses
from espkernels.models.data.crops import centre_crop, random_crop
from espkernels.models.data.image_folder import ENDINGS, ImageFolder
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.recipes import engine
from espkernels.models.recipes.classification import Classification
from espkernels.models.recipes.task import Share
from espkernels.models.segment import save

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (230, 20, 10)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of one colour each, twelve images for training and four for validation a class."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size = rng.integers(40, 90, 2)
                pixels = np.clip(rng.normal(colour, 25, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_layout_and_samples(root: Path) -> None:
    samples = ImageFolder(root, "train", 32)
    assert samples.classes == ["blue", "green", "red"] and len(samples) == 36
    image, label = samples.sample(35, None)
    assert image.shape == (3, 32, 32) and label == 2 and image[0].mean() > image[2].mean()
    draws = [samples.sample(0, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*test, expected test/<class>/<image>.*image-net"):
        ImageFolder(root, "test")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="has no folders of classes"):
        ImageFolder(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="cat holds no images"):
        ImageFolder(tmp_path, "train")


def test_crops_stay_in_the_image() -> None:
    # Inside the image everything is 200; a crop that reached beyond it would mix in black.
    for size in ((50, 40), (300, 20), (7, 90)):
        image = Image.new("RGB", size, (200, 200, 200))
        for seed in range(20):
            crop = random_crop(image, 24, (0.08, 1.0), torch.Generator().manual_seed(seed))
            assert crop.size == (24, 24) and np.asarray(crop).min() == 200
        assert np.asarray(centre_crop(image, 24)).min() == 200


def test_centre_crop_is_the_middle_of_the_resized_image() -> None:
    # A ramp from left to right: the shorter side becomes 256, and 224 of the middle are kept (paper's validation).
    ramp = np.tile(np.linspace(0, 255, 512)[None, :, None], (256, 1, 3)).astype(np.uint8)
    crop = np.asarray(centre_crop(Image.fromarray(ramp), 224)).astype(float)[100, :, 0]
    expected = ramp[0, 144:368, 0]
    assert np.abs(crop - expected).max() <= 1


def test_ranks_share_out_an_epoch(root: Path) -> None:
    samples = ImageFolder(root, "train", 16)
    whole = torch.cat([labels for _, labels in training_batches(samples, 8, 3, 1, Share())])
    parts = [
        torch.cat([labels for _, labels in training_batches(samples, 8, 3, 1, Share(rank, 2))]) for rank in range(2)
    ]
    assert len(whole) == 32 and torch.equal(torch.stack(parts, 1).flatten(), whole)
    first = next(iter(training_batches(samples, 8, 3, 1, Share())))[0]
    read_by_workers = next(iter(training_batches(samples, 8, 3, 1, Share(), workers=2)))[0]
    assert torch.equal(first, read_by_workers)
    assert not torch.equal(first, next(iter(training_batches(samples, 8, 3, 2, Share())))[0])
    assert sum(len(labels) for _, labels in evaluation_batches(samples, 8)) == 36
    with pytest.raises(ValueError, match="batch: got 9, expected a multiple of the 2 processes"):
        training_batches(samples, 9, 0, 0, Share(0, 2))
    with pytest.raises(ValueError, match="batch: got 40, expected at most the 36 samples"):
        training_batches(samples, 40, 0, 0, Share())


def test_an_image_that_a_worker_cannot_read_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(root, data)
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    command = ["train", "classification", "--data", str(data), "--scale", "0.5", "--size", "32", "--batch", "36"]
    assert main([*command, "--workers", "1", "--folder", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train: {data / 'train' / 'red' / '0.png'} cannot be read as an image")


def test_colours_are_learnt_and_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Classification(str(root), 0.5, size=64, batch=12, schedule="fixed", rate=0.02, workers=0)
    rows = engine.train(task, tmp_path / "run", engine.Settings(25))
    assert max(row["top1"] for row in rows) == 100
    output = tmp_path / "named"
    assert main(["classify", str(root / "val" / "red"), "--folder", str(tmp_path / "run"), "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert len(list(output.iterdir())) == 4
    one = str(root / "val" / "red" / "0.png")
    assert main(["classify", one, "--folder", str(tmp_path / "run"), "-o", str(tmp_path / "o.bmp")]) == 0
    assert Image.open(tmp_path / "o.bmp").format == "BMP"
    assert main(["classify", one, "--folder", str(tmp_path / "run"), "-o", str(tmp_path / "o.svg")]) == 2
    assert "o.svg has no ending of an image format (.bmp, " in capsys.readouterr().err
    likeliest = [lines.splitlines()[1].split()[0] for lines in printed.split("->")[1:]]
    assert likeliest.count("red") >= 3
    assert main(["classify", str(root / "val" / "red"), "--folder", str(tmp_path), "-o", str(output)]) == 2
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_named_image_is_drawn_in_every_format(tmp_path: Path, ending: str) -> None:
    save(
        draw_guesses(Image.new("RGB", (40, 40), "red"), [Guess("red", 0.75), Guess("blue", 0.25)]),
        tmp_path / f"o{ending}",
    )
    assert [path.name for path in tmp_path.iterdir()] == [f"o{ending}"]
    with Image.open(tmp_path / f"o{ending}") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.abs(pixels - (255, 0, 0)).max(2) < 10).sum() > 20_000  # the image, at about 300 dots a side
    assert (np.abs(pixels[0, 0] - 255) < 3).all()


def test_train_and_val_have_the_same_classes(root: Path, tmp_path: Path) -> None:
    for part, name in (("train", "red"), ("val", "red"), ("val", "teal")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / part / name / "0.png")
    with pytest.raises(ValueError, match="train and val have other classes, such as teal"):
        Classification(str(tmp_path)).check()


def test_a_run_is_not_scored_by_renumbered_classes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    task = Classification(str(tmp_path / "data"), 0.5, size=32)
    again = Classification(**task.options())
    assert again.validation.classes == ["blue", "green", "red"]
    shutil.copytree(root / "val" / "red", tmp_path / "data" / "val" / "cyan")
    with pytest.raises(ValueError, match="the run and val have other classes, such as cyan"):
        _ = Classification(**task.options()).validation


@pytest.mark.parametrize(("scale", "least"), [(0.5, 0.2), (2.0, 0.08)])
def test_small_networks_see_larger_crops(root: Path, scale: float, least: float) -> None:
    assert Classification(str(root), scale).training.share == (least, 1.0)  # type: ignore[union-attr]
