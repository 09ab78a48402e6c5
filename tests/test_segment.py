"""Segmenting photographs: preparation, class shares of real checkpoints, the overlay, and the command end to end."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import espkernels
from espkernels.commands import segment as command
from espkernels.commands.photographs import Photographs
from espkernels.models import classes, espnetv2_segmentation, from_official
from espkernels.models.segment import OPACITY, overlay, preprocess, read_image, save, segment

SHARED = Path(__file__).parents[1] / ".." / "shared"
IMAGES, PRETRAINED = SHARED / "images", SHARED / "pretrained"
VOC = PRETRAINED / "espnetv2_s_2.0_pascal_384x384.pth"
SMALL = PRETRAINED / "espnetv2_s_0.5_city_1024x512.pth"
needs_shared = pytest.mark.skipif(not (IMAGES.is_dir() and PRETRAINED.is_dir()), reason="../shared is not there")

# Shares in percent of the VOC network at 384x384.
SHARES = {
    "sample2": {"car": 12.0},
    "sample4": {"car": 34.0, "person": 9.7, "bus": 3.8},
    "sample5": {"cat": 35.2, "person": 4.4},
}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""
    torch.set_num_threads(1)


class Columns(nn.Module):
    """A network that answers with class 0 in the left half of the picture, and its last class in the right half."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        logits = torch.zeros(1, self.num_classes, *x.shape[2:])
        logits[:, 0, :, : x.shape[3] // 2] = 1
        logits[:, -1, :, x.shape[3] // 2 :] = 1
        return logits


def test_preprocess_is_rgb_over_255_normalised():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 51, 102
    x = preprocess(Image.fromarray(pixels), (8, 3))
    assert (x.shape, x.dtype, x.is_contiguous()) == ((1, 3, 8, 3), torch.float32, True)
    expected = [(1.0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.4 - 0.406) / 0.225]
    torch.testing.assert_close(x, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 8, 3))


def test_grey_transparent_and_turned_photographs_are_read(tmp_path: Path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (5, 4)).save(path)
        assert (read_image(path).mode, read_image(path).size) == ("RGB", (5, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 5)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_numbers_without_a_range_refused(tmp_path: Path, ending: str):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    found = np.asarray(read_image(tmp_path / f"ramp.{ending}"))
    assert (found == (ramp >> 8)[:, :, None]).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif cannot be read as an image: its pixels are of mode F"):
        read_image(tmp_path / "float.tif")


def test_no_picture_takes_the_place_of_a_photograph_or_of_another_picture(tmp_path: Path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        Image.new("RGB", (4, 4)).save(photos / name)
    targets = [target.name for _, target in Photographs("segment", photos, out).jobs]
    assert sorted(targets) == ["a.jpg.png", "a.jpg.png.png", "a.png.png"]
    with pytest.raises(ValueError, match=r"a\.png is there already, beside the photograph"):
        Photographs("segment", photos / "a.jpg", photos)
    ((_, target),) = Photographs("segment", photos / "a.jpg", out).jobs
    assert target == out / "a.png"


def test_classes_and_shares_of_a_known_answer():
    result = segment(Columns(21).eval(), Image.new("RGB", (30, 20)), (8, 10))
    assert result.classes.dtype == np.uint8
    assert (result.classes == np.repeat([[0] * 5 + [20] * 5], 8, axis=0)).all()
    assert result.shares == {"background": 0.5, "tvmonitor": 0.5}
    assert result.class_set is classes.VOC
    assert result.seconds > 0


def test_overlay_colours_and_leaves_the_background_alone():
    photo = Image.new("RGB", (400, 200), (200, 100, 50))
    result = segment(Columns(21).eval(), photo, (20, 40))
    picture = overlay(photo, result)
    assert picture.width == 400
    assert picture.height > 200
    pixels = np.asarray(picture)
    assert (pixels[:200, :199] == (200, 100, 50)).all()
    blend = np.array([200, 100, 50]) * (1 - OPACITY) + np.array(classes.VOC.colours[20]) * OPACITY
    assert np.abs(pixels[:200, 205:] - blend).max() <= 0.5
    assert (pixels[:200, 200] == 255).all()
    # The legend is black on white with a box in the class's colour.
    legend = pixels[200:].reshape(-1, 3)
    for colour in ((255, 255, 255), (0, 0, 0), classes.VOC.colours[20]):
        assert (legend == colour).all(axis=1).any()


def test_overlay_of_a_photograph_narrower_than_its_legend():
    photo = Image.new("RGB", (8, 8))
    assert overlay(photo, segment(Columns(21).eval(), photo, (8, 8))).width > 8


def test_class_sets():
    assert (len(classes.CITYSCAPES), len(classes.VOC)) == (20, 21)
    assert dict(zip(classes.CITYSCAPES.names, classes.CITYSCAPES.colours, strict=True))["bicycle"] == (119, 11, 32)
    # The published VOC colours.
    voc = dict(zip(classes.VOC.names, classes.VOC.colours, strict=True))
    published = {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "cat": (64, 0, 0), "person": (192, 128, 128)}
    published |= {"bus": (0, 128, 128), "tvmonitor": (0, 64, 128)}
    assert {name: voc[name] for name in published} == published
    assert len(set(voc.values())) == 21
    assert [len(classes.of_count(n)) for n in (1, 19, 20, 21, 256)] == [1, 19, 20, 21, 256]
    assert len(set(classes.of_count(150).colours)) == 150


def test_bad_input_is_refused(tmp_path: Path):
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"training mode"):
        segment(Columns(21), photo, (8, 8))
    with pytest.raises(ValueError, match=r"class_set: 20 names"):
        segment(Columns(21).eval(), photo, (8, 8), classes.CITYSCAPES)
    with pytest.raises(ValueError, match=r"257 classes"):
        segment(Columns(257).eval(), photo, (8, 8))
    with pytest.raises(ValueError, match=r"nowhere\.jpg"):
        read_image(tmp_path / "nowhere.jpg")


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "out.png"
    save(Image.new("RGB", (4, 4), "red"), target)

    class Broken:
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match=r"no space"):
        save(Broken(), target)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert Image.open(target).getpixel((0, 0)) == (255, 0, 0)


@needs_shared
def test_shares_of_real_photographs():
    network = from_official(VOC)
    for name, expected in SHARES.items():
        shares = segment(network, IMAGES / f"{name}.jpg", (384, 384)).shares
        found = {k: round(100 * v, 1) for k, v in shares.items() if k != "background" and v > 0.02}
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=0.5)
        assert sum(shares.values()) == pytest.approx(1)


