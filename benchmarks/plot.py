"""``python -m benchmarks.plot [CSV]``: a chart per op, next to the CSV.

Bars: median time of every provider in every case, whiskers from p20 to p80, the floor as a dashed
line. Lines: time per logit over V and over N. Of rows with the same key the last one counts.
"""

from __future__ import annotations

import argparse
import csv
import sys
import textwrap
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
COLORS = {
    **{"pyllmtune": "#0b6e99", "eager": "#9aa5b1", "torch.compile": "#e08e45", "trl": "#7a5195"},
    **{"F.linear_cross_entropy": "#c2504e", "matmul": "#4f7942"},
    "linear_token_logprobs": "#58508d",
}
SWEEPS = {
    "forward over V": 1,
    "forward over N": 0,
    "forward over D": 1,
    "out= over N": 0,
}  # the axis of the shape that varies
INK = "#2b3440"


def read(path: Path) -> list[Row]:
    """Timed rows of the last row's machine, the newest of each key."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["verdict"] == "ok"]
    key = ("op", "case", "provider", "dtype", "shape", "threads")
    machine = ("device", "cpu_capability")
    last = [rows[-1][name] for name in machine] if rows else []
    here = [row for row in rows if [row[name] for name in machine] == last]
    return list({tuple(row[name] for name in key): row for row in here}.values())


def color(provider: str) -> str:
    return COLORS[provider.split()[0]]


def bars(axes: Axes, rows: list[Row]) -> None:
    """A group per case, a bar per provider."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["shape"], row["dtype"]), []).append(row)
    left, ticks = 0.0, []
    for group in groups.values():
        ticks.append(left + (len(group) - 1) / 2)
        for row in group:
            median, low, high = (float(row[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
            axes.bar(left, median, 0.86, color=color(row["provider"]), label=row["provider"])
            axes.vlines(left, low, high, color=INK, lw=1)
            bold = "bold" if row["provider"].startswith("pyllmtune") else "normal"
            axes.annotate(
                f"{median:.3g}" if median < 1000 else f"{median:,.0f}",
                (left, max(median, high)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                fontweight=bold,
                color=INK,
                bbox={"fc": "white", "ec": "none", "pad": 0.4, "alpha": 0.75},
            )
            left += 1
        floor = float(group[0]["median_ms"]) * float(group[0]["percent_of_floor"]) / 100
        ends = (left - len(group) - 0.5, left - 0.5)
        axes.hlines(floor, *ends, color=INK, ls=(0, (4, 2)), lw=1.2, label="bandwidth floor")
        left += max(0.8, 2.8 - len(group))  # room for the label of a lonely bar
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.02, y=0.16)
    axes.set_ylabel("ms (log scale)")
    labels = [label(name, len(group)) for name, group in groups.items()]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="x", length=0)


def label(group: tuple[str, ...], bars: int) -> str:
    case, shape, dtype = group
    return "\n".join([*textwrap.wrap(case, 9 + 5 * bars), shape, dtype])


def lines(axes: Axes, rows: list[Row], case: str) -> None:
    """Time per logit; flat is linear scaling."""
    axis = SWEEPS[case]
    here = [row for row in rows if row["case"] == case]
    for provider in dict.fromkeys(row["provider"] for row in here):
        points = sorted(
            (shape[axis], float(row["median_ms"]) * 1e9 / prod(shape))
            for row in here
            if row["provider"] == provider
            for shape in [[int(size) for size in row["shape"].split("x")]]
        )
        axes.plot(*zip(*points, strict=True), "o-", color=color(provider), label=provider, ms=4)
    axes.set_xscale("log", base=2)
    sizes = sorted({int(row["shape"].split("x")[axis]) for row in here})
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    names = {"N": "N, rows", "D": "D, width", "V": "V, vocabulary"}
    axes.set_xlabel(names[case.split()[-1]])
    work = "multiply-add" if here[0]["shape"].count("x") == 2 else "logit"
    axes.set_ylabel(f"ps per {work} (log scale)")
    axes.set_title(case, fontsize=10, loc="left")


def draw(op: str, rows: list[Row], path: Path) -> None:
    """One figure of ``op``, at the largest thread count that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(int(row["threads"]) for row in rows)
    rows = [row for row in rows if int(row["threads"]) == threads]
    sweeps = [case for case in SWEEPS if any(row["case"] == case for row in rows)]
    figure = pyplot.figure(figsize=(13, 8.5 if sweeps else 5), layout="constrained")
    grid = figure.add_gridspec(2 if sweeps else 1, 2, height_ratios=[3, 2] if sweeps else None)
    top = figure.add_subplot(grid[0, :])
    bars(top, [row for row in rows if row["case"] not in SWEEPS])
    panels = [top]
    for place, case in enumerate(sweeps):
        panels.append(figure.add_subplot(grid[1, place]))
        lines(panels[-1], rows, case)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e8ec", lw=0.8)
        axes.set_axisbelow(True)
    handles = {label: h for h, label in zip(*top.get_legend_handles_labels(), strict=True)}
    top.legend(handles.values(), handles, frameon=False, ncols=len(handles), loc="upper left")
    where = rows[-1]
    figure.suptitle(
        f"{op}: {where['device']}, {where['cpu_capability']}, threads {threads}, "
        f"torch {where['torch']}, commit {where['commit'] or 'unknown'}, {where['date'][:10]}",
        fontsize=11,
        color=INK,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", help="[the newest of benchmarks/results]")
    path = parser.parse_args(argv).csv or max(RESULTS.glob("*.csv"), default=None)
    if path is None or not path.exists():
        parser.error(f"no CSV at {path or RESULTS}: run python -m benchmarks all first")
    if find_spec("matplotlib") is None:
        print("No chart: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return 2
    rows = read(path)
    for op in dict.fromkeys(row["op"] for row in rows):
        target = path.with_name(f"{path.stem}_{op}.png")
        draw(op, [row for row in rows if row["op"] == op], target)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
