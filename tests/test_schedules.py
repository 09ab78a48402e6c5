"""Rates of learning beside the values that the paper and its released code list."""

from __future__ import annotations

from pathlib import Path

import pytest

from espkernels.__main__ import main
from espkernels.models.recipes.classification import Classification
from espkernels.models.recipes.schedules import cyclic, fixed, hybrid, steps


def rates(schedule: object, epochs: range) -> list[float]:
    return [round(schedule(epoch), 5) for epoch in epochs]  # type: ignore[operator]


def test_equation_1() -> None:
    schedule = cyclic()
    assert rates(schedule, range(7)) == [0.5, 0.4, 0.3, 0.2, 0.1, 0.5, 0.4]
    # Halved from the epoch on that the paper names; 49 ends a cycle.
    assert rates(schedule, range(48, 52)) == [0.2, 0.1, 0.25, 0.2]
    assert schedule(299) == pytest.approx(0.1 / 2**8)


def test_as_the_released_code_runs_it() -> None:
    schedule = cyclic(released=True)
    assert [schedule(epoch) for epoch in range(7)] == [0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.5]
    halved = (51, 101, 131, 161, 191, 221, 251, 281)
    for times, epoch in enumerate(halved, start=1):
        place = (epoch - 1) % 5
        assert schedule(epoch) == pytest.approx((0.5 - 0.1 * place) / 2**times, abs=5e-6)
        before = (epoch - 2) % 5
        assert schedule(epoch - 1) == pytest.approx((0.5 - 0.1 * before) / 2 ** (times - 1), abs=5e-6)
    # The last six that its log shows.
    assert [schedule(epoch) for epoch in range(294, 300)] == [0.00078, 0.00039, 0.00195, 0.00156, 0.00117, 0.00078]


def test_hybrid_of_segmentation() -> None:
    schedule = hybrid(0.007, 100)
    assert rates(schedule, range(6)) == [0.035, 0.028, 0.021, 0.014, 0.007, 0.035]
    assert schedule(49) == pytest.approx(0.007)
    falls = [schedule(epoch) - schedule(epoch + 1) for epoch in range(50, 100)]
    assert falls == pytest.approx([0.007 / 50] * 50) and schedule(50) == pytest.approx(0.007) and schedule(100) == 0
    released = hybrid(0.009, 100, cyclic_epochs=61, warm_up=1)
    assert rates(released, range(7)) == [0.009, 0.045, 0.036, 0.027, 0.018, 0.009, 0.045]
    assert released(60) == released(61) == pytest.approx(0.009)
    assert 0 < released(99) < released(98)


def test_table_6() -> None:
    assert rates(steps(0.1), range(0, 90, 15)) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert {fixed(0.1)(epoch) for epoch in range(90)} == {0.1}


def test_figure_4_is_drawn(tmp_path: Path) -> None:
    assert main(["paper", "--figure4", str(tmp_path / "figure4.png")]) == 0
    assert (tmp_path / "figure4.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"highest, lowest: got 0.4, 0.1, expected highest > 4 \* lowest > 0"):
        cyclic(0.4, 0.1)
    with pytest.raises(ValueError, match="cycle: got 0"):
        cyclic(cycle=0)
    with pytest.raises(ValueError, match="base: got 0"):
        hybrid(0, 10)
    with pytest.raises(ValueError, match="cyclic_epochs, epochs: got 0, 50, 10"):
        hybrid(0.1, 10)
    with pytest.raises(ValueError, match="every: got 0"):
        steps(0.1, 0)


@pytest.mark.parametrize(("epochs", "at"), [(90, (30, 60)), (12, (4, 8)), (100, (34, 68)), (11, (4, 8)), (5, (2, 4))])
def test_steps_are_two_whatever_the_epochs(epochs: int, at: tuple[int, int]) -> None:
    schedule = Classification("digits", schedule="steps", labels="0123456789").schedule(epochs)
    expected = [0.1 * 0.1 ** sum(epoch >= step for step in at) for epoch in range(epochs)]
    assert [schedule(epoch) for epoch in range(epochs)] == pytest.approx(expected)


def test_300_epochs_are_the_papers() -> None:
    schedule, expected = Classification("digits", labels="0123456789").schedule(300), cyclic()
    assert [schedule(epoch) for epoch in range(300)] == [expected(epoch) for epoch in range(300)]
