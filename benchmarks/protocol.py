"""How a time is taken: gate, rotation, warm-up, interleaving, floor.

1. Gate: on every input that will be timed, values and gradients are compared with the reference in
   float64. A provider that fails is WRONG and is not timed.
2. Rotation: inputs are drawn fresh, enough of them to overflow the last-level cache.
3. Warm-up by time, so that compilers and thread pools are not measured while they start.
4. Interleaving: a round calls every provider once, in random order; drift of the machine hits all.
5. Floor: a read, a clone and, where needed, a rewrite of the same tensor run in the same rounds;
   what the op must move, at the rates they reach, is the floor: 100 % of it is all one can have.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import Case, Measurement, Provider, Results
from benchmarks.options import Options

# of the largest value, and of a row's absolute sum, by what the result is rounded to
TOLERANCE = {
    torch.float32: 1e-5,  # sums of 10^5 terms; numbers too, being made of float32 arithmetic
    torch.bfloat16: 2**-8,  # one rounding to 8 bits, and the float32 error
    torch.float16: 2**-6,  # gradients of 10^-6 are subnormal and keep a few bits
    torch.int64: 1e-12,  # tokens: no other
}
BASELINE = 10  # a baseline may add up in a worse order: index_add over 4096 tokens loses 2e-5
SCALAR = 0.1  # a mean over tokens may cancel to nothing; its error is that of terms of this size
MIN_ROUNDS = 5
COLD = 3  # last-level caches that the inputs overflow


def measure(case: Case, options: Options) -> Iterator[list[Measurement]]:
    """One list of measurements per thread count; the probes of the floor come last."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    pool = [case.draw(generator)]
    size = sum(value.nbytes for value in vars(pool[0]).values() if isinstance(value, Tensor))
    enough = 2 if options.quick else math.ceil(COLD * _cache(options) / size)
    pool += [case.draw(generator) for _ in range(enough - 1)]
    wanted = [case.reference(inputs) for inputs in pool]
    for threads in case.threads:
        torch.set_num_threads(threads)
        if "torch.compile" in options.providers:
            torch._dynamo.reset()  # compile for this case and thread count, and for no other
        measurements = [Measurement(provider, threads) for provider in _with_probes(case)]
        for measurement in measurements:
            _gate(measurement, pool, wanted, options.device)
        _time([m for m in measurements if m.verdict in ("ok", "probe")], pool, options)
        yield measurements


def _cache(options: Options) -> int:
    return machine.last_level_cache(options.device)


def _with_probes(case: Case) -> list[Provider]:
    def words(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        return flat[: flat.nbytes // 8 * 8 // flat.element_size()].view(torch.int64)

    def copy(inputs: Any) -> Tensor:
        return case.probe(inputs).clone()

    probes = [
        Provider("read", lambda inputs: {"": words(case.probe(inputs)).amax()}),
        Provider("clone", lambda inputs: {"": copy(inputs)}),
    ]
    if case.traffic.rewritten:
        probes.append(Provider("rewrite", lambda scratch: {"": scratch.neg_()}, prepare=copy))
    return [*case.providers, *probes]


def _gate(
    measurement: Measurement, pool: list[Any], wanted: list[Results], device: torch.device
) -> None:
    provider = measurement.provider
    prepare = provider.prepare or (lambda inputs: inputs)
    try:
        if not provider.is_probe:
            for inputs, want in zip(pool, wanted, strict=True):
                _compare(measurement, provider.run(prepare(inputs)), want)
        state = prepare(pool[0])
        measurement.peak = machine.peak_memory(lambda: provider.run(state), device)
    except Exception as error:  # shown in the table; ours make the exit status 1
        measurement.problem = f"{type(error).__name__}: {error}".splitlines()[0]


def _compare(measurement: Measurement, got: Results, want: Results) -> None:
    """The largest error: of the largest value, and of a row's absolute sum, which sees the many
    small entries of a gradient.
    """
    for name, result in got.items():
        value, expected = torch.as_tensor(result).detach(), torch.as_tensor(want[name]).detach()
        difference, size = (value.double() - expected.double()).abs(), expected.double().abs()
        difference = torch.where(value == expected, 0.0, difference)  # -inf where -inf is expected
        size = torch.where(size == math.inf, 0.0, size)
        shares = [_share(difference.amax(), size.amax().clamp(min=0.0 if size.dim() else SCALAR))]
        if size.dim() > 1:
            shares.append(_share(difference.sum(-1), size.sum(-1)).amax())
        error = max(math.inf if share.isnan() else float(share) for share in shares)
        measurement.error = max(measurement.error, error)
        allowed = TOLERANCE[value.dtype] * measurement.provider.slack
        if value.dtype == torch.float32 and not measurement.provider.is_ours:
            allowed *= BASELINE
        measurement.excess = max(measurement.excess, error / allowed)


def _share(difference: Tensor, size: Tensor) -> Tensor:
    return torch.where(difference == 0, 0.0, difference / size)  # 0 where 0 is expected is right


def _time(timed: list[Measurement], pool: list[Any], options: Options) -> None:
    cache = torch.empty(COLD * _cache(options) // 4, device=options.device)
    shuffle = random.Random(options.seed).shuffle
    turn = 0

    def once(provider: Provider) -> float:
        nonlocal turn
        turn += 1
        state = pool[turn % len(pool)]
        if provider.prepare is not None:
            state = provider.prepare(state)
            cache.neg_()  # preparing has left the inputs in the cache
        return _clock(lambda: provider.run(state), options.device)

    for measurement in timed:
        begin = time.perf_counter()
        once(measurement.provider)
        while time.perf_counter() - begin < options.warmup:
            once(measurement.provider)

    gc.collect()
    gc.disable()
    try:
        begin, rounds = time.perf_counter(), 0
        while rounds < (options.repeat or MIN_ROUNDS) or (
            options.repeat is None and time.perf_counter() - begin < options.seconds
        ):
            order = list(timed)
            shuffle(order)
            for measurement in order:
                measurement.times.append(once(measurement.provider))
            rounds += 1
    finally:
        gc.enable()


def _clock(call: Callable[[], Results], device: torch.device) -> float:
    """Seconds of one call; its results are freed after the clock has stopped."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = call()
        end.record()
        end.synchronize()
        del results
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    results = call()
    seconds = time.perf_counter() - begin
    del results
    return seconds
