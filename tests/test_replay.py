"""Replays of frozen networks have the bits of the layers one by one, for every shape and number of threads."""

from __future__ import annotations

import copy
import io
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replaying import layers, own, photograph, stem, the_plan
from test_freeze import trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import espkernels
from espkernels import backends, models, replay
from espkernels.models import plain
from espkernels.replay import Replayed

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("threads"),
]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(models.espnetv2(0.5, num_classes=10)).eval()


@pytest.fixture
def frozen(network: nn.Module) -> Any:
    torch.set_num_threads(2)
    return espkernels.freeze(network)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (97, 65), (64, 131), (33, 32)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_the_bits_of_the_layers(frozen: Any, size: tuple[int, int], channels_last: bool) -> None:
    for batch in (1, 2, 3, 5) if size[0] < 200 else (1, 3):
        x = photograph(batch, 3, *size, channels_last=channels_last)
        torch.set_num_threads(1)
        expected = layers(frozen, x)
        plain = own(frozen, x)
        # Torch's own mean before the classifier adds in another order.
        assert torch.allclose(expected, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(frozen(x), expected), (batch, threads)
    assert the_plan(frozen).plan is not None


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["float64", "bfloat16", "float16"]
)
@torch.no_grad()
def test_other_types(network: nn.Module, dtype: torch.dtype) -> None:
    frozen: Any = espkernels.freeze(copy.deepcopy(network).to(dtype))
    x = photograph(2, 3, 65, 64).to(dtype)
    torch.set_num_threads(2)
    assert torch.equal(frozen(x), layers(frozen, x))
    assert the_plan(frozen).plan is not None


@torch.no_grad()
def test_every_instruction_set(isa: str, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network)
    x = photograph(2, 3, 64, 65)
    torch.set_num_threads(2)
    assert torch.equal(frozen(x), layers(frozen, x))
    assert the_plan(frozen).plan is not None


@torch.no_grad()
def test_a_map_as_result() -> None:
    body: Any = espkernels.freeze(trained(nn.Sequential(stem(2), plain.EESP(16, 16))).eval())
    for channels_last in (False, True):
        x = photograph(3, 3, 17, 22, channels_last=channels_last)
        result = body(x)
        assert torch.equal(result, own(body, x)) and result.stride() == own(body, x).stride()
    assert [recorded.refusal for recorded in body.plans.values()] == ["", ""]


