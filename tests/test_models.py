"""The networks: official names and shapes, data flow, switches, any image size, logits of real checkpoints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from espkernels import inference, models, nn, reference, replace, restore, use_backend
from espkernels.models import plain
from espkernels.models.pyramid_pooling import EfficientPyramidPooling, SkipWeighting

SHARED = Path(__file__).parents[1] / ".." / "shared"
KEYS = SHARED / "golden" / "state_dict_keys.json"
PRETRAINED = SHARED / "pretrained"
needs_keys = pytest.mark.skipif(not KEYS.is_file(), reason="../shared/golden is not there")
needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_dir(), reason="../shared/pretrained is not there")

ALL, ONE_SMALL, TWO_SMALL = (1, 2, 3, 4), (1, 1, 2, 3), (1, 1, 1, 2)
DILATIONS = {
    "level2_0.eesp": ALL,
    "level3_0.eesp": ALL,
    **{f"level3.{i}": ALL for i in range(3)},
    "level4_0.eesp": ALL,
    **{f"level4.{i}": ONE_SMALL for i in range(7)},
    "level5_0.eesp": ONE_SMALL,
    **{f"level5.{i}": TWO_SMALL for i in range(3)},
}

# File, mean, deviation, minimum, maximum, logits of classes 0 to 2 at (128, 128).
LOGITS = [
    ("espnetv2_s_0.5_city_1024x512", -0.029426, 4.719540, -10.7425, 11.5562, (5.8625, 0.3719, 11.0008)),
    ("espnetv2_s_2.0_city_1024x512", -0.008680, 3.040943, -7.4410, 10.1232, (-0.3768, -2.7783, 8.5108)),
    ("espnetv2_s_2.0_pascal_384x384", 0.001459, 5.503864, -11.5783, 19.2583, (16.2035, 0.8429, -8.8783)),
]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Small maps gain nothing from more, and lose much where the processors are shared."""
    torch.set_num_threads(1)


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with batch norm statistics and PReLU slopes as after training, so that no step is close to a no-op."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
        elif isinstance(module, torch.nn.PReLU):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator))
        elif isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
    return model


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@needs_keys
def test_names_and_shapes_are_the_official_ones():
    golden = json.loads(KEYS.read_text())
    classification, segmentation = golden["espnetv2_s_1.0_imagenet"], golden["espnetv2_s_1.0_city_20_classes"]
    assert (len(classification), len(segmentation)) == (487, 526)
    for plain_layers in (False, True):
        assert shapes(models.espnetv2(1.0, plain=plain_layers)) == classification
        assert shapes(models.espnetv2_segmentation(1.0, 20, plain=plain_layers)) == segmentation


def test_dilations_of_all_units_are_those_of_the_receptive_field_rule():
    network = models.espnetv2(0.5)
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, nn.EESP)}
    assert {name: unit.dilations for name, unit in units.items()} == DILATIONS
    for name, unit in units.items():
        assert tuple(branch.conv.dilation[0] for branch in unit.spp_dw) == DILATIONS[name]
        assert tuple(branch.conv.padding[0] for branch in unit.spp_dw) == DILATIONS[name]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_plain_and_fused_networks_agree_on_results_and_gradients(scale: float):
    for build in (models.espnetv2, models.espnetv2_segmentation):
        ours, theirs = (randomized(build(scale, 11, plain=flag)).double() for flag in (False, True))
        assert any(type(module) is plain.EESP for module in theirs.modules())
        assert not any(type(module) is plain.EESP for module in ours.modules())
        theirs.load_state_dict(ours.state_dict())
        x = image(2, 3, 64, 96).double()
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)
        gradients = []
        for model in (ours, theirs):
            model.train()
            torch.manual_seed(0)
            model(x).square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)


def test_parameters_that_the_official_network_never_uses_are_dead_here_too():
    network = randomized(models.espnetv2(0.5, 5)).train()
    network(image(2, 3, 64, 64)).sum().backward()
    dead = {name for name, p in network.named_parameters() if p.grad is None}
    expected = {f"level{i}_0.eesp.module_act.weight" for i in (2, 3, 4, 5)}
    expected |= {name for name, _ in network.named_parameters() if name.startswith("level5_0.inp_reinf.")}
    assert dead == expected
    assert sum(network.get_parameter(name).numel() for name in dead if "inp_reinf" in name) == 1370


