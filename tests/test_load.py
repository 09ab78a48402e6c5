"""Loading official checkpoints: what fits is copied exactly, what does not is listed and changes nothing."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from espkernels.models import (
    checkpoint,
    espnetv2,
    espnetv2_detection,
    espnetv2_segmentation,
    from_official,
    load_official,
)

PRETRAINED = Path(__file__).parents[1] / ".." / "shared" / "pretrained"
needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_dir(), reason="../shared/pretrained is not there")
FILES = [
    ("espnetv2_s_0.5_city_1024x512.pth", 0.5, 20),
    ("espnetv2_s_2.0_city_1024x512.pth", 2.0, 20),
    ("espnetv2_s_2.0_pascal_384x384.pth", 2.0, 21),
]
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""
    torch.set_num_threads(1)


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(model: nn.Module, path: Path, **options: Any) -> str:
    """The message with which ``path`` is refused; the model must be as before."""
    before = state_of(model)
    with pytest.raises(ValueError, match=r".") as caught:
        load_official(model, path, **options)
    assert same(before, model.state_dict())
    return str(caught.value)


@needs_pretrained
@pytest.mark.parametrize(("name", "scale", "classes"), FILES)
def test_real_checkpoints_load_and_are_copied_exactly(name: str, scale: float, classes: int):
    model = espnetv2_segmentation(scale, classes)
    report = load_official(model, PRETRAINED / name)
    stored = torch.load(PRETRAINED / name, map_location="cpu", weights_only=True)
    assert same(stored, model.state_dict())
    assert (report.loaded, report.left_out, report.kept, report.unwrapped, report.stripped) == (
        526,
        (),
        (),
        None,
        False,
    )
    assert f"s = {scale}, {classes} classes" in str(report)


@needs_pretrained
@pytest.mark.parametrize(("name", "scale", "classes"), FILES)
def test_a_network_is_built_from_the_shapes_in_the_file(name: str, scale: float, classes: int):
    model = from_official(PRETRAINED / name)
    assert (model.base_net.scale, model.num_classes, model.training) == (scale, classes, False)
    assert same(torch.load(PRETRAINED / name, map_location="cpu", weights_only=True), model.state_dict())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0])
def test_scale_classes_and_channels_are_recognised(scale: float):
    with torch.device("meta"):
        classifier = checkpoint.identify(espnetv2(scale, 10, 4).state_dict())
        segmenter = checkpoint.identify(espnetv2_segmentation(scale, 7, base=32).state_dict())
    assert (classifier.network, classifier.scale) == (checkpoint.CLASSIFICATION, scale)
    assert (classifier.num_classes, classifier.in_channels) == (10, 4)
    assert (segmenter.network, segmenter.scale) == (checkpoint.SEGMENTATION, scale)
    assert (segmenter.num_classes, segmenter.in_channels, segmenter.base) == (7, 3, 32)


def wrapped(state: State) -> Any:
    return {"epoch": 7, "arch": "espnetv2", "state_dict": state, "best_acc": 0.5, "optimizer": {"state": {}}}


def parallel(state: State) -> Any:
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("pack", "unwrapped", "stripped"),
    [
        (OrderedDict, None, False),
        (wrapped, "state_dict", False),
        (parallel, None, True),
        (lambda state: wrapped(parallel(state)), "state_dict", True),
    ],
    ids=["plain", "training", "parallel", "training-parallel"],
)
def test_every_form_of_file_gives_the_same_weights(
    tmp_path: Path, pack: Callable[[State], Any], unwrapped: str | None, stripped: bool
):
    source, target = espnetv2(0.5, 10), espnetv2(0.5, 10)
    torch.save(pack(source.state_dict()), tmp_path / "c.pth.tar")
    report = load_official(target, tmp_path / "c.pth.tar")
    assert (report.unwrapped, report.stripped, report.loaded) == (unwrapped, stripped, 487)
    assert same(source.state_dict(), target.state_dict())


def test_only_one_leading_module_is_stripped(tmp_path: Path):
    model = espnetv2(0.5, 10)
    torch.save(parallel(parallel(model.state_dict())), tmp_path / "c.pth")
    assert "module.level1.conv.weight" in refused(model, tmp_path / "c.pth")


def test_safetensors(tmp_path: Path):
    source, target = espnetv2_segmentation(0.5, 5), espnetv2_segmentation(0.5, 5)
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    load_official(target, tmp_path / "c.safetensors")
    assert same(source.state_dict(), target.state_dict())
    (tmp_path / "c.safetensors").write_bytes(b"not at all")
    assert "safetensors" in refused(target, tmp_path / "c.safetensors")


def test_a_float16_file_loads_into_a_float32_model_and_back(tmp_path: Path):
    model = espnetv2(0.5, 10)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path / "c.pth")
    load_official(model, tmp_path / "c.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same({k: v.to(model.state_dict()[k].dtype) for k, v in half.items()}, model.state_dict())


class Trap:
    """Unpickling this runs a function."""

    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return Trap.ran.append, (1,)


@pytest.mark.parametrize("content", [{"weights": Trap()}, {"args": argparse.Namespace(lr=0.1)}], ids=["code", "object"])
def test_nothing_in_a_file_is_executed_and_no_unsafe_advice_is_passed_on(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "c.pth")
    message = refused(espnetv2(0.5, 10), tmp_path / "c.pth")
    assert Trap.ran == []
    assert "could run code" in message
    assert "False" not in message
    assert "allowlist" not in message


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"], ids=["empty", "text", "half"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "broken.pth").write_bytes(content)
    assert "broken.pth" in refused(espnetv2(0.5, 10), tmp_path / "broken.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["zip.pth", "older.pth", "c.safetensors"])
def test_a_file_with_any_damaged_byte_is_read_or_refused_by_name(tmp_path: Path, name: str):
    path, state = tmp_path / name, {"a": torch.zeros(2), "b": torch.arange(3)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pth")
    whole, refusals = path.read_bytes(), []
    for place in range(min(len(whole), 500)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            checkpoint.read(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50 and all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize("build", [espnetv2, espnetv2_segmentation, lambda s, n: espnetv2_detection(s, n, 64)])
def test_tensors_of_unexpected_dimensions_are_refused(tmp_path: Path, build: Callable[..., nn.Module]):
    state = build(0.5, 5).state_dict()
    ends = ("level1.conv.weight", "level2_0.act.weight", "classifier.weight", "merge_layer.3.weight", "layers.5.bias")
    names = [name for name in state if name.endswith(ends)]
    assert len(names) > 2
    for name in names:
        torch.save(state | {name: torch.tensor(1.0)}, tmp_path / "c.pth")
        with pytest.raises(ValueError, match=r"c\.pth"):
            from_official(tmp_path / "c.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"a": 1}, {"state_dict": {"a": "text"}}, [torch.zeros(1)]])
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "c.pth")
    assert "holds" in refused(espnetv2(0.5, 10), tmp_path / "c.pth")


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"^there is no file .*nowhere\.pth"):
        load_official(espnetv2(0.5, 10), tmp_path / "nowhere.pth")


def test_every_mismatch_is_listed_and_nothing_is_copied(tmp_path: Path):
    source = espnetv2(0.5, 10).state_dict()
    del source["level1.conv.weight"]
    source["level9.extra"] = torch.zeros(1)
    source["classifier.bias"] = torch.zeros(11)
    source["level1.bn.num_batches_tracked"] = torch.tensor(1.0)
    source["level1.act.weight"][3] = torch.nan
    torch.save(source, tmp_path / "c.pth")
    lines = refused(espnetv2(0.5, 10), tmp_path / "c.pth").splitlines()
    listed = dict(zip((line.strip() for line in lines[1::2]), (line.strip() for line in lines[2::2]), strict=True))
    assert listed == {
        "missing in the file (1):": "level1.conv.weight",
        "unexpected in the file (1):": "level9.extra",
        "of another shape (1):": "classifier.bias: file [11], model [10]",
        "of another kind of number (1):": "level1.bn.num_batches_tracked: file torch.float32, model torch.int64",
        "not finite in the model's dtype (1):": "level1.act.weight",
    }


def test_values_too_large_for_the_models_dtype_are_refused(tmp_path: Path):
    source = espnetv2(0.5, 10).state_dict()
    source["level1.act.weight"][0] = 1e6
    torch.save(source, tmp_path / "c.pth")
    load_official(espnetv2(0.5, 10), tmp_path / "c.pth")
    assert "not finite in the model's dtype (1)" in refused(espnetv2(0.5, 10).half(), tmp_path / "c.pth")


@needs_pretrained
def test_another_scale_or_class_count_is_named():
    message = refused(espnetv2_segmentation(1.0, 20), PRETRAINED / FILES[1][0])
    assert "the file holds ESPNetv2 for segmentation (s = 2.0, 20 classes)" in message
    assert "the model is ESPNetv2 for segmentation (s = 1.0, 20 classes)" in message
    message = refused(espnetv2_segmentation(2.0, 20), PRETRAINED / FILES[2][0])
    assert "bu_dec_l4.merge_layer.3.weight: file [21, 10, 1, 1], model [20, 10, 1, 1]" in message
    assert "pass backbone=True" in message
    with pytest.raises(ValueError, match=r"another shape"):
        from_official(PRETRAINED / FILES[1][0], scale=1.0)


def test_the_older_segmentation_network_is_recognised(tmp_path: Path):
    backbone = espnetv2(0.5, 20).state_dict()
    old = {f"module.net.{name}": tensor for name, tensor in backbone.items() if name.startswith(("level1", "level2"))}
    old["module.proj_L4_C.conv.weight"] = torch.zeros(64, 128, 1, 1)
    old["module.pspMod.1.project.conv.weight"] = torch.zeros(1)
    torch.save(old, tmp_path / "old.pth")
    message = refused(espnetv2_segmentation(0.5, 20), tmp_path / "old.pth")
    assert "older ESPNetv2 repository" in message
    assert "different network" in message
    with pytest.raises(ValueError, match=r"older ESPNetv2 repository"):
        from_official(tmp_path / "old.pth")


def test_classification_weights_start_a_segmentation_network(tmp_path: Path):
    source, target = espnetv2(0.5, 1000), espnetv2_segmentation(0.5, 5)
    torch.save(parallel(source.state_dict()), tmp_path / "imagenet.pth")
    assert "pass backbone=True" in refused(target, tmp_path / "imagenet.pth")

    before = state_of(target)
    report = load_official(target, tmp_path / "imagenet.pth", backbone=True)
    after, weights = target.state_dict(), source.state_dict()
    for name in after:
        inner = name.removeprefix("base_net.")
        assert torch.equal(after[name], weights[inner] if name.startswith("base_net.") else before[name]), name
    assert report.loaded == sum(name.startswith("base_net.") for name in after)
    assert set(report.left_out) == {n for n in weights if n.startswith(("level5", "classifier"))}
    assert set(report.kept) == {n for n in after if not n.startswith("base_net.")}


def test_backbone_of_other_classes_and_of_another_scale(tmp_path: Path):
    source, target = espnetv2(0.5, 1000), espnetv2(0.5, 10)
    torch.save(source.state_dict(), tmp_path / "c.pth")
    report = load_official(target, tmp_path / "c.pth", backbone=True)
    assert report.kept == report.left_out == ("classifier.weight", "classifier.bias")
    assert torch.equal(target.level5[4].conv.weight, source.level5[4].conv.weight)
    assert "of another shape" in refused(espnetv2_segmentation(1.0, 10), tmp_path / "c.pth", backbone=True)
    assert "no levels of ESPNetv2" in refused(nn.Linear(2, 2), tmp_path / "c.pth", backbone=True)
    torch.save(espnetv2_segmentation(0.5, 10).state_dict(), tmp_path / "s.pth")
    assert "level5_0.eesp.spp_dw.0.conv.weight" in refused(target, tmp_path / "s.pth", backbone=True)


def test_a_meta_model_is_refused(tmp_path: Path):
    torch.save(espnetv2(0.5, 10).state_dict(), tmp_path / "c.pth")
    with torch.device("meta"):
        model = espnetv2(0.5, 10)
    with pytest.raises(ValueError, match=r"meta"):
        load_official(model, tmp_path / "c.pth")


def test_an_optimizer_that_holds_the_parameters_keeps_working(tmp_path: Path):
    torch.save(espnetv2(0.5, 10).state_dict(), tmp_path / "c.pth")
    model = espnetv2(0.5, 10)
    before = [p.data_ptr() for p in model.parameters()]
    load_official(model, tmp_path / "c.pth")
    assert [p.data_ptr() for p in model.parameters()] == before