@needs_shared
def test_a_frozen_network_gives_the_classes_of_its_logits():
    network = from_official(SMALL)
    frozen = espkernels.freeze(network)
    found = segment(frozen, IMAGES / "sample2.jpg", (96, 160))
    with torch.no_grad():
        logits = frozen(preprocess(read_image(IMAGES / "sample2.jpg"), (96, 160)))
    assert (found.classes == logits.argmax(1)[0].numpy()).all()
    expected = segment(network, IMAGES / "sample2.jpg", (96, 160)).shares
    assert found.shares == pytest.approx(expected, abs=1e-3)  # a pixel whose two classes are as near as rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_frozen_network_is_given_images_in_the_dtype_of_its_weights(dtype: torch.dtype):
    torch.manual_seed(0)
    plain = espnetv2_segmentation(0.5, 5, plain=True).double().eval()
    network = espnetv2_segmentation(0.5, 5).eval()
    network.load_state_dict(plain.state_dict())
    photo = Image.effect_noise((96, 64), 100).convert("RGB")
    found = segment(espkernels.freeze(network.to(dtype)), photo, (64, 96))
    with torch.no_grad():
        expected = plain(preprocess(photo, (64, 96)).double()).argmax(1)[0]
    same = float((torch.from_numpy(found.classes) == expected).double().mean())
    # Pixels whose two likeliest classes are nearer than rounding may change: 1 in 100 of random weights' in bfloat16.
    assert same > (0.95 if dtype == torch.bfloat16 else 0.999)


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@needs_shared
def test_the_command_on_one_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "out.png"
    assert (
        run(IMAGES / "sample5.jpg", "--weights", VOC, "-o", out, "--size", "192", "224", "--backend", "reference") == 0
    )
    photo, picture = Image.open(IMAGES / "sample5.jpg"), Image.open(out)
    assert picture.width == photo.width
    assert picture.height > photo.height
    printed = capsys.readouterr()
    assert "224x192 in" in printed.out
    assert " ms)" in printed.out
    shares = {line.split()[0]: float(line.split()[1]) for line in printed.out.splitlines()[1:] if "<" not in line}
    assert shares["cat"] > 25
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    # Inside the nearer cat the photograph is darker now, the curtain beside it is as it was.
    assert np.asarray(picture)[400:600, 150:250].mean() < np.asarray(photo.convert("RGB"))[400:600, 150:250].mean() - 10
    curtain = np.asarray(picture)[20:120, 70:150].astype(int) - np.asarray(photo.convert("RGB"))[20:120, 70:150]
    assert np.abs(curtain).max() == 0


