"""Recurrent layers and language models beside torch's LSTM: ``python -m bench.language``, ``make language``.

Rows are one layer and the paper's language model (section 4.4, H = 320) in float32: a training step of 70 tokens of 20
texts (forward, loss, backward), the same forward alone, and one token of one text, as in generation. Ours, the same in
plain torch, and LSTMs as wide and with as many parameters are timed in turn, round after round. The results of ours are
compared with plain torch in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.comparison import WrongResult, require_kernels
from bench.interleave import Run, interleave
from bench.output import RESULTS, keep_whole, make_folder, write_json
from bench.tables import markdown_table
from espkernels.info import collect
from espkernels.models import eru_language_model
from espkernels.models.eru import ERU
from espkernels.models.recipes.arguments import whole_number
from espkernels.quantities import duration

__all__ = ["main"]

STEPS, BATCH, EMBEDDING, HIDDEN, WORDS = 70, 20, 400, 320, 10_000
OURS, PLAIN, WIDE, MANY = "ours", "plain torch", "LSTM, as wide", "LSTM, as many parameters"


class LSTMLanguageModel(nn.Module):
    """Embedding, layers from it to ``hidden`` and back, and a softmax that shares its weights: with torch's LSTM."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, EMBEDDING)
        widths = [EMBEDDING, hidden, hidden, EMBEDDING]
        self.layers = nn.ModuleList(nn.LSTM(m, n) for m, n in itertools.pairwise(widths))
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        return F.linear(x, self.embedding.weight, self.bias), None


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def with_as_many(make: Callable[[int], nn.Module], wanted: int) -> nn.Module:
    """The narrowest of ``make`` with at least ``wanted`` parameters."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high) // 2
        with torch.device("meta"):
            enough = parameters(make(middle)) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    return make(low)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours, plain = ERU(EMBEDDING, HIDDEN), ERU(EMBEDDING, HIDDEN, plain=True)
    plain.load_state_dict(ours.state_dict())
    lstm = with_as_many(lambda hidden: nn.LSTM(EMBEDDING, hidden), parameters(ours))
    return {OURS: ours, PLAIN: plain, WIDE: nn.LSTM(EMBEDDING, HIDDEN), MANY: lstm}


def language_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = eru_language_model(WORDS, EMBEDDING, HIDDEN, dropout=0.0)
    plain = eru_language_model(WORDS, EMBEDDING, HIDDEN, dropout=0.0, plain=True)
    plain.load_state_dict(ours.state_dict())
    return {
        OURS: ours,
        PLAIN: plain,
        WIDE: LSTMLanguageModel(HIDDEN),
        MANY: with_as_many(LSTMLanguageModel, parameters(ours)),
    }


@dataclass(frozen=True)
class Mode:
    """A way to run a model on texts of ``steps`` tokens: ``training`` with a loss and gradients, else evaluation."""

    name: str
    steps: int
    batch: int
    training: bool

    def input(self, of_words: bool) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if of_words:
            return torch.randint(WORDS, (self.steps, self.batch), generator=generator)
        return torch.randn(self.steps, self.batch, EMBEDDING, generator=generator)

    def run(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """The result and, in training, the gradients."""
        if not self.training:
            with torch.no_grad():
                return [model.eval()(x)[0]]
        parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        output, _ = model(x)
        loss = output.square().mean() if x.is_floating_point() else F.cross_entropy(output.flatten(0, 1), x.flatten())
        return [output, *torch.autograd.grad(loss, parameters)]


MODES = (
    Mode("training", STEPS, BATCH, True),
    Mode("forward", STEPS, BATCH, False),
    Mode("one token", 1, 1, False),
)


def check(mode: Mode, ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Raises :class:`WrongResult` where ours is further from float64 than eight times what plain torch is."""
    exact = mode.run(copy.deepcopy(plain).double(), x.double() if x.is_floating_point() else x)

    def error(model: nn.Module) -> float:
        found = mode.run(copy.deepcopy(model), x)
        pairs = list(zip(found, exact, strict=True))
        return max(float((one.double() - other).norm() / other.norm().clamp_min(1e-12)) for one, other in pairs)

    allowed = 8 * max(error(plain), torch.finfo(torch.float32).eps)
    found = error(ours)
    if not found <= allowed:
        raise WrongResult(f"{mode.name}: off by {found:.2g}, expected at most {allowed:.2g}")


def measured(kind: str, models: dict[str, nn.Module], mode: Mode, seconds: float) -> dict[str, Any]:
    """One row."""
    x = mode.input(of_words=kind == "language model")
    check(mode, models[OURS], models[PLAIN], x)
    runs = {name: Run(lambda model=model: mode.run(model, x)) for name, model in models.items()}
    samples = interleave(runs, seconds)
    tokens = mode.steps * mode.batch
    return {
        "kind": kind,
        **asdict(mode),
        "parameters": {name: parameters(model) for name, model in models.items()},
        "seconds": {name: samples.median(name) for name in runs},
        "tokens_per_second": {name: tokens / samples.median(name) for name in runs},
        "faster": {name: samples.speedup(OURS, name) for name in runs if name != OURS},
        "rounds": len(samples.seconds[OURS]),
    }


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    columns = [("what", "left"), ("threads", "right"), ("who", "left"), ("parameters", "right")]
    columns += [("time", "right"), ("tokens/s", "right"), ("ours is faster by", "right")]
    cells = [
        [
            f"{row['kind']}, {row['name']}",
            str(row["threads"]),
            name,
            f"{row['parameters'][name]:,}",
            duration(row["seconds"][name]),
            f"{row['tokens_per_second'][name]:,.0f}",
            f"{row['faster'][name]:.2f}x" if name != OURS else "",
        ]
        for row in result["rows"]
        for name in row["seconds"]
    ]
    what = (
        f"{machine['machine']['cpu']}, torch {machine['versions']['torch']}, float32; medians of interleaved rounds, "
    )
    what += f"{STEPS} tokens of {BATCH} texts at once, embedding {EMBEDDING}, H = {HIDDEN}, {WORDS:,} words."
    return "\n".join(["# Recurrent layers and language models", "", what, "", *markdown_table(columns, cells), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every row, writes language.json and language.md, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.language", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder; default bench/results")
    parser.add_argument("--seconds", type=float, default=4.0, help="of samples a row; default 4")
    parser.add_argument("--threads", type=whole_number(1), nargs="*", help="default: one, and all")
    args = parser.parse_args(arguments)
    keep_whole(args.output, bool(args.threads))
    make_folder(args.output)
    require_kernels()
    rows = []
    for threads in args.threads or sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for kind, make in (("layer", layers), ("language model", language_models)):
            models = make()
            for mode in MODES:
                rows.append(measured(kind, models, mode, args.seconds) | {"threads": threads})
                faster = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in rows[-1]["faster"].items())
                print(f"{kind}, {mode.name}, {threads} threads: faster than {faster}", file=sys.stderr)
    result = {"machine": collect().as_dict(), "rows": rows}
    write_json(result, args.output / "language.json")
    (args.output / "language.md").write_text(markdown(result))
    print(f"{args.output}/language.json, language.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