class Several(nn.Module):
    """A map of the stem, one made of it, and the classes of that, as somebody might return them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = stem(2), plain.EESP(16, 16)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.stem(x)
        z = self.unit(y)
        return {"maps": [y, z], "classes": z.argmax(1)}


@torch.no_grad()
def test_several_results() -> None:
    body: Any = espkernels.freeze(trained(Several()).eval())
    for batch in (1, 2, 3, 5):
        x = photograph(batch, 3, 17, 22)
        actual, expected = body(x), own(body, x)
        assert actual.keys() == expected.keys() and torch.equal(actual["classes"], expected["classes"])
        for one, other in zip(actual["maps"], expected["maps"], strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
    assert the_plan(body).refusal == ""


@pytest.mark.parametrize("configuration", ["paper", "released"])
@torch.no_grad()
def test_a_detection_network(configuration: str) -> None:
    """Its joins concatenate maps, its confidences and locations those of all six."""
    network = models.espnetv2_detection(0.5, 5, 96, configuration=configuration)
    frozen: Any = espkernels.freeze(trained(network).eval())
    for batch in (1, 3):
        x = photograph(batch, 3, 96, 96)
        for actual, expected, plain_ in zip(frozen(x), layers(frozen, x), own(frozen, x), strict=True):
            assert torch.equal(actual, expected) and actual.stride() == plain_.stride()
            assert torch.allclose(actual, plain_, rtol=1e-5, atol=1e-5 * plain_.abs().max().item())
        for actual, expected in zip(frozen.detect(x), network.detect(x), strict=True):
            assert len(actual.scores) == len(expected.scores)
    assert the_plan(frozen).refusal == ""
    concatenations = [step[0] for step in the_plan(frozen).plan.steps()].count("concatenate")
    assert concatenations == 4 * 2 + 2 * 6  # four joins of two maps, two results of six


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_a_unit_alone_turns_a_contiguous_map_around(dtype: torch.dtype) -> None:
    unit: Any = espkernels.freeze(trained(plain.EESP(16, 16)).eval().to(dtype))
    x = torch.randn(3, 16, 9, 11).to(dtype)
    expected = own(unit, x)
    for layout, turned in ((torch.contiguous_format, ["change_layout"]), (torch.channels_last, [])):
        result = unit(x.contiguous(memory_format=layout))
        assert torch.equal(result, expected) and result.is_contiguous(memory_format=torch.channels_last)
        *_, recorded = unit.plans.values()
        assert [step[0] for step in recorded.plan.steps()] == [*turned, "reduce", "pyramid and expand"]


@torch.no_grad()
def test_rows_of_a_large_map_are_reduced_on_the_way() -> None:
    # 24 reduced channels of 150x150 are 2.2 MB, more than any second-level cache.
    unit: Any = espkernels.freeze(trained(plain.EESP(32, 96, stride=2)).eval())
    x = torch.randn(1, 32, 150, 150).contiguous(memory_format=torch.channels_last)
    assert torch.equal(unit(x), layers(unit, x))
    assert [step[0] for step in the_plan(unit).plan.steps()] == ["reduce, pyramid and expand"]


@torch.no_grad()
def test_a_bounded_number_of_plans(frozen: Any) -> None:
    for width in range(33, 33 + replay.KEPT + 3):
        x = photograph(1, 3, 32, width)
        frozen(x)
    assert len(frozen.plans) == replay.KEPT
    assert torch.equal(frozen(x), layers(frozen, x))


@torch.no_grad()
def test_one_plan_a_shape(frozen: Any) -> None:
    for batch in (1, 4, 2):
        frozen(photograph(batch, 3, 64, 64))
    assert len(frozen.plans) == 1
    frozen(photograph(1, 3, 64, 65))
    frozen(photograph(1, 3, 64, 64, channels_last=True))
    assert len(frozen.plans) == 3
    frozen(photograph(2, 3, 65, 64)[:, :, :64])  # not dense: no plan fits, and none is made
    assert len(frozen.plans) == 3
    assert frozen(photograph(0, 3, 64, 64)).shape == (0, 10)


@torch.no_grad()
def test_hooks_of_layers_are_called(frozen: Any) -> None:
    ran = []
    x = photograph(1, 3, 64, 64)
    for when in ("before the recording", "after it"):
        for register in (frozen.level1.register_forward_hook, frozen.level3_0.register_forward_pre_hook):
            handle = register(lambda *_: ran.append(1))
            frozen(x)
            frozen(x)
            assert len(ran) == 2, when
            handle.remove()
            ran.clear()
        replayed = frozen(x)
        assert the_plan(frozen).plan is not None and not ran
    # Those of the model itself run around every call.
    frozen.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(frozen(x), replayed) and ran == [1]


# --- layers that change -----------------------------------------------------------------------------------------------


EXCHANGES: dict[str, Callable[[Any], Any]] = {
    "exchanged": lambda m: setattr(m, "classifier", nn.Identity()),
    "exchanged deep inside": lambda m: m.level3.__setitem__(0, nn.Identity()),
    "removed": lambda m: m.level3.__delitem__(-1),
    "added": lambda m: m.level3.append(nn.AvgPool2d(3, 1, 1, divisor_override=1)),
}


@pytest.mark.parametrize("how", EXCHANGES, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_other_layers_outdate_plans(frozen: Any, how: str) -> None:
    x = photograph(2, 3, 64, 64)
    before = frozen(x)
    EXCHANGES[how](frozen)
    after = frozen(x)
    truth = own(frozen, x)
    largest = truth.abs().max().item()
    assert torch.allclose(after, truth, rtol=1e-5, atol=1e-5 * largest)
    # A unit of an untrained network moves its result by thousandths of the largest number: 100 times the rounding.
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=0, atol=1e-4 * largest)
    assert torch.equal(frozen(x), after)


# --- weights that change ----------------------------------------------------------------------------------------------


def scaled(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 1.5 for name, value in model.state_dict().items()}


def edited_and_loaded(model: nn.Module) -> None:
    for value in model.buffers():
        value.mul_(1.5)
    model.load_state_dict(model.state_dict())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "edits in place and load_state_dict": edited_and_loaded,
    "load_state_dict": lambda m: m.load_state_dict(scaled(m)),
    "load_state_dict of a layer": lambda m: m.level2_0.load_state_dict(scaled(m.level2_0)),
    "to": lambda m: m.double(),
    "_apply": lambda m: m._apply(lambda t: t * 1.5),
    "_apply of a layer": lambda m: m.level3_0._apply(lambda t: t * 1.5),
    "_apply of the classifier": lambda m: m.classifier._apply(lambda t: t * 1.5),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_changed_weights_outdate_plans(frozen: Any, change: str) -> None:
    x = photograph(2, 3, 64, 64)
    before = frozen(x)
    CHANGES[change](frozen)
    x = x.to(frozen.level1.weight.dtype)
    after = frozen(x)
    assert torch.equal(after, layers(frozen, x))
    assert not torch.equal(after, before.to(after.dtype))
    assert the_plan(frozen).plan is not None


@torch.no_grad()
def test_copies_and_files(frozen: Any, network: nn.Module) -> None:
    x = photograph(2, 3, 64, 65)
    expected = frozen(x)
    memory = io.BytesIO()
    torch.save(frozen, memory)
    memory.seek(0)
    for other in (
        copy.deepcopy(frozen),
        copy.copy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(memory, weights_only=False),
        espkernels.freeze(frozen),
    ):
        assert type(other) is type(frozen) and isinstance(other, (Replayed, type(network)))
        assert not other.plans and not other.training
        assert torch.equal(other(x), expected)
        assert the_plan(other).plan is not None
    other = espkernels.freeze(trained(copy.deepcopy(network), seed=3))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), expected)


class Locked(nn.Module):
    """What cannot be copied, left out of its state and made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = trained(plain.EESP(16, 16))
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.unit(x)


