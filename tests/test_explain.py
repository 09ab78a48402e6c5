"""What explain says of a network holds: its layers, their multiply-adds and bytes, and why a model is not replayed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espkernels
from espkernels import backends, models
from espkernels.__main__ import main
from espkernels.explanation import Explanation, Row
from espkernels.probe import Ceilings
from espkernels.running import running

compiled = pytest.mark.skipif(backends.library is None, reason=str(backends.why_not("cpu")))

# The module that is slow here is the clock, not the subject.
CEILINGS = Ceilings(1, flops=1e11, bandwidth={2**19: 1e10, 2**28: 1e10})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, same_each_time: None) -> None:
    """Few rounds, and ceilings that are known."""
    module = sys.modules["espkernels.explain"]
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "probe", lambda threads, dtype: replace(CEILINGS, dtype=str(dtype)))


def network() -> models.ESPNetv2:
    return models.espnetv2(0.5, num_classes=10)


def map_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In channels_last, as maps between frozen layers are: a unit alone would have to turn another one around."""
    return torch.rand(1, *shape).to(dtype, memory_format=torch.channels_last)


def photograph(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(1, 3, *size).to(dtype)


@compiled
def test_multiply_adds_are_those_of_the_paper_in_every_layer() -> None:
    frozen = espkernels.freeze(network())
    found = espkernels.explain(frozen, photograph(64, 96))
    assert found.refusal == "" and found.notes == ()
    expected = models.count(network(), (64, 96))
    # Pooling and the classifier are no convolutions, which are all that the paper counts.
    macs: dict[str, int] = {}
    for row in found.rows:
        for kernel in row.kernels or (row,):
            counted = kernel.multiply_adds or 0
            if "average" in kernel.kernel:
                # The pooled half of a down-sampler does its part of the shortcut: three of the twelve a number.
                counted = counted // 12 * 3 if row.layer in ("level2_0", "level3_0", "level4_0") else 0
            if row.layer != "classifier":
                macs[row.layer] = macs.get(row.layer, 0) + counted
    assert sum(macs.values()) == expected.macs
    for layer in ("level1", "level3.0", "level4.6", "level5.2", "level5_0"):
        assert macs[layer] == expected.by_module[layer].macs
    assert macs["level2_0"] + macs["level2_0.image_convolution"] == expected.by_module["level2_0"].macs


@compiled
@torch.no_grad()
def test_steps_share_the_time_of_a_pass() -> None:
    torch.set_num_threads(2)
    frozen, x = espkernels.freeze(network()), photograph(64, 96)
    frozen(x)
    (recorded,) = frozen.plans.values()
    for _ in range(20):
        start = time.perf_counter()
        seconds = recorded.profile(x, 1)
        # The clock is that of whichever thread ends a step, so that none is lost when the first comes late.
        assert min(seconds) > 0
        assert sum(seconds) <= time.perf_counter() - start


@compiled
def test_a_segmentation_network_is_replayed_to_its_last_layer() -> None:
    model = models.espnetv2_segmentation(0.5, 4)
    found = espkernels.explain(espkernels.freeze(model), photograph(64, 96))
    assert found.refusal == ""
    expected = models.count(model, (64, 96)).by_module
    (unit,) = (row for row in found.rows if row.layer == "base_net.level4.6")
    assert unit.multiply_adds == expected["base_net.level4.6"].macs
    # A decoder's layers: projection, branches and merge, expansion; pooling and resizing are no convolutions.
    decoder = [row for row in found.rows if row.layer.partition(".")[0] == "bu_dec_l1"]
    kernels = [kernel for row in decoder for kernel in row.kernels or (row,)]
    macs = sum(kernel.multiply_adds or 0 for kernel in kernels if kernel.kernel not in ("resize", "adaptive_average"))
    assert macs == expected["bu_dec_l1"].macs


@compiled
def test_layers_are_modules_of_the_model_in_the_order_they_run() -> None:
    frozen = espkernels.freeze(network())
    found = espkernels.explain(frozen, photograph(64, 96))
    for row in found.rows:
        assert row.kind == type(frozen.get_submodule(row.layer)).__name__
        assert row.runs_on == backends.library.isa()  # type: ignore[union-attr]
        assert row.seconds > 0
    layers = [row.layer for row in found.rows if row.layer.startswith("level")]
    assert layers[:4] == ["level1", "level2_0.image_convolution", "level2_0", "level3_0.image_convolution"]
    assert layers[-1] == "level5.4"
    assert found.rows[-1].layer == "classifier"
    unit = next(row for row in found.rows if row.layer == "level3.0")
    assert unit.kernel == "reduce, pyramid and expand"
    assert [kernel.kernel for kernel in unit.kernels] == ["reduce", "pyramid and expand"]
    assert sum(kernel.seconds for kernel in unit.kernels) == pytest.approx(unit.seconds)
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.seconds)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_unit_by_hand(dtype: torch.dtype) -> None:
    channels, pixels = 32, 48 * 56
    frozen = espkernels.freeze(nn.Sequential(espkernels.nn.EESP(channels, channels)).to(dtype))
    (row,) = espkernels.explain(frozen, map_of(channels, 48, 56, dtype=dtype)).rows
    map_bytes = channels * pixels * dtype.itemsize
    weights = sum(kernel.moved or 0 for kernel in row.kernels) - int(3.5 * map_bytes)
    # reads x, writes and reads the reduced quarter, reads the residual, writes: 3.5 maps where 2 would do.
    assert row.moved == 3.5 * map_bytes + weights
    assert row.ideal == 2 * map_bytes + weights
    # Weights are prepared: rows padded to whole vectors, in float32.
    numbers = channels * channels // 4 // 4 + 9 * channels + channels * channels // 4
    assert numbers * dtype.itemsize <= weights <= 16 * 4 * numbers
    reduce, rest = row.kernels
    assert (reduce.moved or 0) + (rest.moved or 0) == row.moved
    assert reduce.moved == reduce.ideal


