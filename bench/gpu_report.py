"""What a run on a GPU found, as a line, Markdown and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.engines import OURS
from bench.tables import markdown_table
from espkernels.quantities import amount, duration

__all__ = ["GOALS", "NO_TIME", "failed", "line", "markdown", "picture", "write"]

NO_TIME = "no time was left"

# Kind of row, what is compared, and how it is to come out.
GOALS = (
    ("unit", "max-autotune", 3.0),
    ("unit", "eager", 6.0),
    ("operator", "compile", 2.0),
    ("training", "compile", 2.5),
)
KEPT_GOAL = 1 / 3  # of what eager torch keeps for the backward pass of a unit
FLOOR_GOAL = 1.3  # times the floor, of a unit on at least this many images
FLOOR_BATCH = 256
GRAPH_GOAL = 0.15e-3  # seconds of ESPNetv2 s=2.0 for one image in a graph

COLUMNS = (
    ("row", "left"), ("batch", "right"), ("ours", "right"), ("as", "left"), ("/ eager", "right"),
    ("/ streams", "right"), ("/ compile", "right"), ("/ max-autotune", "right"), ("images/s", "right"),
    ("of copy bandwidth", "right"), ("memory", "right"), ("mJ an image", "right"),
)  # fmt: skip


def failed(row: dict[str, Any]) -> bool:
    """Whether one of ours was wrong or did not run, for want of something other than time."""
    reasons = [row.get("refused", "")]
    reasons += [e.get("refused", "") for name, e in row.get("engines", {}).items() if name.startswith(OURS)]
    return any(reason not in ("", NO_TIME) for reason in reasons)


def line(row: dict[str, Any]) -> str:
    """One race of a row while the run goes on."""
    name = f"{row['row']}, batch {row['batch']}, {row['race']} race"
    if "refused" in row:
        return f"{name}: {row['refused']}"
    engines = (
        f"{engine} {duration(found['seconds']) if 'seconds' in found else found['refused']}"
        for engine, found in row["engines"].items()
    )
    return f"{name}: {', '.join(engines)}"


def _merged(run: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The races of each row that took place."""
    ran = sorted((row for row in run["rows"] if row.get("best of ours")), key=_key)
    for _, races in itertools.groupby(ran, key=_key):
        yield list(races)


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["kind"], row["row"], row["batch"]


def _over(races: Sequence[dict[str, Any]], peer: str) -> float | None:
    """How many times faster the best of ours is than the fastest engine whose name begins with ``peer``."""
    found = [
        ratio for race in races for name, ratio in race["speedup"].items() if name.split()[0] == peer
    ]  # fmt: skip
    return min(found, default=None)


def _best(races: Sequence[dict[str, Any]]) -> dict[str, Any]:
    race = races[0]
    best: dict[str, Any] = race["engines"][race["best of ours"]]
    return best


def _share(run: dict[str, Any], races: Sequence[dict[str, Any]]) -> float:
    return float(races[0]["bytes"] / _best(races)["seconds"] / run["copy bandwidth"])


def _kept_share(races: Sequence[dict[str, Any]]) -> float | None:
    """What the thriftier of ours keeps for the backward pass, in parts of what eager torch does."""
    kept = [(name, e["kept"]) for race in races for name, e in race["engines"].items() if e.get("kept")]
    ours = [bytes for name, bytes in kept if name.startswith(OURS)]
    eager = [bytes for name, bytes in kept if name.startswith("eager")]
    return min(ours) / min(eager) if ours and eager else None