@torch.no_grad()
def test_copies_by_the_state_that_the_model_gives() -> None:
    frozen: Any = espkernels.freeze(Locked().eval())
    x = photograph(1, 16, 9, 11)
    expected = frozen(x)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert again.plans == {} and again.lock is not frozen.lock
        assert torch.equal(again(x), expected) and the_plan(again).plan is not None


# --- what else torch does with models ---------------------------------------------------------------------------------


def test_gradients(frozen: Any) -> None:
    x = photograph(1, 3, 64, 64)
    assert not frozen(x).requires_grad and frozen.plans
    gradients = []
    for function in (frozen, lambda leaf: own(frozen, leaf)):
        leaf = x.clone().requires_grad_()
        (function(leaf) * torch.arange(10)).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None and torch.equal(*gradients)
    with torch.no_grad():
        assert torch.equal(frozen(leaf), frozen(x))


def test_training_mode_runs_the_layers(frozen: Any) -> None:
    frozen.train()
    frozen(photograph(1, 3, 64, 64))
    assert not frozen.plans


def test_compile_and_export(frozen: Any) -> None:
    x = photograph(2, 3, 64, 64)
    with torch.no_grad():
        expected = own(frozen, x)
        torch.compiler.reset()
        assert torch.equal(torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(frozen, (x,)).module()(x), expected)
        assert not frozen.plans


@torch.no_grad()
def test_tracing(frozen: Any) -> None:
    x = photograph(2, 3, 64, 64)
    assert torch.equal(torch.jit.trace(frozen, (x,), check_trace=False)(x), own(frozen, x))
    assert not frozen.plans