@compiled
def test_halves_of_a_down_sampler_count_their_own_channels() -> None:
    unit = espkernels.nn.DownSampler(16, 48, reinf=False)
    (row,) = espkernels.explain(espkernels.freeze(nn.Sequential(unit)), map_of(16, 40, 60)).rows
    pool, reduce, rest = row.kernels
    assert pool.moved == 4 * (16 * 40 * 60 + 16 * 20 * 30)
    weights = (rest.ideal or 0) - 4 * (8 * 40 * 60 + 32 * 20 * 30)
    assert 0 < weights < 2**16
    whole = 4 * (16 * 40 * 60 + 48 * 20 * 30)
    reduced = (reduce.moved or 0) - 4 * (16 + 8) * 40 * 60
    assert row.ideal == whole + weights + reduced


@compiled
def test_every_result_is_to_be_written() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = espkernels.nn.EESP(16, 16), espkernels.nn.EESP(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x)

    rows = espkernels.explain(espkernels.freeze(Twice()), map_of(16, 40, 60)).rows
    assert rows[0].ideal == rows[1].ideal


@compiled
def test_roof_is_the_slower_ceiling() -> None:
    found = espkernels.explain(espkernels.freeze(network()), photograph(64, 64))
    for row in found.rows:
        assert row.ideal is not None and row.multiply_adds is not None and row.moved is not None
        assert row.moved >= row.ideal > 0
        least = max(row.ideal / 1e10, 2 * row.multiply_adds / 1e11)
        assert row.share_of_roof == pytest.approx(least / row.seconds)
        assert row.bound == ("bytes" if row.ideal / 1e10 >= 2 * row.multiply_adds / 1e11 else "arithmetic")
        assert row.flops_per_second == pytest.approx(2 * row.multiply_adds / row.seconds)


@compiled
def test_a_model_that_is_not_frozen_is_copied() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = espkernels.explain(model, photograph(64, 64))
    assert any("frozen copy" in note for note in found.notes)
    assert found.model == "ESPNetv2"
    assert type(model) is models.ESPNetv2 and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@compiled
def test_a_single_frozen_layer() -> None:
    frozen = espkernels.freeze(espkernels.nn.EESP(16, 16))
    (row,) = espkernels.explain(frozen, map_of(16, 9, 11)).rows
    assert (row.layer, row.kind) == ("", "FrozenEESP")


