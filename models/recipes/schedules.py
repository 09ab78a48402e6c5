"""Rates of learning by epoch: the paper's equation 1, its hybrid for segmentation, and steps (sections 3.3, 4.1, 4.2).

A schedule is a function of the epoch, counted from 0: a run that goes on from a checkpoint needs no state of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["HALVED_AT", "Schedule", "cyclic", "fixed", "hybrid", "steps"]

Schedule = Callable[[int], float]

# The epochs of the paper's 300 on ImageNet from which both rates are half of what they were.
HALVED_AT = (50, 100, 130, 160, 190, 220, 250, 280)


def cyclic(
    highest: float = 0.5,
    lowest: float = 0.1,
    cycle: int = 5,
    halved_at: Sequence[int] = HALVED_AT,
    released: bool = False,
) -> Schedule:
    """Equation 1: ``highest - (epoch mod cycle) * lowest``, linear decay with warm restarts, halved at some epochs.

    Args:
        highest, lowest: the paper's eta_max and eta_min.
        cycle: epochs from one restart to the next, its T.
        halved_at: epochs from which both rates are halved, again at each.
        released: as the released code runs it: a first epoch at ``lowest``, everything after it an epoch later (the
            cycles go on across a halving either way), and rates of five decimals.

    Raises:
        ValueError: a rate that is not above 0, or would fall to 0 within a cycle.
    """
    if cycle < 1:
        raise ValueError(f"cycle: got {cycle}, expected at least 1")
    if not (lowest > 0 and highest > (cycle - 1) * lowest):
        raise ValueError(f"highest, lowest: got {highest}, {lowest}, expected highest > {cycle - 1} * lowest > 0")

    def rate(epoch: int) -> float:
        if released:
            if epoch == 0:
                return lowest
            epoch -= 1
        halvings = sum(epoch >= at for at in halved_at)
        value = (highest - (epoch % cycle) * lowest) / 2**halvings
        return round(value, 5) if released else value

    return rate


def hybrid(base: float, epochs: int, cycle: int = 5, cyclic_epochs: int = 50, warm_up: int = 0) -> Schedule:
    """Cycles from ``cycle * base`` down to ``base`` for the first epochs, then one straight line from ``base`` to 0.

    The paper's segmentation runs 100 epochs, 50 of them in cycles (section 4.2); the released code's begins with an
    epoch at ``base`` (``warm_up=1``) and cycles up to epoch 60 (``cyclic_epochs=61``). The last rate is above 0.

    Raises:
        ValueError: ``base`` not above 0, or more cyclic epochs than epochs.
    """
    if not base > 0:
        raise ValueError(f"base: got {base}, expected more than 0")
    if not 0 <= warm_up <= cyclic_epochs <= epochs:
        raise ValueError(
            f"warm_up, cyclic_epochs, epochs: got {warm_up}, {cyclic_epochs}, {epochs}, expected none above the next"
        )

    def rate(epoch: int) -> float:
        if epoch < warm_up:
            return base
        if epoch < cyclic_epochs:
            return base * (cycle - (epoch - warm_up) % cycle)
        return base * max(epochs - epoch, 0) / max(epochs - cyclic_epochs, 1)

    return rate


def steps(first: float, every: int = 30, factor: float = 0.1) -> Schedule:
    """``first``, times ``factor`` after each ``every`` epochs: Table 6's baseline."""
    if every < 1:
        raise ValueError(f"every: got {every}, expected at least 1")
    return lambda epoch: first * factor ** (epoch // every)


def fixed(rate: float) -> Schedule:
    """The same rate in every epoch."""
    return lambda epoch: rate