@needs_shared
def test_the_command_on_a_folder_goes_on_after_an_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(IMAGES / "sample4.jpg").resize((160, 90)).save(photos / "b.jpg")
    Image.open(IMAGES / "sample2.jpg").resize((120, 40)).save(photos / "c.png")
    Image.open(IMAGES / "sample2.jpg").resize((120, 40)).save(photos / "b.png")
    (photos / "a.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("not looked at")
    assert run(photos, "--weights", SMALL, "-o", tmp_path / "out", "--size", "64", "128") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.jpg.png", "b.png.png", "c.png"}
    printed = capsys.readouterr()
    assert "a.jpg cannot be read as an image" in printed.err
    assert "3/4" in printed.err or "4/4" in printed.err
    assert printed.out.count(" ms)") == 3


@needs_shared
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([IMAGES, "--weights", SMALL, "-o", IMAGES], "name another"),
        ([IMAGES / "none.jpg", "--weights", SMALL, "-o", "{tmp}/o.png"], "there is no"),
        ([IMAGES / "sample2.jpg", "--weights", SMALL, "-o", "{tmp}/o.doc"], "no ending of an image format"),
        ([IMAGES / "sample2.jpg", "--weights", SMALL, "-o", "{tmp}/o.png", "--classes", "voc"], "20"),
        ([IMAGES / "sample2.jpg", "--weights", SMALL, "-o", "{tmp}/o.png", "--scale", "2"], "another shape"),
    ],
)
def test_the_command_says_what_it_cannot_do(tmp_path: Path, capsys, arguments: list[str | Path], message: str):
    assert run(*(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "none.pth"], "--weights: there is no file none.pth"),
        (["--size", "0", "4"], "--size: got 0, expected"),
        (["--threads", "0"], "--threads: got 0, expected"),
    ],
)
def test_the_command_names_an_option_that_cannot_be(capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit):
        run("image.png", "-o", "o.png", "--weights", __file__, *arguments)
    assert message in capsys.readouterr().err


def test_a_class_set_of_another_length_is_refused_with_both_lengths():
    for name, count, length in (("voc", 19, 21), ("voc", 20, 21), ("cityscapes", 21, 20), ("cityscapes", 18, 20)):
        with pytest.raises(ValueError, match=f"--classes {name}: it has {length} classes, the checkpoint {count}"):
            command._class_set(name, count)
    fitting = [("cityscapes", 19), ("cityscapes", 20), ("voc", 21), ("auto", 19), ("auto", 7)]
    assert [len(command._class_set(name, count)) for name, count in fitting] == [19, 20, 21, 19, 7]


def test_the_default_size_is_the_one_in_the_checkpoints_name():
    sizes = {"espnetv2_s_2.0_city_1024x512.pth": (512, 1024), "espnetv2_s_1.0_pascal_256x256.pth": (256, 256)}
    assert {name: command._size(None, Path(name), 20) for name in sizes} == sizes
    assert command._size(None, Path("mine.pth"), 20) == (512, 1024)
    assert command._size(None, Path("mine.pth"), 21) == (384, 384)
    assert command._size([3, 4], Path("x_1024x512.pth"), 20) == (3, 4)
