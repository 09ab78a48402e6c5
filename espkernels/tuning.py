"""Measured choices of a frozen network: how finely the strips of each unit are cut on this machine.

A unit's pyramid runs strip by strip, and neighbouring strips both read the rows between them. One strip a thread reads
the fewest rows; more of them have smaller tiles, and threads that end together. Which is faster depends on the caches.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from espkernels import backends, replay

__all__ = ["Tuned", "tuned"]

# Strips for as many times the threads. The first is what a plan has untuned.
CUTS = (1, 2, 4)
# As plans take them.
FINEST = 64
ROUNDS = 15
# What differs less is noise, and stays as it was.
WORTH = 0.97


class Tuned(replay.Replayed):
    """Beside the class of a frozen model whose plans are cut as was measured.

    ``choices`` holds, for each kind of machine and input that was measured, the cuts of those steps of a plan that have
    a choice, in their order; it is the extra state of the model's ``state_dict``, as the bytes of its JSON.
    """

    choices: dict[str, list[int]]

    def _prepare(self, plan: Any, x: Tensor) -> None:
        cuts = plan.cuts
        chosen = self.choices.get(_key(x))
        # Plans of another version of the library may have other steps.
        if chosen is not None and len(chosen) == sum(cut > 0 for cut in cuts):
            left = iter(chosen)
            plan.cuts = [next(left) if cut else 0 for cut in cuts]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self.choices).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.choices = _choices(state)
        replay.forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            _choices(state)  # raises before any weight is loaded
        super()._load_from_state_dict(state_dict, prefix, *others)


def _choices(state: Any) -> dict[str, list[int]]:
    """The choices in an extra state. Raises ValueError where it is none."""
    given = state
    try:
        given = bytes(state.flatten().tolist())
        found = json.loads(given)
        if all(type(cut) is int and 1 <= cut <= FINEST for cuts in found.values() for cut in cuts):
            return {key: list(cuts) for key, cuts in found.items()}
    except (AttributeError, TypeError, ValueError):
        pass
    expected = f"the JSON of a dictionary of lists of cuts, 1 to {FINEST}, as bytes in a tensor"
    raise ValueError(f"_extra_state: got {str(given)[:200]}, expected {expected}")


def _key(x: Tensor) -> str:
    """Choices hold for one shape of an image, dtype, layout, instruction set and number of threads."""
    layout = "contiguous" if x.is_contiguous() else "channels_last"
    isa = backends.library.isa()  # type: ignore[union-attr]
    shape = "x".join(map(str, x.shape[1:]))
    return f"{shape} {str(x.dtype).removeprefix('torch.')} {layout} {isa} {torch.get_num_threads()} threads"


def tuned(model: nn.Module, sample: Tensor) -> nn.Module:
    """``model`` itself, frozen, its class joined with :class:`Tuned` and measured on ``sample``.

    Raises ValueError where no plan can be made for it.
    """
    if backends.library is None:
        raise ValueError(f"tune: {backends.why_not('cpu')}")
    joined: Any = replay.replayed(model, Tuned)
    joined.choices = {}
    if not joined._replayable(sample):
        raise ValueError("tune: expected a tensor [B, C, H, W] on the CPU, dense in memory, that asks for no gradient")
    with torch.no_grad():
        joined(sample)
    recorded = next(iter(joined.plans.values()), None)
    if recorded is None or recorded.plan is None:
        reason = recorded.refusal if recorded else "its hooks, or those of its layers, run the layers themselves"
        raise ValueError(f"tune: the model cannot be replayed on this input: {reason}")
    joined.choices[_key(sample)] = _fastest(recorded, sample)
    joined._prepare(recorded.plan, sample)
    return model


def _fastest(recorded: replay.Recorded, x: Tensor) -> list[int]:
    """The cut of each step that has a choice; all cuts by turns, so that what slows the machine meets them alike."""
    plan = recorded.plan
    steps = [step for step, cut in enumerate(plan.cuts) if cut]
    seconds: dict[int, list[list[float]]] = {cut: [] for cut in CUTS}
    for _ in range(ROUNDS):
        for cut in CUTS:
            plan.cuts = [cut if before else 0 for before in plan.cuts]
            seconds[cut].append(recorded.profile(x, 1))
    chosen = []
    for step in steps:
        medians = {cut: statistics.median(times[step] for times in seconds[cut]) for cut in CUTS}
        best = min(CUTS, key=lambda cut: medians[cut])
        chosen.append(best if medians[best] < WORTH * medians[CUTS[0]] else CUTS[0])
    return chosen
