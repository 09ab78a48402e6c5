"""Large results of replays: each the caller's own while it is held, in any form, and its memory used again after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replaying import layers, photograph, stem, the_plan
from test_freeze import trained
from torch import Tensor, nn

import espkernels
from espkernels import backends
from espkernels.result_memory import KEPT_BYTES, ResultMemory

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("threads"),
]

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda result: result,
    "view": lambda result: result[0, 3],
    "detached": lambda result: result.detach(),
    "array": lambda result: result.numpy(),
    "array of a view": lambda result: result[0, 3].numpy(),
    "exchange": lambda result: torch.utils.dlpack.to_dlpack(result),
    "storage": lambda result: result.untyped_storage(),
}


@pytest.fixture(scope="module")
def frozen() -> Any:
    return espkernels.freeze(trained(nn.Sequential(stem(1))).eval())


def large(seed: int) -> Tensor:
    x = photograph(1, 3, 256, 257) + seed
    assert KEPT_BYTES < 16 * 256 * 257 * 4
    return x


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_memory_that_is_held_is_nobody_elses(frozen: Any, form: str) -> None:
    frozen(large(0))
    (memory,) = (result.memory for result in the_plan(frozen).results)
    result = frozen(large(0))
    place, held = result.data_ptr(), FORMS[form](result)
    del result
    assert not memory._free
    others = [frozen(large(seed)) for seed in (1, 2)]
    assert len({place, *(other.data_ptr() for other in others)}) == 3
    del held
    assert len(memory._free) == 1 and memory._free[0].data_ptr() == place
    again = frozen(large(3))
    assert again.data_ptr() == place
    del others, again
    assert len(memory._free) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_result_is_like_any_other(frozen: Any, mode: Callable[[], Any]) -> None:
    x = torch.cat([large(0), large(1)])
    with mode():
        expected = layers(frozen, x)
        for given, right in ((x, expected), (x[:1], expected[:1]), (x, expected)):
            result = frozen(given)
            assert (
                torch.equal(result, right)
                and result.stride() == right.contiguous(memory_format=torch.channels_last).stride()
            )
            assert not result._is_view() and result.is_leaf and not result.requires_grad
            assert result.is_inference() == torch.is_inference_mode_enabled()
            assert result.data_ptr() % 64 == 0
            result.zero_()  # the next one has its own numbers


def test_threads_have_memory_of_their_own(frozen: Any) -> None:
    inputs = [large(seed) for seed in range(4)]
    with torch.no_grad():
        expected = [layers(frozen, x) for x in inputs]
    failures: list[int] = []

    def caller(turn: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                result = frozen(inputs[turn])
                if not torch.equal(result, expected[turn]):
                    failures.append(turn)

    callers = [threading.Thread(target=caller, args=(turn,)) for turn in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures


def test_one_block_of_the_last_size_is_kept() -> None:
    memory = ResultMemory()

    def empty(count: int) -> Tensor:
        return memory.empty((count,), (1,), torch.float32, count)

    held = [empty(8) for _ in range(3)]
    held.clear()
    assert [len(block) for block in memory._free] == [32]
    other = empty(5)
    assert not memory._free and other.untyped_storage().nbytes() == 20
    with pytest.raises(RuntimeError, match="not resizable"):
        other.resize_(100)
