"""Measurements as rows: an aligned table to read, and a CSV that only ever grows."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Measurement

KEY = (
    *("op", "case", "provider", "dtype", "shape", "threads"),
    *("device", "cpu_capability", "torch", "pyllmtune", "trl", "commit", "date"),
)
VALUES = (
    *("verdict", "error", "median_ms", "p20_ms", "p80_ms", "repeats"),
    *("bytes", "gb_per_s", "percent_of_floor", "times_ours", "peak_mib"),
)
Row = dict[str, Any]  # a value that was not measured is ""


def rows_of(case: Case, measurements: list[Measurement], where: dict[str, str]) -> list[Row]:
    """One row per provider; ``where`` holds the columns of the machine and the versions."""
    floor = floor_ms(case, measurements)
    date = datetime.now().isoformat(timespec="seconds")
    rows = []
    for measurement in measurements:
        provider = measurement.provider
        row: Row = dict.fromkeys((*KEY, *VALUES), "")
        row |= where
        row |= {
            "op": case.op,
            "case": case.name + provider.variant,
            "provider": provider.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": "x".join(map(str, case.shape)),
            "threads": measurement.threads,
            "date": date,
            "verdict": measurement.verdict,
        }
        if not provider.is_probe and not measurement.problem:
            row["error"] = f"{measurement.error:.1e}"
        if measurement.peak is not None:
            row["peak_mib"] = round(measurement.peak / 2**20, 1)
        if measurement.times:
            row |= _speed(case, measurement, floor)
        rows.append(row)
    ours: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith("pyllmtune") and row["median_ms"] != "":
            ours.setdefault(row["case"], row["median_ms"])
    for row in rows:
        if row["case"] in ours and row["median_ms"] != "":
            row["times_ours"] = round(row["median_ms"] / ours[row["case"]], 2)
    return rows


def floor_ms(case: Case, measurements: list[Measurement]) -> float:
    """What the traffic takes at the rates of the probes; a clone has read what it writes."""
    traffic = case.traffic
    size = {
        "read": traffic.read - traffic.written,
        "clone": traffic.written,
        "rewrite": traffic.rewritten,
    }
    return sum(
        1e3 * m.quantile(0.5) * size[m.provider.name] / case.probe_bytes
        for m in measurements
        if m.provider.is_probe and m.times
    )


def _speed(case: Case, measurement: Measurement, floor: float) -> Row:
    p20, median, p80 = (1e3 * measurement.quantile(share) for share in (0.2, 0.5, 0.8))
    provider = measurement.provider
    if provider.is_probe:
        moved = case.probe_bytes * (1 if provider.name == "read" else 2)
        percent: Any = ""
    else:
        moved = round(case.traffic.total * provider.share)
        percent = round(100 * floor * provider.share / median, 1)
    return {
        "median_ms": round(median, 4),
        "p20_ms": round(p20, 4),
        "p80_ms": round(p80, 4),
        "repeats": len(measurement.times),
        "bytes": moved,
        "gb_per_s": round(moved / median / 1e6, 2),
        "percent_of_floor": percent,
    }


def table(case: Case, measurements: list[Measurement], rows: list[Row]) -> str:
    """The rows of one case and thread count, aligned; a provider without a time says why."""
    first = rows[0]
    head = (
        f"\n{case.op}: {case.name}   {first['shape']} {first['dtype']}, threads {first['threads']}"
        f"   moves {case.traffic.total / 1e6:.1f} MB, floor {floor_ms(case, measurements):.3g} ms"
    )
    labels = [m.provider.name + m.provider.variant for m in measurements]
    width = max(map(len, labels)) + 2
    columns = ("median ms", "p20", "p80", "GB/s", "% of floor", "x ours", "error", "peak MiB")
    lines = [head, "  " + " " * width + "".join(f"{name:>11}" for name in columns)]
    for label, measurement, row in zip(labels, measurements, rows, strict=True):
        line = f"  {label:<{width}}"
        if measurement.times:
            names = ("median_ms", "p20_ms", "p80_ms", "gb_per_s", "percent_of_floor", "times_ours")
            cells = [row[name] for name in (*names, "error", "peak_mib")]
            line += "".join(
                f"{cell:>11.4g}" if isinstance(cell, float) else f"{cell:>11}" for cell in cells
            )
        elif measurement.problem:
            line += f"  FAILED: {measurement.problem}"
        else:
            excess = f"{measurement.excess:.3g} times what is allowed"
            line += f"  WRONG: error {measurement.error:.1e}, {excess}"
        lines.append(line)
    return "\n".join(lines)


def append(rows: list[Row], folder: Path) -> Path:
    """Add the rows to the CSV of today; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y-%m-%d}.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*KEY, *VALUES))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path
