"""Models whose forward pass cannot be replayed say why, and give the right result all the same."""

from __future__ import annotations

import copy
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replaying import layers, own, photograph, stem, the_plan
from test_freeze import trained
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import espkernels
from espkernels import backends, inference

pytestmark = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


class Body(nn.Module):
    """A stem, then what a subclass does with its map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(2)
        self.head = nn.Linear(16, 5)
        self.extra = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("mixing", torch.eye(16))

    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError  # each subclass has its own

    def logits(self, y: Tensor) -> Tensor:
        result: Tensor = self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))
        return result


class Softmax(Body):
    def forward(self, x: Tensor) -> Any:
        return self.logits(self.stem(x).softmax(1))


class InPlace(Body):
    def forward(self, x: Tensor) -> Any:
        logits = self.logits(self.stem(x))
        logits += 1
        return logits


class Branch(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.logits(y) if y.sum() > 0 else -self.logits(y)


class BranchInPython(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        logits = self.logits(y)
        return logits if logits.tolist()[0][0] > 0 else self.logits(self.stem(-x))


class BranchInNumpy(Body):
    def forward(self, x: Tensor) -> Any:
        logits = self.logits(self.stem(x))
        return logits if logits.numpy()[0, 0] > 0 else self.logits(self.stem(-x))


class Wraps(Body):
    def forward(self, x: Tensor) -> Any:
        try:
            return self.logits(self.stem(x).tanh())
        except Exception as error:
            raise ValueError("no") from error


class Scalar(Body):
    def forward(self, x: Tensor) -> Any:
        return self.mixing.sum()


class Named(Body):
    def forward(self, x: Tensor) -> Any:
        return "logits", self.logits(self.stem(x))


class Twice(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return y, y


class TwoLayouts(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return torch.cat([y.contiguous(), y.contiguous()], dim=1)


class WithAConstant(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return torch.cat([y, torch.ones(len(y), 16, 8, 9).contiguous(memory_format=torch.channels_last)], dim=1)


class WithAGate(Body):
    def forward(self, x: Tensor) -> Any:
        mean = nn.functional.adaptive_avg_pool2d(self.stem(x), 1)
        return torch.cat([mean, mean.sigmoid()], dim=1)


class TorchsConvolution(Body):
    def forward(self, x: Tensor) -> Any:
        return self.logits(nn.functional.conv2d(self.stem(x), self.extra.weight, padding=1))


class Swallows(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        try:
            return self.logits(y.softmax(1))
        except Exception:
            return self.logits(y)


class MeanInDouble(Body):
    def forward(self, x: Tensor) -> Any:
        return self.stem(x).mean((2, 3), dtype=torch.float64)


class OwnWeights(Body):
    """Weights made of the image: every one has its own."""

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        mean = inference.global_average(y).view(1, -1)[:, :16].flatten()
        return espkernels.group_pointwise(y, torch.eye(16), 1, shift=mean)


class Pairs(Body):
    """Takes two images at a time."""

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.logits(y.reshape(y.shape[0] // 2, -1, *y.shape[2:])[:, ::2].repeat_interleave(2, 0))


class Switched(Body):
    """Reads a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.logits(y) if self.gate > 0 else y


