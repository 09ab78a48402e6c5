"""What freeze does with CUDA graphs, on stand-ins for them: no device is needed, and none of torch's own graphs runs.

A stand-in graph notes the operations of its capture and repeats them on the same tensors, so that it reads its input
and writes its result where they stood, as a graph on a device does. tests/test_cuda.py has the real ones.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_freeze import trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import espkernels
from espkernels import backends, graphs, models
from espkernels.graphs import Graphed
from espkernels.models import plain


class Graph:
    """Operations, and the tensors that they gave when captured."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            if isinstance(result, Tensor) and not func.is_view:
                result.copy_(again)


class Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.graph.steps.append((func, args, kwargs or {}, result))
        return result


class Cuda:
    """The functions of torch.cuda that the file calls; ``calls`` says which were, in their order."""

    CUDAGraph = Graph

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.graphs: list[Graph] = []

    def note(self, call: str) -> SimpleNamespace:
        self.calls.append(call)
        return SimpleNamespace(
            wait_event=lambda _: self.calls.append("wait for the last run"),
            wait_stream=lambda _: self.calls.append("wait for a stream"),
            record=lambda *_: self.calls.append("record"),
            synchronize=lambda: self.calls.append("synchronize"),
        )

    def current_stream(self, device: Any = None) -> SimpleNamespace:
        return self.note("current stream")

    def Stream(self, device: Any = None) -> SimpleNamespace:
        return self.note("side stream")

    def Event(self) -> SimpleNamespace:
        return self.note("event")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def device(self, device: Any) -> Any:
        return nullcontext()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append("on the side")
        yield

    @contextmanager
    def graph(self, graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.calls.append("capture")
        self.graphs.append(graph)
        with Capture(graph):
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stand_in = Cuda()
    monkeypatch.setattr(graphs, "cuda", stand_in)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    return stand_in


@pytest.fixture
def network() -> nn.Module:
    return trained(models.espnetv2(0.5, num_classes=10)).eval()


def image(*size: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def layers(frozen: Any, x: Tensor) -> Tensor:
    result: Tensor = type(frozen)._espkernels_base.forward(frozen, x)
    return result


@torch.no_grad()
def test_another_layer_outdates_a_graph(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    x = image(32, 48)
    frozen(x)
    frozen.classifier = nn.Identity()
    for _ in range(2):
        assert torch.equal(frozen(x), layers(frozen, x))
    assert len(cuda.graphs) == 2 and len(frozen.graphs) == 1


@torch.no_grad()
def test_captured_once_and_replayed(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    assert isinstance(frozen, Graphed) and isinstance(frozen, type(network))
    inputs = [image(32, 48, seed=seed) for seed in range(3)]
    results = [frozen(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):  # the earlier results are still what they were
        assert torch.equal(result, layers(frozen, x))
    (graph,) = cuda.graphs
    assert graph.replays == 3
    assert cuda.calls.count("wait for the last run") == 3
    # The side stream waits for the caller's, the caller's for the warm-up, and only then is the capture.
    capture = cuda.calls.index("capture")
    before, behind = cuda.calls[:capture], cuda.calls[capture + 1 : capture + 4]
    assert before == ["current stream", "side stream", "wait for a stream", "on the side", "wait for a stream"]
    assert behind == ["event", "current stream", "record"]


def test_a_graph_of_inference_mode_serves_outside_it(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    inputs = [image(32, 48, seed=seed) for seed in range(2)]
    with torch.inference_mode():
        frozen(inputs[0])
    with torch.no_grad():
        assert torch.equal(frozen(inputs[1]), layers(frozen, inputs[1]))
    assert len(cuda.graphs) == 1


@torch.no_grad()
def test_tf32_has_graphs_of_its_own(cuda: Cuda, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    for allowed in (False, True, False):
        monkeypatch.setattr(graphs, "allows_tf32", lambda allowed=allowed: allowed)
        frozen(image(32, 48))
    assert len(cuda.graphs) == 2


@torch.no_grad()
def test_a_backend_has_graphs_of_its_own(cuda: Cuda, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    for name in (None, "cpu", None):
        monkeypatch.setattr(backends, "current", lambda name=name: name)
        frozen(image(32, 48))
    assert len(cuda.graphs) == 2


@torch.no_grad()
def test_transforms_are_not_captured(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    x = torch.stack([image(32, 48, seed=seed) for seed in range(2)])
    results = torch.func.vmap(frozen)(x)
    assert cuda.graphs == []
    torch.testing.assert_close(results, torch.stack([layers(frozen, one) for one in x]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_kind_of_input_has_its_graph(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    kinds = [image(32, 32), image(32, 48), image(32, 32, batch=2)]
    kinds.append(kinds[0].contiguous(memory_format=torch.channels_last))
    for _ in range(2):
        for x in kinds:
            assert torch.equal(frozen(x), layers(frozen, x))
    assert len(frozen.graphs) == len(cuda.graphs) == len(kinds)


@torch.no_grad()
def test_the_graph_used_longest_ago_makes_room(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 3)
    frozen: Any = espkernels.freeze(nn.Sequential(trained(plain.EESP(16, 16)).eval()), graph=True)
    maps = [torch.randn(1, 16, 5, width) for width in range(4, 9)]
    for at in (0, 1, 2, 0, 3, 0, 4):
        frozen(maps[at])
        assert len(frozen.graphs) <= 3
    assert [key[1][3] for key in frozen.graphs] == [7, 4, 8]  # widths in the order of use
    assert cuda.calls.count("synchronize") == 2  # each dropped graph had ended
    assert len(cuda.graphs) == 5


@torch.no_grad()
def test_changed_weights_are_captured_anew(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    x = image(32, 32)
    before = frozen(x)
    frozen.load_state_dict({name: value * 1.5 for name, value in frozen.state_dict().items()})
    after = frozen(x)
    assert torch.equal(after, layers(frozen, x)) and not torch.equal(after, before)
    assert len(frozen.graphs) == 1 and len(cuda.graphs) == 2
    frozen.double()
    assert torch.equal(frozen(x.double()), layers(frozen, x.double()))
    assert len(frozen.graphs) == 1


@torch.no_grad()
def test_classes(cuda: Cuda) -> None:
    frozen: Any = espkernels.freeze(trained(models.espnetv2_segmentation(0.5, 5)).eval(), graph=True)
    x = image(32, 48)
    assert torch.equal(frozen.classes(x), layers(frozen, x).argmax(1).to(torch.uint8))
    assert torch.equal(frozen(x), layers(frozen, x))
    assert len(cuda.graphs) == 2


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"double": x * 2}


@torch.no_grad()
def test_results_of_several_tensors(cuda: Cuda) -> None:
    frozen: Any = espkernels.freeze(nn.Sequential(nn.Conv2d(3, 4, 1), Pair()).eval(), graph=True)
    inputs = [image(5, 6, seed=seed) for seed in (1, 2)]
    for result, x in zip([frozen(x) for x in inputs], inputs, strict=True):
        expected: Any = layers(frozen, x)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1]["double"], expected[1]["double"])


def test_calls_that_no_graph_serves(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    x = image(32, 32)
    leaf = x.clone().requires_grad_()
    frozen(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            frozen(x)
        handle = frozen.level1.register_forward_hook(lambda *_: None)
        frozen(x)
        handle.remove()
        cuda.capturing = True
        frozen(x)
        cuda.capturing = False
        frozen.train()
        frozen(x)
        frozen.eval()
        assert not cuda.graphs
        frozen(x)
        assert len(cuda.graphs) == 1
        ran = []
        handle = frozen.level1.register_forward_hook(lambda *_: ran.append(1))
        frozen(x)
        assert ran == [1]


@torch.no_grad()
def test_copies_capture_for_themselves(cuda: Cuda, network: nn.Module) -> None:
    frozen: Any = espkernels.freeze(network, graph=True)
    x = image(32, 32)
    expected = frozen(x)
    again: Any = espkernels.freeze(espkernels.freeze(network), graph=True)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), again):
        assert type(other) is type(frozen) and not other.graphs
        assert torch.equal(other(x), expected)


@torch.no_grad()
def test_threads_share_a_graph(cuda: Cuda) -> None:
    frozen: Any = espkernels.freeze(nn.Sequential(trained(plain.EESP(16, 16)).eval()), graph=True)
    maps = [torch.randn(1, 16, 6, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [layers(frozen, x) for x in maps]
    wrong: list[int] = []

    def caller(at: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(frozen(maps[at]), expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=caller, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong and len(cuda.graphs) == 1


def test_a_model_elsewhere_is_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"graph: level1\.weight of the model is on cpu, expected all of it on one"):
        espkernels.freeze(network, graph=True)
    with pytest.raises(ValueError, match="no parameters or buffers"):
        espkernels.freeze(nn.Sequential(nn.ReLU()), graph=True)


def test_moved_to_the_cpu_it_runs_plans(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: Any = espkernels.freeze(trained(models.espnetv2(0.5, num_classes=10)).eval(), graph=True)
    monkeypatch.setattr(graphs, "DEVICE", "cuda")
    with torch.no_grad():
        frozen(image(32, 32))
    assert not frozen.graphs
    if espkernels.backends.library is not None:
        assert len(frozen.plans) == 1
