"""What the project promises, and whether this run kept it.

Speed-ups are ratios of medians of interleaved rounds, on two threads of a CPU, at the shapes below.
Shares, scaling and spread compare medians of ours. What was not measured here is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from benchmarks.report import Row

THREADS = 2
SHAPES = {
    "temperature_softmax": "64x151936",
    "filter_logits": "64x151936",
    "sample": "64x151936",
    "beam_step": "64x151936",
    "beam_search": "8x64x151936",
    "token_logprobs": "64x151936",
    "kl_divergence": "64x151936",
    "kept_token_logprobs": "64x151936",
    "linear_token_logprobs": "512x896x151936",
    "linear_policy_loss": "512x896x151936",
    "kept_logits": "512x896x151936",
    "policy_loss": "64x4096",
    "gae": "64x4096",
}
# (case, dtype, baseline, least speed-up); "best" is the fastest baseline that ran
SPEEDUPS = {
    "temperature_softmax": (
        ("new output", "float32", "eager", 2.0),
        ("new output", "float32", "clone", 0.8),
        ("out=", "float32", "eager", 9.0),
    ),
    "filter_logits": (
        ("top-p .95, peaked", "float32", "eager", 25.0),
        ("top-p .95, flat", "float32", "eager", 25.0),
    ),
    "sample": (
        ("plain, peaked", "float32", "eager", 60.0),
        ("top-k 50, peaked", "float32", "eager", 60.0),
        ("top-p .95, peaked", "float32", "eager", 150.0),
        ("top-p .95, flat", "float32", "eager", 40.0),
        ("one row, plain", "float32", "eager", 25.0),
        ("one row, top-p .95", "float32", "eager", 60.0),
    ),
    "beam_step": (("step", "float32", "eager", 12.0),),
    "beam_search": (("search", "float32", "eager", 3.0),),
    "token_logprobs": (
        ("forward", "float32", "torch.compile", 2.8),
        ("forward", "float32", "eager", 7.0),
        ("forward with entropy", "float32", "trl", 60.0),
        ("forward", "bfloat16", "trl", 2.0),
        ("forward + backward", "float32", "best", 2.7),
        ("forward + backward in place", "float32", "best", 6.0),
    ),
    "kl_divergence": (("forward", "float32", "eager", 12.0),),
    "kept_token_logprobs": (
        ("forward", "float32", "best", 20.0),
        ("forward + backward", "float32", "best", 20.0),
    ),
    "kept_logits": (
        ("forward", "float32", "eager", 20.0),
        ("forward + backward", "float32", "eager", 20.0),
        ("forward + backward, large sets", "float32", "eager", 1.0),
    ),
    "linear_token_logprobs": (
        ("forward with entropy", "bfloat16", "matmul", 0.8),
        ("forward with entropy", "bfloat16", "trl", 10.0),
        ("forward + backward with entropy", "bfloat16", "matmul", 1 / 1.3),
        ("forward + backward", "bfloat16", "F.linear_cross_entropy", 1.0),
        ("forward + backward", "bfloat16", "trl", 10.0),
        ("forward with entropy", "float32", "matmul", 1 / 1.15),
        ("forward + backward with entropy", "float32", "matmul", 1 / 1.15),
    ),
    "linear_policy_loss": (
        ("token level", "float32", "linear_token_logprobs", 1.0),
        ("token level", "bfloat16", "linear_token_logprobs", 1.0),
    ),
    "policy_loss": (
        ("ppo token level", "float32", "eager", 5.0),
        ("grpo with k3 and entropy", "float32", "eager", 5.0),
        ("gspo sequence level", "float32", "eager", 5.0),
    ),
    "gae": (
        ("answers", "float32", "eager", 50.0),
        ("turns between tools", "float32", "eager", 50.0),
    ),
}
SHARE = 0.33  # of the dense backward: 30 % of the rows are to do, a tenth is for fixed costs
SCALING = 1.8  # time on one thread over time on two
WORTH = 1.0  # ms on one thread; below, the call costs as much as the work
SPREAD = 1.5  # slowest over fastest time per logit
SPREADS = {
    "token_logprobs": ("forward over V", "forward over N"),
    "sample": ("top-p .95 over V", "top-p .95 over N"),
    "beam_step": ("step over V", "step over N"),
}
EXTRA = 1.15  # time with these over that of the bare draw
EXTRAS = {
    "plain, peaked": "log-prob, rank",
    "top-k 50, peaked": "log-prob, rank, kept set",
    "top-p .95, peaked": "log-prob, rank, kept set",
}


def judge(op: str, rows: list[Row]) -> Iterator[str]:
    """A line for every target of ``op``: met, missed or not judged."""
    timed = [row for row in rows if row["op"] == op and row["median_ms"] != ""]
    full = [row for row in timed if row["shape"] == SHAPES[op] or row["case"].startswith("one row")]
    two = [row for row in full if row["threads"] == THREADS]
    yield from _speedups(op, two)
    if op == "token_logprobs":
        yield from _shares(two)
    if op == "sample":
        yield from _extras(two)
    if op in SPREADS:
        yield from _spreads(op, timed)
    yield from _scaling(full)


def _line(text: str, measured: float, limit: float, at_least: bool) -> str:
    met = measured >= limit if at_least else measured <= limit
    bound = f"{'>=' if at_least else '<='} {limit:g}"
    return f"  {'met' if met else 'MISSED':<10}{measured:>8.2f}  {bound:<9}{text}"


def _not_judged(text: str) -> str:
    return f"  {'not judged':<29}{text}"


def _ours(rows: list[Row]) -> list[Row]:
    """Rows of our best backend, the one that is listed first."""
    names = [row["provider"] for row in rows if row["provider"].startswith("pyllmtune")]
    return [row for row in rows if row["provider"] == names[0]] if names else []


def _speedups(op: str, rows: list[Row]) -> Iterator[str]:
    for case, dtype, baseline, limit in SPEEDUPS[op]:
        here = [row for row in rows if row["case"] == case and row["dtype"] == dtype]
        good = [row for row in here if row["verdict"] in ("ok", "probe")]
        times = {row["provider"]: row["median_ms"] for row in good}
        others = [
            row["provider"]
            for row in good
            if row["verdict"] == "ok" and not row["provider"].startswith("pyllmtune")
        ]
        name = min(others, key=times.__getitem__, default="") if baseline == "best" else baseline
        text = f"{case}, {dtype}: times as fast as {baseline}"
        if not _ours(here) or name not in times:
            yield _not_judged(text)
            continue
        text += f" ({name})" if baseline == "best" else ""
        yield _line(text, times[name] / _ours(here)[0]["median_ms"], limit, at_least=True)


def _shares(rows: list[Row]) -> Iterator[str]:
    times = {row["case"]: row["median_ms"] for row in _ours(rows)}
    for case in ("backward, 70 % of the rows zero", "backward, 70 % zero in runs"):
        text = f"{case}: share of the dense backward"
        if case in times and "backward" in times:
            yield _line(text, times[case] / times["backward"], SHARE, at_least=False)
        else:
            yield _not_judged(text)


def _extras(rows: list[Row]) -> Iterator[str]:
    times = {(row["case"], row["dtype"]): row["median_ms"] for row in _ours(rows)}
    for case, extras in EXTRAS.items():
        more = times.get((f"{case} with {extras}", "float32"))
        bare = times.get((case, "float32"))
        text = f"{case}: with {extras} over the bare draw"
        yield (
            _line(text, more / bare, EXTRA, at_least=False) if bare and more else _not_judged(text)
        )


def _spreads(op: str, rows: list[Row]) -> Iterator[str]:
    for case in SPREADS[op]:
        text = f"{case}: slowest over fastest time per logit"
        here = [row for row in _ours(rows) if row["case"] == case]
        costs = [row["median_ms"] / prod(map(int, row["shape"].split("x"))) for row in here]
        if len(costs) > 1:
            yield _line(text, max(costs) / min(costs), SPREAD, at_least=False)
        else:
            yield _not_judged(text)


def _scaling(rows: list[Row]) -> Iterator[str]:
    times = {(row["case"], row["dtype"], row["threads"]): row["median_ms"] for row in _ours(rows)}
    for case, dtype in dict.fromkeys(key[:2] for key in times if "over" not in key[0]):
        one, two = times.get((case, dtype, 1)), times.get((case, dtype, 2))
        text = f"{case}, {dtype}: one thread over two"
        if one and two and one >= WORTH:
            yield _line(text, one / two, SCALING, at_least=True)
        else:
            yield _not_judged(text)