class OwnBuffer(Body):
    """A buffer that load_state_dict changes, and no frozen layer hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.randn(8, 16))

    def forward(self, x: Tensor) -> Any:
        return espkernels.group_pointwise(self.stem(x), self.own, 1)


class FirstImage(Body):
    def forward(self, x: Tensor) -> Any:
        return self.logits(self.stem(x[:1]))


class NoImages(Body):
    def forward(self, x: Tensor) -> Any:
        return self.logits(self.stem(x)).squeeze(0).unsqueeze(0)


class TwiceAsManyImages(Body):
    def forward(self, x: Tensor) -> Any:
        logits = self.logits(self.stem(x))
        return torch.cat([logits, logits]).view(len(logits), -1)


class Tokens(Body):
    def forward(self, x: Tensor) -> Any:
        return self.stem(x).flatten(2)


REFUSED: dict[type[Body], str] = {
    Softmax: "softmax",
    InPlace: "add_",
    Branch: "sum",
    BranchInPython: "tolist",
    BranchInNumpy: "numpy",
    Wraps: "tanh",
    Scalar: "the result has shape []",
    Named: "a result is a str",
    Twice: "two results are one map",
    TwoLayouts: "cat",
    WithAConstant: "concatenate reads a map that no kernel of this library wrote",
    WithAGate: "sigmoid",
    TorchsConvolution: "convolution",
    Swallows: "softmax",
    MeanInDouble: "mean",
    OwnWeights: "shift",
    Pairs: "one image alone raises RuntimeError: shape",
    Switched: "reads a parameter or buffer that is not frozen",
    OwnBuffer: "has a parameter or buffer that is not frozen",
    FirstImage: "slice",
    NoImages: "squeeze",
    TwiceAsManyImages: "cat",
    Tokens: "the result",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_refused_with_a_reason_and_right(kind: type[Body]) -> None:
    frozen: Any = espkernels.freeze(trained(kind()).eval())
    for seed in range(3):
        x = torch.randn(2, 3, 15, 18, generator=torch.Generator().manual_seed(seed))
        actual, expected = frozen(x), own(frozen, x)
        actual, expected = (list(t) if isinstance(t, tuple) else [t] for t in (actual, expected))
        for one, other in zip(actual, expected, strict=True):
            if not isinstance(one, Tensor):
                assert one == other
            else:
                assert one.dtype == other.dtype and torch.equal(one, other)
    recorded = the_plan(frozen)
    assert recorded.plan is None and REFUSED[kind] in recorded.refusal, recorded.refusal


class Noisy(Body):
    def forward(self, x: Tensor) -> Any:
        return espkernels.group_pointwise(self.stem(x), torch.randn(16, 16), 1)


class Counting(Body):
    def forward(self, x: Tensor) -> Any:
        self.mixing.add_(1)
        return espkernels.group_pointwise(self.stem(x), self.mixing, 1)


@pytest.mark.parametrize(("kind", "reason"), [(Noisy, "randn.* draws random"), (Counting, r"add_.*\[16, 16\]")])
@torch.no_grad()
def test_constants_that_differ_from_call_to_call(kind: type[Body], reason: str) -> None:
    model: Any = trained(kind()).eval()
    frozen: Any = espkernels.freeze(model)
    other, x = copy.deepcopy(frozen), photograph(2, 3, 15, 18)
    for seed in range(3):
        torch.manual_seed(seed)
        actual = frozen(x)
        torch.manual_seed(seed)
        assert torch.equal(actual, own(other, x))
    assert torch.equal(frozen.mixing, other.mixing)
    assert the_plan(frozen).plan is None and re.search(reason, the_plan(frozen).refusal)


class ConstantsOfItsOwn(Body):
    """Changed in place by the pass that makes them."""

    def forward(self, x: Tensor) -> Any:
        return espkernels.group_pointwise(self.stem(x), torch.ones(16, 16).mul_(2).view(-1).add_(1).view(16, 16), 1)


@torch.no_grad()
def test_constants_of_the_pass_itself_may_change() -> None:
    frozen: Any = espkernels.freeze(ConstantsOfItsOwn().eval())
    x = photograph(2, 3, 9, 9)
    assert torch.equal(frozen(x), own(frozen, x)) and the_plan(frozen).plan is not None


class Raises(Body):
    error: Exception | None = None

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        if self.error is not None:
            raise self.error
        return self.logits(y)


SHORT = (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), KeyboardInterrupt(), *SHORT], ids=repr)
@torch.no_grad()
def test_a_recording_ends_where_forward_raises(error: Any) -> None:
    frozen: Any = espkernels.freeze(Raises().eval())
    x = photograph(1, 3, 9, 9)
    frozen.error = error
    for _ in range(2):
        with pytest.raises(type(error)):
            frozen(x)
    # Neither this model nor another finds a recording that still runs.
    frozen.error = None
    other: Any = espkernels.freeze(Raises().eval())
    for model in (frozen, other):
        assert torch.equal(model(x), layers(model, x))
    assert the_plan(other).plan is not None
    if isinstance(error, Exception) and error not in SHORT:
        assert the_plan(frozen).refusal == f"one image alone raises {type(error).__name__}: no"
    else:
        assert the_plan(frozen).plan is not None
    library: Any = backends.library
    with pytest.raises(RuntimeError, match="not recording"):
        library.end_recording([(0, 0)])


@pytest.mark.parametrize("where", ["beginning", "end"])
@torch.no_grad()
def test_an_interrupted_recording_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(Raises):
        at_end: Any = None

        def forward(self, x: Tensor) -> Any:
            result = super().forward(x)
            if self.at_end is not None:
                self.at_end()
            return result

    frozen: Any = espkernels.freeze(Watched().eval())
    x = photograph(1, 3, 9, 9)
    library: Any = backends.library

    def begin(*given: int) -> None:
        library.begin_recording(*given)
        raise KeyboardInterrupt

    def leave(*_: Any) -> None:
        raise KeyboardInterrupt

    def about_to_leave() -> None:
        for module in ("torch.utils._python_dispatch", "torch.overrides"):
            patch.setattr(f"{module}._pop_mode", leave)

    functions = torch._C._len_torch_function_stack()
    with monkeypatch.context() as patch:
        if where == "beginning":
            patch.setattr(backends, "library", SimpleNamespace(**{**vars(library), "begin_recording": begin}))
        else:
            frozen.at_end = about_to_leave
        with pytest.raises(KeyboardInterrupt):
            frozen(x)
    frozen.at_end = None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == functions
    assert torch.equal(frozen(x), layers(frozen, x))
    assert the_plan(frozen).plan is not None


@torch.no_grad()
def test_recordings_of_two_threads_leave_no_mode_on() -> None:
    class Slow(Raises):
        def forward(self, x: Tensor) -> Any:
            inside.set()
            time.sleep(0.02)
            return super().forward(x)

    frozen: Any = espkernels.freeze(Slow().eval())
    inside = threading.Event()

    @torch.no_grad()
    def call(size: int) -> None:
        frozen(photograph(1, 3, 9, size))

    first, second = (threading.Thread(target=call, args=(size,)) for size in (9, 10))
    first.start()
    assert inside.wait(30)
    second.start()  # while the first one records
    for thread in (first, second):
        thread.join(30)
    assert not is_in_torch_dispatch_mode()
    # The second one has not waited, since the first might wait for it, and its next call records.
    assert len(frozen.plans) == 1
    call(10)
    assert len(frozen.plans) == 2
    assert all(recorded.plan is not None for recorded in frozen.plans.values())


@torch.no_grad()
def test_a_forward_that_waits_for_another_thread_that_calls_a_frozen_model() -> None:
    inner: Any = espkernels.freeze(Raises().eval())

    class Waits(Raises):
        def forward(self, x: Tensor) -> Any:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(inner, x.detach().clone()).result(timeout=60)
            return super().forward(x)

    outer: Any = espkernels.freeze(Waits().eval())
    x = photograph(1, 3, 9, 9)
    assert torch.equal(outer(x), layers(outer, x))


class Tuned(Body):
    """A layer on top that still learns, of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Any:
        return espkernels.group_pointwise(self.stem(x), self.top, 1)


def test_layers_that_learn_keep_learning() -> None:
    frozen: Any = espkernels.freeze(Tuned().eval())
    x = photograph(1, 3, 9, 9)
    frozen(x).sum().backward()
    assert frozen.top.grad is not None
    with torch.no_grad():
        frozen(x)
        frozen.top.mul_(2)
        assert torch.equal(frozen(x), own(frozen, x))