@torch.no_grad()
def test_autocast_and_backends(frozen: Any) -> None:
    x = photograph(1, 3, 64, 64)
    replayed = frozen(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = own(frozen, x)
        assert torch.equal(frozen(x), expected) and expected.dtype == torch.bfloat16
    with espkernels.use_backend("reference"):
        assert torch.equal(frozen(x), own(frozen, x))
    with espkernels.use_backend("cpu"):
        assert torch.equal(frozen(x), replayed)
    assert len(frozen.plans) == 1


@torch.no_grad()
def test_negated_views(frozen: Any) -> None:
    x = photograph(1, 3, 64, 64)
    assert torch.equal(frozen(torch._neg_view(-x)), own(frozen, x))
    assert not frozen.plans


class Composite(nn.Module):
    """Operations that torch makes of others, which inference mode hands over whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).contiguous(memory_format=torch.channels_last).to(x.dtype)
        return torch.concat([x, x], 1).mean((2, 3), keepdim=True).flatten(1).unflatten(1, (2, -1)).type_as(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_every_mode_of_inference_is_replayed(frozen: Any, mode: Callable[[], Any]) -> None:
    x = photograph(2, 3, 64, 64)
    segmentation = espkernels.freeze(trained(models.espnetv2_segmentation(0.5, 7)).eval())
    composite = espkernels.freeze(trained(Composite()).eval())
    calls: list[Callable[[Tensor], Tensor]] = [frozen, segmentation, segmentation.classes, composite]
    with torch.no_grad():
        expected = [layers(frozen, x), layers(segmentation, x), layers(segmentation, x).argmax(1), layers(composite, x)]
    with mode():
        for call, of_layers in zip(calls, expected, strict=True):
            assert torch.equal(call(x).to(of_layers.dtype), of_layers)
    for model, plans in ((frozen, 1), (segmentation, 2), (composite, 1)):
        assert [recorded.refusal for recorded in model.plans.values()] == [""] * plans
    assert torch.equal(frozen(x), expected[0])  # outside of the mode, where the plan stays


def test_a_frozen_model_inside_another() -> None:
    with torch.no_grad():
        inner = espkernels.freeze(trained(nn.Sequential(stem(1), plain.EESP(16, 16))).eval())
        outer: Any = espkernels.freeze(nn.Sequential(inner, plain.EESP(16, 16)).eval())
        x = photograph(2, 3, 9, 11)
        assert torch.equal(outer(x), own(outer, x))
        assert the_plan(outer).plan is not None


@torch.no_grad()
def test_python_threads_call_at_once(frozen: Any) -> None:
    # Plans are recorded and replayed side by side, each call in memory of its own.
    inputs = [photograph(batch, 3, 64, width) for batch in (1, 2, 3) for width in (64, 65)]
    expected = [layers(frozen, x) for x in inputs]
    failures: list[str] = []
    start = threading.Barrier(4)

    def caller(turn: int) -> None:
        with torch.no_grad():
            start.wait(timeout=30)
            for step in range(60):
                at = (step * (turn + 1) + turn) % len(inputs)
                if not torch.equal(frozen(inputs[at]), expected[at]):
                    failures.append(f"input {at} in thread {turn}")

    callers = [threading.Thread(target=caller, args=(turn,)) for turn in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not failures
    assert len(frozen.plans) == 2


@torch.no_grad()
def test_an_empty_batch_first(network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network)
    assert frozen(photograph(1, 3, 32, 48)[:0]).shape[0] == 0
    x = photograph(1, 3, 32, 48)
    assert torch.equal(frozen(x), layers(frozen, x))
    assert the_plan(frozen).plan is not None


@torch.no_grad()
def test_hooks_of_every_module_are_called(frozen: Any) -> None:
    x, names = photograph(1, 3, 32, 48), []
    frozen(x)
    with register_module_forward_hook(lambda module, *_: names.append(type(module).__name__)):
        frozen(x)
    assert names.count("FrozenEESP") > 10 and "FrozenConvolution" in names
    names.clear()
    frozen(x)
    assert names == []


# --- memory -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_take_turns_in_a_small_arena(frozen: Any) -> None:
    x = photograph(1, 3, 224, 224)
    frozen(x)
    plan = the_plan(frozen).plan
    maps = sum(sum(step_bytes) for *_, step_bytes in plan.steps())  # each at least once read or written
    assert plan.input_bytes == x.numel() * 4 and plan.output_bytes == [40]
    assert 0 < plan.arena_bytes < maps / 4
    # No step has more than its input, residual and result at once; the image pyramid lives beside them.
    assert plan.arena_bytes <= 4 * max(sum(step_bytes) for *_, step_bytes in plan.steps())


class Fork(nn.Module):
    """A map that two units read, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(1)
        self.first, self.second, *self.last = (plain.EESP(16, 16) for _ in range(4))
        self.last = nn.ModuleList(self.last)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stem(x)
        maps = [self.first(y), self.second(y)]
        return [last(one) for last, one in zip(self.last, maps, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_a_unit_is_stored_over_a_map_that_nobody_reads_again(dtype: torch.dtype) -> None:
    x = photograph(2, 3, 40, 44).to(dtype)
    size = 16 * 40 * 44 * x.element_size()  # of each map; a reduced one has a quarter of it
    units = nn.Sequential(stem(1), *(plain.EESP(16, 16) for _ in range(3)))
    chain, fork = (espkernels.freeze(trained(model).eval().to(dtype)) for model in (units, Fork()))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(chain(x), layers(chain, x))
        for one, other in zip(fork(x), layers(fork, x), strict=True):
            assert torch.equal(one, other)
    # The chain's maps take turns in the stem's place; the fork's first unit has to leave it for the second.
    assert the_plan(chain).plan.arena_bytes == size + size // 4
    assert the_plan(fork).plan.arena_bytes == 2 * size + size // 4


@torch.no_grad()
def test_replays_take_no_memory(frozen: Any) -> None:
    x = photograph(2, 3, 224, 224)
    for _ in range(20):
        frozen(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        frozen(x)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # In KiB. A thread that the pool starts late takes its working memory late, a few MiB once; a leak of one map of a
    # hundred KiB a call would be 20 MiB.
    assert grown < 16 * 1024, f"{grown} KiB more after 200 replays"


def test_a_first_forward_pass_imports_no_compiler() -> None:
    # Two seconds, for every process that only wants an image classified.
    code = """
import sys, torch, espkernels
with torch.no_grad():
    espkernels.freeze(espkernels.models.espnetv2(0.5, 5).eval())(torch.zeros(1, 3, 32, 32))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
