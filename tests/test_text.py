"""Texts as numbers, a language model that learns from one, and what is written with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from espkernels.__main__ import main
from espkernels.models.data.text import END_OF_LINE, UNKNOWN, Vocabulary, chunks, columns, parts_of
from espkernels.models.generate import generate
from espkernels.models.recipes import engine
from espkernels.models.recipes.language import Language, non_monotonic, perplexity
from espkernels.models.recipes.task import Share

SMALL: dict[str, Any] = dict(embedding=32, hidden=32, layers=2, dropout=0.1, steps=20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of the language reference that Python's own library holds."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in ("assignment", "calls", "class", "exceptions", "with"))
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text(text[:24_000], encoding="utf-8")
    return path


def test_layouts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*ptb\.train\.txt.*simple-examples"):
        parts_of(tmp_path)
    for part, text in (("train", " the cat sat \n the dog ran \n"), ("valid", "the fox\n"), ("test", "a cat\n")):
        (tmp_path / f"ptb.{part}.txt").write_text(text)
    parts = parts_of(tmp_path)
    assert parts["train"] == ["the", "cat", "sat", END_OF_LINE, "the", "dog", "ran", END_OF_LINE]
    vocabulary = Vocabulary.of(parts["train"])
    assert vocabulary.words == ["the", "cat", "sat", END_OF_LINE, "dog", "ran", UNKNOWN]
    assert vocabulary.encode(parts["valid"]).tolist() == [0, 6, 3]
    with pytest.raises(ValueError, match="'fox' is not in the vocabulary of 1"):
        Vocabulary(["the"]).encode(["fox"])
    (tmp_path / "one.txt").write_text("abcdefghij" * 3)
    assert [len(part) for part in parts_of(tmp_path / "one.txt", characters=True).values()] == [24, 3, 3]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(ValueError, match="no text in UTF-8"):
        parts_of(tmp_path / "bad.txt")


def test_columns_and_chunks_cover_the_text() -> None:
    text = columns(torch.arange(23), 2)
    assert text.T.tolist() == [list(range(11)), list(range(11, 22))]
    pairs = list(chunks(text, 4))
    assert [len(tokens) for tokens, _ in pairs] == [4, 4, 2]
    assert torch.equal(torch.cat([tokens for tokens, _ in pairs]), text[:-1])
    assert torch.equal(torch.cat([following for _, following in pairs]), text[1:])
    with pytest.raises(ValueError, match="batch: got 12, expected at most 11 for 23 tokens"):
        columns(torch.arange(23), 12)


def test_when_averaging_begins() -> None:
    falling = [9.0, 8.0, 7.0, 6.0, 5.0]
    assert not non_monotonic(falling, 2)
    assert not non_monotonic([9.0, 8.0, 8.5], 2)  # 8 is not more than two epochs old
    assert not non_monotonic([7.0, 9.0, 8.0], 2)  # nor is 7
    assert non_monotonic([9.0, 7.0, 8.0, 8.5, 8.2], 2)
    assert not non_monotonic([9.0], 5)


def test_perplexity_beside_one_run_over_the_whole_text() -> None:
    torch.manual_seed(0)
    network = Language("none", **SMALL, words=[*"abcdefg", UNKNOWN]).network().double().eval()
    text = columns(torch.randint(0, 8, (97,)), 3)
    with torch.no_grad():
        logits, _ = network(text[:-1])
    expected = math.exp(float(F.cross_entropy(logits.flatten(0, 1), text[1:].flatten())))
    # States carried from chunk to chunk: their length changes nothing.
    for steps in (1, 5, 40):
        assert perplexity(network, text, steps, torch.device("cpu")) == pytest.approx(expected, rel=1e-12)


class Late(Language):
    """Averages from the second epoch on."""

    def averages(self, rows: Any) -> bool:
        return len(rows) >= 1


def test_the_average_is_the_mean_of_the_weights_since_it_began(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        seen.append(self.param_groups[0]["params"][0].detach().double().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    task = Late(str(corpus), characters=True, batch=40, rate=2.0, **SMALL)
    engine.train(task, tmp_path / "run", engine.Settings(3))
    state = engine.RunFolder(tmp_path / "run").load()
    assert state is not None
    steps = len(seen) // 3
    expected = torch.stack(seen[steps:]).mean(0)
    average = state["average"]["module.embedding.weight"].double()
    # A running mean in float32: one rounding of a number below 4 for each step.
    assert (average - expected).abs().max() <= len(seen) * 2**-24 * 4


def test_an_interrupted_average_goes_on_to_the_same_bits(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Late(str(corpus), characters=True, batch=40, rate=2.0, **SMALL)
    whole = engine.train(task, tmp_path / "whole", engine.Settings(4))
    evaluate = task.evaluate

    def interrupted(*arguments: Any) -> dict[str, float]:
        if (tmp_path / "cut" / "last.pt").exists() and len(engine.RunFolder(tmp_path / "cut").load()["rows"]) == 2:  # type: ignore[index]
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.train(task, tmp_path / "cut", engine.Settings(4))
    rows = engine.train(task, tmp_path / "cut", engine.Settings(4))
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in whole]


def test_generation() -> None:
    torch.manual_seed(1)
    network = Language("none", **SMALL, words=[*"abcdefg", UNKNOWN]).network().eval()
    prompt = torch.tensor([1, 2])
    one, same, other = (list(generate(network, prompt, 30, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    greedy, tokens = list(generate(network, prompt, 8, most_likely=1, seed=5)), prompt
    for token in greedy:
        with torch.no_grad():
            assert token == int(network(tokens[:, None])[0][-1, 0].argmax())
        tokens = torch.cat([tokens, torch.tensor([token])])
    assert list(generate(network, prompt, 8, temperature=1e-6)) == greedy
    # Words that are equally likely are still only as many as were asked for.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert len(set(generate(network, prompt, 60, most_likely=3))) == 3
    for wrong, message in (
        (dict(temperature=0.0), "temperature: got 0.0"),
        (dict(most_likely=0), "most_likely: got 0"),
        (dict(length=0), "length: got 0"),
        (dict(length=-3), "length: got -3"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(network, prompt, **dict(length=1) | wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt: got shape"):
        generate(network, prompt[:0], 1)


def test_a_chunk_of_a_single_value_is_left_out(corpus: Path) -> None:
    tokens = len(parts_of(corpus, characters=True)["train"])
    steps = next(steps for steps in range(5, 60) if (tokens - 1) % steps == 1)
    task = Language(str(corpus), characters=True, batch=1, **SMALL | {"steps": steps})
    batches = list(task.batches(0, Share()))
    assert len(batches) == (tokens - 1) // steps and all(len(given) == steps for given, _ in batches)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_are_cut_to_a_length(
    precision: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
        (group,) = self.param_groups
        lengths = [parameter.grad.norm() for parameter in group["params"] if parameter.grad is not None]
        seen.append((float(torch.stack(lengths).norm()), group["weight_decay"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    task = Language(str(corpus), characters=True, batch=40, rate=4.0, **SMALL)
    engine.train(task, tmp_path, engine.Settings(1, precision=precision))
    lengths = [length for length, _ in seen]
    # The length of many is cut in float32, whose sum of squares rounds.
    assert max(lengths) == pytest.approx(0.25, rel=1e-4) and min(lengths) > 0.01
    assert {decay for _, decay in seen} == {1.2e-6}


def test_a_checkpoint_of_other_layers_is_scored(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(corpus), "--characters", "--embedding", "8", "--hidden", "8", "--layers", "2"]
    run, weights = str(tmp_path / "run"), str(tmp_path / "run" / "best.safetensors")
    assert main(["train", "language", *options, "--epochs", "1", "--rate", "1", "--folder", run]) == 0
    scores = []
    for given in (["--folder", run], ["--weights", weights, *options], ["--weights", weights, "--unfrozen", *options]):
        capsys.readouterr()
        assert main(["evaluate", "language", *given]) == 0
        scores.append(float(capsys.readouterr().out.split()[-1]))
    assert scores == pytest.approx(scores[:1] * 3, rel=1e-3)


def test_plain_layers_go_the_same_way(corpus: Path, tmp_path: Path) -> None:
    rows = {}
    for name in ("ours", "plain"):
        command = ["train", "language", "--data", str(corpus), "--characters", "--embedding", "32", "--hidden", "32"]
        command += ["--layers", "1", "--dropout", "0", "--batch", "64", "--steps", "100", "--rate", "1"]
        command += ["--epochs", "2", "--folder", str(tmp_path / name), *(["--plain"] if name == "plain" else [])]
        assert main(command) == 0
        rows[name] = (engine.RunFolder(tmp_path / name).load() or {})["rows"]
        assert json.loads((tmp_path / name / "config.json").read_text())["options"]["plain"] is (name == "plain")
    for ours, plain in zip(rows["ours"], rows["plain"], strict=True):
        assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert plain["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-2)


@pytest.mark.slow
def test_a_text_is_learnt(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    command = ["train", "language", "--data", str(corpus), "--characters", "--embedding", "64", "--hidden", "64"]
    command += ["--layers", "2", "--dropout", "0.1", "--batch", "32", "--steps", "25", "--rate", "4"]
    assert main([*command, "--epochs", "8", "--folder", run]) == 0
    parts = parts_of(corpus, characters=True)
    # What counting characters would reach: e to the cross-entropy of the valid text under their shares in training.
    counts = Counter(parts["train"])
    shares = {character: (counts[character] + 1) / (len(parts["train"]) + 256) for character in set(parts["valid"])}
    unigram = math.exp(-sum(math.log(shares[character]) for character in parts["valid"]) / len(parts["valid"]))
    assert 12 < unigram < 30
    best = min(row["perplexity"] for row in (engine.RunFolder(tmp_path / "run").load() or {})["rows"])
    assert best < unigram / 2

    capsys.readouterr()
    held_out = tmp_path / "test.txt"
    held_out.write_text("".join(parts["test"]))
    assert main(["perplexity", str(held_out), "--folder", run]) == 0
    assert float(capsys.readouterr().out.split()[0]) < unigram / 2
    assert main(["generate", "An exception ", "--folder", run, "--length", "40", "--seed", "3"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("An exception ") and len(written) == len("An exception ") + 40 + 1
    assert main(["generate", "", "--folder", run]) == 2
