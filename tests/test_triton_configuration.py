"""The tiles of the Triton kernels are plain functions of the shape: bounded, and wide enough. Needs no Triton."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.cases import CASES
from espkernels.triton import configuration, tuning
from espkernels.triton.configuration import Tile, block_of, power_of_two


def test_powers_and_blocks() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]
    # 24 in three eights and no padding, rather than 32 with a quarter of it idle; of nearly equals the largest.
    assert [block_of(n, 8, 32) for n in (8, 16, 20, 24, 28, 32, 40, 64, 80)] == [8, 16, 8, 8, 32, 32, 8, 32, 16]
    assert [block_of(n, 8, 64) for n in (7, 14, 24, 48, 56, 112, 192)] == [8, 16, 8, 16, 64, 64, 64]


@pytest.mark.parametrize("channels_last", [False, True])
def test_pyramid_tiles_of_real_layers_hold_512_numbers_and_leave_little_idle(channels_last: bool) -> None:
    for case in CASES:
        tile = configuration.pyramid_tile(case.channels, *case.output_size, channels_last)
        sides = (tile.channels, tile.rows, tile.columns)
        assert all(side == power_of_two(side) for side in sides), case
        assert tile.channels * tile.pixels <= 512, case
        covered = 1
        for size, side in zip((case.channels, *case.output_size), sides, strict=True):
            covered *= -(-size // side) * side
        # 7 x 7 in tiles of 8 x 8 is 1.31 times as large; 20 channels in eights 1.2; 28 rows in eights 1.14.
        assert covered <= 1.31 * 1.2 * case.channels * case.output_size[0] * case.output_size[1], case


@pytest.mark.parametrize("dot", [False, True])
def test_product_tiles_are_what_tl_dot_takes_and_bounded(dot: bool) -> None:
    for outputs in (1, 7, 16, 20, 64, 300):
        for inputs in (1, 5, 16, 33, 129):
            unit = configuration.group_tile(inputs, outputs, 7, 3, dot)
            plain = configuration.pointwise_tile(outputs, inputs, 21, 4, dot)
            together = configuration.fused_tile(inputs, outputs, 7, 3, dot)
            for tile in (unit, plain, together):
                if dot:
                    assert min(tile.channels, tile.inputs, tile.pixels) >= 16, (outputs, inputs)
            assert together.inputs >= inputs
            assert dot or unit.channels * unit.inputs * unit.pixels <= 2048, (outputs, inputs)
            assert plain.channels * plain.pixels <= 64 * 128


def test_one_launch_is_for_the_last_level() -> None:
    assert configuration.eesp_tile(128, 32, 128, 49, True, True) is not None
    assert configuration.eesp_tile(64, 16, 64, 196, True, True) is None


def test_chunks_cover_the_steps_and_do_not_depend_on_the_device() -> None:
    assert configuration.gradient_chunks(0, 4) == 1
    assert configuration.gradient_chunks(1000, 1) == 250
    assert configuration.gradient_chunks(100000, 1) == configuration.ENOUGH_PROGRAMS
    assert configuration.gradient_chunks(100000, 1000) == 1


def milliseconds(run: object) -> float:
    """Two columns beside one another are the fastest here."""
    run()  # type: ignore[operator]
    return [3.0, 1.0, 2.0, float("inf")][len(STARTED) - 1]


STARTED: list[Tile] = []
TILES = configuration.candidates(Tile(8, 4, 16))


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What makes the next call one of a new process."""

    def begin() -> None:
        monkeypatch.setattr(tuning, "_kept", {})
        STARTED.clear()

    begin()
    return begin


def test_autotuning_keeps_the_fastest_and_measures_once(forget: Callable[[], None], tmp_path: Path) -> None:
    assert len(set(TILES)) == 4
    file = tmp_path / "not yet" / "tiles.json"
    for _ in range(2):
        assert tuning.fastest("a problem", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert list(TILES) == STARTED
    forget()
    assert tuning.fastest("a problem", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert STARTED == []
    assert tuning.fastest("another", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert len(json.loads(file.read_text())) == 2
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a problem": 3}', '{"a problem": {"channels": 1024}}'])
def test_what_is_no_tile_of_the_problem_is_measured_again(
    forget: Callable[[], None], tmp_path: Path, text: str
) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(text)
    assert tuning.fastest("a problem", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert list(TILES) == STARTED
    assert json.loads(file.read_text())["a problem"]["columns"] == 32


def test_autotuning_needs_no_folder_to_write_to(forget: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "tiles.json"
    assert tuning.fastest("a problem", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert tuning.fastest("a problem", TILES, STARTED.append, milliseconds, lambda: file) == TILES[1]
    assert list(TILES) == STARTED


def test_the_file_is_of_a_device_and_of_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU/80 GB")
    monkeypatch.setenv("ESPKERNELS_CACHE", str(tmp_path))
    assert tuning._file().parent == tmp_path
    assert tuning._file().name.startswith("tiles-Some-GPU-80-GB-triton-")
    monkeypatch.delenv("ESPKERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning._file().parent == tmp_path / "cache" / "espkernels"