def _cells(run: dict[str, Any], races: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    first, best = races[0], _best(races)

    def over(peer: str) -> str:
        ratio = _over(races, peer)
        return "-" if ratio is None else f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**"

    energy = best.get("joules")
    return (
        first["row"], str(first["batch"]), duration(best["seconds"]), first["best of ours"],
        *(over(peer) for peer in ("eager", "streams", "compile", "max-autotune")),
        f"{first['batch'] / best['seconds']:.0f}", f"{_share(run, races):.0%}", amount(best["peak"]),
        "-" if energy is None else f"{1e3 * energy / first['batch']:.2f}",
    )  # fmt: skip


def _verdicts(run: dict[str, Any]) -> Iterator[str]:
    rows = list(_merged(run))
    for kind, peer, factor in GOALS:
        ratios = [r for races in rows if races[0]["kind"] == kind and (r := _over(races, peer)) is not None]
        said = f"{kind}: at least {factor:g}x {peer}"
        reached = sum(ratio >= factor for ratio in ratios)
        yield (
            f"{said}: {reached} of {len(ratios)} rows; least {min(ratios):.2f}x" if ratios else f"{said}: not measured"
        )
    large = [races for races in rows if races[0]["kind"] == "unit" and races[0]["batch"] >= FLOOR_BATCH]
    said = f"unit of {FLOOR_BATCH} images and more: within {FLOOR_GOAL:g}x of one read and one write"
    floors = [1 / _share(run, races) for races in large]
    reached = sum(floor <= FLOOR_GOAL for floor in floors)
    yield f"{said}: {reached} of {len(floors)} rows; most {max(floors):.2f}x" if floors else f"{said}: not measured"
    shares = [_kept_share(races) for races in rows if races[0]["kind"] == "training"]
    known = [share for share in shares if share is not None]
    said = "training: at most a third of what eager keeps for the backward pass"
    reached = sum(share <= KEPT_GOAL for share in known)
    yield f"{said}: {reached} of {len(known)} rows; most {max(known):.0%}" if known else f"{said}: not measured"
    one = [races[0]["engines"] for races in rows if races[0]["kind"] == "network" and races[0]["batch"] == 1]
    seconds = [e[f"{OURS} graph"]["seconds"] for e in one if "seconds" in e.get(f"{OURS} graph", {})]
    said = f"network for one image in a graph: under {duration(GRAPH_GOAL)}"
    yield f"{said}: {duration(seconds[0])}" if seconds else f"{said}: not measured"
    for row in run["rows"]:
        if "refused" in row:
            yield f"NOT TIMED {row['row']}, batch {row['batch']}, {row['race']} race: {row['refused']}"
        for name, engine in row.get("engines", {}).items():
            if "refused" in engine:
                yield f"NOT TIMED {row['row']}, batch {row['batch']}, {name}: {engine['refused']}"


def markdown(run: dict[str, Any], picture_name: str) -> str:
    """The table, how the goals stand, and what was not timed."""
    versions = run["espkernels"]["versions"]
    lines = [
        f"# {run['device']}",
        "",
        f"torch {versions['torch']}, espkernels {versions['espkernels']}; {run['date']}. A copy moves "
        f"{run['copy bandwidth'] / 1e12:.2f} TB/s, bytes read and written.",
        "",
        f"![times faster than each peer]({picture_name})",
        "",
        "Times are medians by the device's events; ratios are medians of the ratios within a round, of which each",
        "takes one sample of every engine in turn, over the fastest layout and form (launched or in a CUDA graph)",
        "of the peer. Each result was compared with float64 before it was timed, of single operators ours alone. The",
        "share of the copy bandwidth counts one read of the input and one write of the result. Memory is the most that",
        "was allocated from building the engine to its first result.",
        "",
        *(f"* {verdict}" for verdict in _verdicts(run)),
        "",
        *markdown_table(COLUMNS, (_cells(run, races) for races in _merged(run))),
        "",
        "Again: `python -m bench.gpu`; one row: `python -m bench.gpu --rows NAME`.",
        "",
    ]
    return "\n".join(lines)


COLORS = {"eager": "#0b5394", "streams": "#674ea7", "compile": "#b45f06", "max-autotune": "#990000"}


def picture(run: dict[str, Any], path: Path) -> None:
    """Writes the chart: a line for each row, a dot for each peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = list(_merged(run))
    figure, axis = pyplot.subplots(figsize=(9, 1.8 + 0.32 * len(rows)), layout="constrained")
    for place, races in enumerate(rows):
        for peer, color in COLORS.items():
            ratio = _over(races, peer)
            if ratio is not None:
                axis.plot(ratio, place, "o", color=color, markersize=6)
    axis.axvline(1, color="black", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_yticks(range(len(rows)), [f"{r[0]['row']}, batch {r[0]['batch']}" for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="both", linewidth=0.4, alpha=0.5)
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=f"over {p}") for p, c in COLORS.items()]
    axis.legend(handles=handles, fontsize=8, loc="lower right")
    axis.set_title(f"Times faster than the fastest form of each peer (right is better)\n{run['device']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(run: dict[str, Any], file: Path) -> None:
    """The Markdown and the chart beside the JSON ``file``."""
    picture(run, file.with_suffix(".png"))
    file.with_suffix(".md").write_text(markdown(run, file.with_suffix(".png").name))