class Pooled(TorchDispatchMode):
    """Sizes of the images that are average-pooled (maps have more channels than images)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::avg_pool2d", "espkernels::average_pool") and args[0].shape[1] == 3:
            self.sizes.append(tuple(args[0].shape[2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(64, 96), (75, 131)])
def test_the_image_pyramid_is_computed_once_and_equals_pooling_from_the_full_image(size: tuple[int, int]):
    network = randomized(models.espnetv2_segmentation(0.5, 4)).eval().base_net
    x = image(1, 3, *size)
    with torch.no_grad():
        with Pooled() as pooled:
            maps = network(x)
        halves = [size]
        for _ in range(4):
            halves.append((math.ceil(halves[-1][0] / 2), math.ceil(halves[-1][1] / 2)))
        assert pooled.sizes == halves[:4]
        assert [tuple(m.shape[2:]) for m in maps] == halves[1:]

        again = network.level1(x)
        for index, level in enumerate((2, 3, 4), start=1):
            again = getattr(network, f"level{level}_0")(again, x)
            for unit in getattr(network, f"level{level}", ()):
                again = unit(again)
            torch.testing.assert_close(again, maps[index], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(225, 97), (33, 130), (17, 16), (5, 7), (1, 1)])
def test_any_image_size_works(size: tuple[int, int]):
    x = image(1, 3, *size)
    for build in (models.espnetv2, models.espnetv2_segmentation):
        ours, theirs = (randomized(build(0.5, 6, plain=flag)).eval() for flag in (False, True))
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            out = ours(x)
            torch.testing.assert_close(out, theirs(x), rtol=1e-4, atol=1e-4)
        assert out.shape == ((1, 6) if build is models.espnetv2 else (1, 6, *size))
        assert out.isfinite().all()


def test_channels_last_batches_give_the_same_result():
    for build in (models.espnetv2, models.espnetv2_segmentation):
        network = randomized(build(0.5, 6)).eval()
        x = image(2, 3, 64, 48)
        with torch.no_grad():
            expected = network(x)
            out = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_network_pools_by_operators_while_its_layers_are_replaced(
    calls_of: Callable[[Any, str], list[str]],
) -> None:
    calls = [calls_of(module, name) for module in (reference, inference) for name in ("average_pool", "global_average")]
    network, image = models.espnetv2(0.5, 10, plain=True).eval(), torch.randn(1, 3, 32, 40)
    expected = network(image)
    assert [len(names) for names in calls] == [4, 1, 0, 0]
    replace(network)
    torch.testing.assert_close(network(image), expected)
    assert [len(names) for names in calls[:2]] == [4, 1] and all(calls[2:])
    restore(network)
    assert torch.equal(network(image), expected)
    assert [len(names) for names in calls[:2]] == [8, 2]


@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_input_channels_change_the_stem_and_the_first_convolution_of_each_shortcut(in_channels: int):
    ordinary, network = shapes(models.espnetv2(0.5, 5)), models.espnetv2(0.5, 5, in_channels).eval()
    changed = {name for name, shape in shapes(network).items() if shape != ordinary[name]}
    assert changed == {"level1.conv.weight", *(f"level{i}_0.inp_reinf.0.conv.weight" for i in (2, 3, 4, 5))}
    x = image(1, in_channels, 40, 56)
    assert network(x).shape == (1, 5)
    assert models.espnetv2_segmentation(0.5, 5, in_channels=in_channels).eval()(x).shape == (1, 5, 40, 56)


def test_switches_of_the_ablations():
    full = randomized(models.espnetv2(0.5, 5)).eval()
    x = image(1, 3, 64, 64)
    for switch in ("hff", "dilated"):
        without = models.espnetv2(0.5, 5, **{switch: False}).eval()
        without.load_state_dict(full.state_dict())
        assert not torch.allclose(full(x), without(x), rtol=1e-3)
    units = [unit for unit in models.espnetv2(0.5, dilated=False).modules() if isinstance(unit, nn.EESP)]
    assert [unit.dilations for unit in units] == [(1, 1, 1, 1)] * 17
    without = models.espnetv2(0.5, 5, long_range_shortcut=False)
    assert set(shapes(full)) - set(shapes(without)) == {name for name in shapes(full) if ".inp_reinf." in name}
    without.eval().load_state_dict({k: v for k, v in full.state_dict().items() if ".inp_reinf." not in k})
    assert not torch.allclose(full(x), without(x), rtol=1e-3)


def test_dropout_is_before_the_classifier_and_only_in_training():
    network = models.espnetv2(0.5, 5, dropout=1.0)
    torch.nn.init.constant_(network.classifier.bias, 2.0)
    x = image(2, 3, 64, 64)
    assert (network.train()(x) == 2.0).all()
    assert (network.eval()(x) != 2.0).any()


def test_pyramid_pooling_against_its_definition():
    """A map of 7x13 sees scales 2, 1.5, 1, 0.5, 0.1 as 14x26, 11x20, 7x13, 5x7 (never below 5) and 5x5."""
    block = randomized(EfficientPyramidPooling(6, 4, 8, scales=(0.1, 1.0, 2.0, 0.5, 1.5))).eval().double()
    x = image(2, 6, 7, 13).double()
    functional = torch.nn.functional
    with torch.no_grad():
        projected = block.projection_layer(x)
        maps = []
        for stage, size in zip(block.stages, [(14, 26), (11, 20), (7, 13), (5, 7), (5, 5)], strict=True):
            if size[0] > 7:
                resized = functional.interpolate(projected, size, mode="bilinear", align_corners=True)
                maps.append(functional.adaptive_avg_pool2d(stage(resized), (7, 13)))
            elif size == (7, 13):
                maps.append(stage(projected))
            else:
                small = stage(functional.adaptive_avg_pool2d(projected, size))
                maps.append(functional.interpolate(small, (7, 13), mode="bilinear", align_corners=True))
        activated = block.merge_layer[0](torch.cat(maps, dim=1))
        # The shuffle puts channel c of scale i, which is channel 4 i + c, at 5 c + i.
        shuffled = activated[:, [4 * i + c for c in range(4) for i in range(5)]]
        expected = block.br(block.merge_layer[3](block.merge_layer[2](shuffled)))
        torch.testing.assert_close(block(x), expected)


def test_skip_weighting_against_its_definition():
    block = randomized(SkipWeighting(12, 8)).eval().double()
    x = image(2, 12, 5, 6).double()
    assert block.expansion_layer.cbr[0].groups == 4
    weight = block.wt_layer[1].weight.flatten(1)
    with torch.no_grad():
        scale = torch.sigmoid(x.mean(dim=(2, 3)) @ weight.T)
        torch.testing.assert_close(block(x), block.expansion_layer(x) * scale[:, :, None, None])


@pytest.mark.parametrize("num_classes", [1, 2, 3, 91])
def test_any_number_of_classes(num_classes: int):
    network = models.espnetv2_segmentation(0.5, num_classes, base=4).eval()
    assert network(image(1, 3, 32, 32)).shape == (1, num_classes, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"scale": math.nan}, "scale: got nan"),
        ({"scale": 1.0, "num_classes": 0}, "num_classes: got 0"),
        ({"scale": 1.0, "in_channels": 0}, "in_channels: got 0"),
        ({"scale": 1.0, "base": 0}, "base: got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], named: str):
    with pytest.raises(ValueError, match=named):
        models.espnetv2_segmentation(**{"num_classes": 5, **arguments})
    if "base" not in arguments:
        with pytest.raises(ValueError, match=named):
            models.espnetv2(**arguments)


def test_every_scale_makes_networks_or_is_named():
    for scale in (0.05 * i for i in range(1, 65)):
        rounded = math.ceil(32 * scale / 4) * 4
        with torch.device("meta"):
            for build in (models.espnetv2, models.espnetv2_segmentation):
                if rounded in (16, 32) or (rounded > 32 and rounded % 8 == 0):
                    build(scale, 5)
                else:
                    with pytest.raises(ValueError, match=rf"^scale: got {scale}, expected .* not {rounded}:"):
                        build(scale, 5)


@needs_pretrained
@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "default"])
@pytest.mark.parametrize("row", LOGITS, ids=[row[0] for row in LOGITS])
def test_reference_logits_of_real_checkpoints(row, backend: str | None):
    name, mean, deviation, smallest, largest, logits = row
    classes = 21 if "pascal" in name else 20
    network = models.espnetv2_segmentation(float(name.split("_")[2]), classes)
    network.load_state_dict(torch.load(PRETRAINED / f"{name}.pth", map_location="cpu", weights_only=True), strict=True)
    wave = np.sin(0.01 * np.arange(3 * 256 * 256, dtype=np.float64)).astype(np.float32)
    with torch.no_grad(), use_backend(backend):
        out = network.eval()(torch.from_numpy(wave).reshape(1, 3, 256, 256))
    assert out.shape == (1, classes, 256, 256)
    found = [out.mean(), out.std(), out.min(), out.max(), *out[0, :3, 128, 128]]
    assert [float(value) for value in found] == pytest.approx(
        [mean, deviation, smallest, largest, *logits], rel=0, abs=1e-4
    )


def test_import_needs_only_torch_and_numpy():
    program = (
        "import sys\n"
        "for name in ('PIL', 'tqdm', 'rich', 'safetensors', 'matplotlib'): sys.modules[name] = None\n"
        "import espkernels.models, espkernels.models.segment, espkernels.commands.segment\n"
        "try: espkernels.models.segment.read_image('x.png')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "espkernels[images]" in done.stdout