class _Softened(nn.Module):
    """A network with an operation that no kernel of this library does."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = espkernels.nn.EESP(16, 16)
        self.inner = nn.Sequential(nn.Softmax(1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.unit(x)).cumsum(2)


@compiled
def test_a_model_that_is_not_replayed_says_why() -> None:
    found = espkernels.explain(espkernels.freeze(_Softened()), map_of(16, 20, 24))
    assert "aten._softmax" in found.refusal
    assert [(row.layer, row.kind) for row in found.rows] == [
        ("unit", "FrozenEESP"), ("inner.0", "Softmax"), ("", "Frozen_Softened")
    ]  # fmt: skip
    kernels = {row.layer: row.kernel for row in found.rows}
    assert "eesp" in kernels["unit"] and kernels["inner.0"] == kernels[""] == "torch"
    assert found.rows[1].runs_on == "torch"
    assert all(row.seconds > 0 for row in found.rows)
    assert found.multiply_adds is None
    text = str(found)
    assert f"not replayed: {found.refusal}" in text and "of roof" not in text


@compiled
def test_hooks_are_a_reason_too() -> None:
    frozen = espkernels.freeze(network())
    frozen.level1.register_forward_hook(lambda *_: None)
    found = espkernels.explain(frozen, photograph(64, 64))
    assert "hooks" in found.refusal and found.rows[0].kernel == "convolution"


def test_the_reference_is_explained_too() -> None:
    with espkernels.use_backend("reference"):
        found = espkernels.explain(espkernels.freeze(_Softened()), map_of(16, 20, 24))
    assert "reference" in found.refusal
    assert {row.runs_on for row in found.rows} == {"torch"}


@compiled
def test_no_roof_in_float64() -> None:
    found = espkernels.explain(espkernels.freeze(network().double()), photograph(64, 64, dtype=torch.float64))
    assert found.refusal == "" and found.ceilings is None
    assert all(row.share_of_roof is None and row.flops_per_second for row in found.rows)


@compiled
def test_json_text_and_picture(tmp_path: Path) -> None:
    found = espkernels.explain(espkernels.freeze(network()), photograph(64, 64))
    plain = found.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert sum(row["share"] for row in plain["rows"]) == pytest.approx(1)
    table = str(found).partition("\n\n")[2].splitlines()
    assert len(table) == 2 + sum(1 + len(row.kernels) for row in found.rows)
    # Numbers stand under the ends of their heads.
    assert len({len(line) for line in table if line.endswith(("bytes", "arithmetic"))}) == 1
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra 'bench'")
    found.save(tmp_path / "explain.png")
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    row = Row("a", "B", "torch", "torch", 1.0)
    with pytest.raises(ImportError, match=r"espkernels\[bench\]"):
        Explanation("M", "", 1, "torch", "why", (), 1.0, (row,)).save(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("model", "sample", "error", "message"),
    [
        ("name", torch.rand(1, 3, 8, 8), TypeError, "model: got str"),
        (nn.Identity(), [1.0], TypeError, "sample: got list"),
        (nn.Identity(), torch.rand(0, 3, 8, 8), ValueError, "sample: got shape"),
        (nn.Identity(), torch.rand(1, 3, 8, 8, device="meta"), ValueError, "on meta"),
    ],
)
def test_bad_arguments(model: Any, sample: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        espkernels.explain(model, sample)


def test_running_names_the_modules_inside_one_another() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Identity())
    seen: list[tuple[str, ...]] = []
    with running(model, lambda names: seen.append(tuple(names))) as now:
        model(torch.rand(1))
    assert seen == [(), ("0",), ("0", "0.0"), ("0",), (), ("1",)]
    model(torch.rand(1))
    assert len(seen) == 6 and now == []


@compiled
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra 'bench'")
    given = ["--scale", "0.5", "--classes", "4", "--size", "64x96", "--threads", "1"]
    written = ["-o", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    assert main(["explain", *given, *written]) == 0
    out = capsys.readouterr().out
    assert "1x3x64x96 float32" in out and "level4.6" in out
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["layer"] == "level1"
    assert (tmp_path / "a.png").exists()
    assert main(["explain", "--segmentation", "--scale", "0.5", "--size", "32x32"]) == 0
    assert "ESPNetv2Segmentation, 1x3x32x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scale", "-1"], "scale: got -1"),
        (["-o", "no such folder/a.png"], "--output: there is no folder"),
    ],
)
def test_command_with_bad_arguments(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "64"], "expected height x width"),
        (["--threads", "0"], "--threads: got 0"),
        (["--weights", "no such.pth"], "--weights: there is no file no such.pth"),
    ],
)
def test_command_with_an_option_that_cannot_be(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explain", *given])
    assert message in capsys.readouterr().err


@compiled
def test_the_ceiling_is_that_of_what_is_multiplied() -> None:
    unit = espkernels.nn.EESP(16, 16).eval()
    as_it_is = backends.library is not None and backends.library.multiplies_bfloat16()
    for dtype, multiplied in (
        (torch.float32, "torch.float32"),
        (torch.float16, "torch.float32"),
        (torch.bfloat16, "torch.bfloat16" if as_it_is else "torch.float32"),
    ):
        found = espkernels.explain(unit.to(dtype), map_of(16, 9, 11, dtype=dtype))
        assert found.ceilings is not None and found.ceilings.dtype == multiplied
