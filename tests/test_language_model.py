"""The Efficient Recurrent Unit against numpy that goes step by step, and the language model made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from espkernels import freeze, models
from espkernels.models.eru import AXES, ERU, EESP1d, FrozenEESP1d

# Hidden width, axis, parameters with 10,000 words, embedding 400 and 3 layers.
SIZES = [
    (320, "step", 7_062_720),
    (320, "time", 7_062_720),
    (320, "features", 7_050_276),
    (768, "step", 15_111_488),
    (768, "time", 15_111_488),
    (768, "features", 15_088_292),
]


@pytest.fixture(autouse=True)
def one_thread(same_each_time: None) -> None:
    """Small tensors gain nothing from more, and lose much where the processors are shared."""


def trained(module: nn.Module) -> nn.Module:
    """``module`` in float64 and evaluation, with statistics and slopes that differ a channel."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            for tensor, low in zip(
                (part.weight, part.running_var, part.bias, part.running_mean), (0.5, 0.5, -0.5, -0.5), strict=True
            ):
                nn.init.uniform_(tensor, low, low + 1)
        elif isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight)
    return module.double().eval()


@pytest.mark.parametrize(("hidden", "axis", "parameters"), SIZES)
def test_parameters_of_table_4(hidden: int, axis: str, parameters: int):
    with torch.device("meta"):
        model = models.eru_language_model(10_000, 400, hidden, 3, axis=axis)
    found = models.count(model, sample=torch.zeros(1, 1, dtype=torch.int64))
    assert found.parameters == parameters
    if axis == "step":
        layers = [found.by_module[f"layers.{i}"].parameters for i in range(3)]
        assert layers == [m * n // 4 + 8 * n * n + 43 * n for m, n in ((400, hidden), (hidden, hidden), (hidden, 400))]


def numpy_layer(layer: ERU, x: np.ndarray) -> np.ndarray:
    """Outputs of one sequence [T, M] from zeros, by the definition of each step."""
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    hidden, axis = layer.hidden, layer.input.axis

    def norm_act(v: np.ndarray, norm: str, act: str) -> np.ndarray:
        v = (v - state[f"{norm}.running_mean"]) / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
        v = v * state[f"{norm}.weight"] + state[f"{norm}.bias"]
        return np.where(v > 0, v, v * state[f"{act}.weight"])

    def grouped(v: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Four matrices, each on its quarter of ``v``."""
        parts = zip(np.split(weight[:, :, 0], 4), np.split(v, 4), strict=True)
        return np.concatenate([matrix @ part for matrix, part in parts])

    reduced = [norm_act(grouped(v, state["input.reduce.0.weight"]), "input.reduce.1", "input.reduce.2") for v in x]
    h, c, outputs = np.zeros(hidden), np.zeros(hidden), []
    for t in range(len(x)):
        total, fused = np.zeros(hidden), []
        for branch, dilation in enumerate((1, 2, 3, 4)):
            weight = state[f"input.branches.{branch}.weight"][:, 0]
            if axis == "step":
                total = total + weight[:, 1] * reduced[t]
            elif axis == "time":
                for tap in range(3):
                    before = t - (2 - tap) * dilation
                    total = total + weight[:, tap] * (reduced[before] if before >= 0 else 0)
            else:
                wide = np.pad(reduced[t], dilation)
                total = total + sum(weight[0, tap] * wide[tap * dilation :][:hidden] for tap in range(3))
            fused.append(total)
        z = norm_act(np.concatenate(fused), "input.after_fusion.0", "input.after_fusion.1")
        gates = norm_act(grouped(z, state["input.expand.0.weight"]), "input.expand.1", "input.expand.2")
        gates = gates + state["recurrent.weight"] @ h + state["recurrent.bias"]
        entry, forget, candidate, exit_ = np.split(gates, 4)
        c = c / (1 + np.exp(-forget)) + np.tanh(candidate) / (1 + np.exp(-entry))
        h = np.tanh(c) / (1 + np.exp(-exit_))
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("axis", AXES)
def test_a_layer_against_its_definition(axis: str):
    layer = trained(ERU(20, 12, axis))
    x = torch.randn(13, 3, 20, dtype=torch.float64)
    with torch.no_grad():
        outputs, state = layer(x)
    for i in range(3):
        # Some dozens of float64 operations a step, whose errors the gates do not enlarge.
        np.testing.assert_allclose(outputs[:, i], numpy_layer(layer, x[:, i].numpy()), rtol=1e-11, atol=1e-12)
    assert torch.equal(state.hidden, outputs[-1])


@pytest.mark.parametrize("cut", [1, 3, 8, 20])
@pytest.mark.parametrize("axis", AXES)
def test_chunks_of_any_length_give_what_the_whole_text_gives(axis: str, cut: int):
    model = trained(models.eru_language_model(11, 8, 12, 3, axis=axis))
    tokens = torch.randint(0, 11, (23, 2))
    with torch.no_grad():
        expected, last = model(tokens)
        states, parts = None, []
        for chunk in tokens.split(cut):
            logits, states = model(chunk, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(states, last, strict=True):
        torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_no_step_sees_a_later_one_nor_the_unit_one_too_far_back(axis: str):
    unit = trained(EESP1d(8, 12, axis))
    x = torch.randn(30, 1, 8, dtype=torch.float64, requires_grad=True)
    gates, _ = unit(x, unit.no_context(x))
    gates[20].sum().backward()
    seen = {t for t in range(30) if x.grad[t].any()}
    reach = {20 - tap * dilation for tap in (0, 1, 2) for dilation in (1, 2, 3, 4)}
    assert seen == (reach if axis == "time" else {20})


@pytest.mark.parametrize("axis", AXES)
def test_which_taps_learn(axis: str):
    unit = EESP1d(8, 12, axis)
    x = torch.randn(5, 3, 8)
    gates, _ = unit(x, unit.no_context(x))
    gates.square().sum().backward()
    for branch in unit.branches:
        learning = branch.weight.grad.abs().sum(dim=(0, 1)) > 0
        # Over time the farthest tap of a long branch lies before the first of five steps, among zeros.
        expected = [axis != "step", True, axis != "step"] if axis != "time" else [branch.dilation[0] <= 2, True, True]
        if axis == "time" and branch.dilation[0] > 4:
            expected[1] = False
        assert learning.tolist() == expected


def test_gate_k_comes_from_branch_k():
    unit = trained(EESP1d(8, 12))
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        before, _ = unit(x, unit.no_context(x))
        unit.expand[0].weight[24:36] += 1.0  # what group 2 does with branch 2
        after, _ = unit(x, unit.no_context(x))
    changed = (before != after).view(2, 4, 12).any(dim=2)
    assert changed.tolist() == [[False, False, True, False]] * 2


def test_embedding_and_softmax_share_their_weights_and_dropout_is_at_its_three_places(monkeypatch: pytest.MonkeyPatch):
    model = models.eru_language_model(11, 8, 12, 3)
    assert model.decoder.weight is model.embedding.weight
    places = []

    def noted(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        places.append((x.shape[-1], p, training))
        return x

    monkeypatch.setattr(nn.functional, "dropout", noted)
    model.train()(torch.zeros(2, 3, dtype=torch.int64))
    assert places == [(8, 0.5, True), (12, 0.5, True), (12, 0.5, True), (8, 0.5, True)]


def test_a_state_cut_off_learns_nothing_of_the_chunk_before():
    model = models.eru_language_model(11, 8, 12, 2, axis="time").train()
    tokens = torch.randint(0, 11, (9, 4))
    _, states = model(tokens)
    assert all(state.hidden.requires_grad and state.context.requires_grad for state in states)
    assert not any(tensor.requires_grad for state in states for tensor in state.detach())


@pytest.mark.parametrize("axis", AXES)
def test_the_model_learns_what_only_memory_can_tell(axis: str):
    """Who knows the last word alone cannot come below a loss of 0.379; who knows no word has 2.3."""
    model = models.eru_language_model(11, 16, 32, 2, axis=axis, dropout=0.0).train()
    text = torch.tensor([0, 1, 2, 3, 0, 4, 5, 3, 0, 6, 7, 8, 1, 9, 10, 8] * 2)
    tokens = torch.stack([text.roll(-shift) for shift in (0, 5, 10)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        logits, _ = model(tokens[:-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("axis", AXES)
def test_kernels_beside_plain_torch(axis: str, training: bool, fused_calls: list[str]):
    layer, plain = trained(ERU(20, 12, axis)), trained(ERU(20, 12, axis, plain=True))
    plain.load_state_dict(layer.state_dict())
    found = []
    for module in (layer.train(training), plain.train(training)):
        x = torch.randn(7, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        state = module.initial_state(x)._replace(hidden=torch.full((3, 12), 0.5, dtype=torch.float64))
        outputs, last = module(x, state)
        (outputs.square().sum() + last.cell.sum()).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append([outputs, *last, x.grad, gradients, dict(module.named_buffers())])
    assert fused_calls == (["eesp_training"] if axis == "step" else [])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)


def test_one_value_a_channel_has_no_variance():
    layer = ERU(8, 8)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 1, 8))
    assert layer.eval()(torch.randn(1, 1, 8))[0].shape == (1, 1, 8)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sizes", [(5, 3), (1, 1)])
def test_a_frozen_model_gives_the_same(axis: str, sizes: tuple[int, int]):
    model = trained(models.eru_language_model(11, 8, 12, 2, axis=axis))
    frozen = freeze(model)
    assert isinstance(frozen.layers[0].input, FrozenEESP1d) == (axis == "step")
    tokens = torch.randint(0, 11, sizes)
    with torch.no_grad():
        expected, states = model(tokens)
        logits, frozen_states = frozen(tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        # States of either go on in the other.
        again, _ = frozen(tokens, states)
        torch.testing.assert_close(again, model(tokens, frozen_states)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"vocabulary": 0}, "vocabulary: got 0"),
        ({"embedding": 6}, "got 6, expected a positive multiple of 4"),
        ({"hidden": 0}, "hidden: got 0, expected a positive multiple of 4"),
        ({"layers": 0}, "layers: got 0"),
        ({"axis": "space"}, "axis: got 'space', expected one of 'step', 'features', 'time'"),
    ],
)
def test_bad_arguments_are_named(arguments, named: str):
    with pytest.raises(ValueError, match=named):
        models.eru_language_model(**{"vocabulary": 10, "embedding": 8, "hidden": 8, **arguments})


def test_bad_inputs_are_named():
    model = models.eru_language_model(10, 8, 8, 2)
    with pytest.raises(ValueError, match=r"tokens: got shape \[0, 2\]"):
        model(torch.zeros(0, 2, dtype=torch.int64))
    _, states = model.eval()(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"states: got 1, expected 2"):
        model(torch.zeros(1, 2, dtype=torch.int64), states[:1])
