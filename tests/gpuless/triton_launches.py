"""Calls every Triton function as a GPU would get the call, up to the launch: compiled, not run.

    python -m tests.gpuless.triton_launches     a line of JSON for each launch

The interpreter skips all of this: how arguments are specialised, what None, bools and floats
become, checks that Triton makes at a second launch. A process of its own, since Triton decides at
import whether it interprets. The driver of an H100 is replaced by one that knows its name.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from .binary_facts import Facts, cubin_facts
from .toolchain import BUILD, REPO


def compiled_launches() -> list[dict[str, Any]]:
    """Kernel, 16-byte accesses, and whether a second, equal call found it compiled."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(BUILD / "triton"))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.gpuless.triton_launches"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"a Triton launch failed\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def calls() -> list[tuple[str, Any]]:
    """Every function, with and without each optional argument, as (description, call)."""
    import torch
    from pyllmtune.kernels import (
        beam_step,
        filter_logits,
        gae,
        kept_logits,
        kept_token_logprobs,
        kl_divergence,
        policy_loss,
        sample,
        temperature_softmax,
        token_logprobs,
    )

    from pyllmtune import PolicyLossConfig

    found = []
    for dtype, vocab, optional in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (1, 32000, 50257), (False, True)
    ):
        logits = torch.zeros(2, 4, vocab, dtype=dtype)[:, :-1]
        rows = torch.zeros(2, 3)
        head = (
            logits,
            rows.long(),
            0.7,
            rows if optional else None,
            rows > 0 if optional else None,
        )
        upstream = (rows, torch.zeros(2, 2, 3), rows, rows, rows)
        name = f"{dtype} V{vocab}{' options' if optional else ''}"
        found += [
            (name, lambda args=(*head, False): token_logprobs.token_logprobs(*args)),
            *(
                (name, lambda function=function, args=(*head, *upstream): function(*args))
                for function in (
                    token_logprobs.token_logprobs_backward,
                    token_logprobs.token_logprobs_backward_inplace,
                )
            ),
        ]
        sets = (torch.arange(7), torch.zeros(6, dtype=torch.int32))
        kept = (*sets, rows.long().flatten(), *head[2:3])
        kept += (rows.flatten(), rows.flatten() > 0) if optional else (None, None)
        scored = tuple(value.flatten() for value in upstream)
        for x in (logits, torch.zeros(6, dtype=dtype)):
            found += [
                (name, lambda args=(x, *kept): kept_token_logprobs.kept_token_logprobs(*args)),
                (
                    name,
                    lambda args=(x, *kept, *scored): (
                        kept_token_logprobs.kept_token_logprobs_backward(*args)
                    ),
                ),
            ]
        hidden, weight = (torch.zeros(n, vocab // 10 + 1, dtype=dtype) for n in (6, 9))
        picked, masked = torch.zeros(6), scored[0] > 0 if optional else None
        found += [
            (name, lambda args=(hidden, weight, *sets, masked): kept_logits.kept_logits(*args)),
            (
                name,
                lambda args=(picked, weight, *sets): kept_logits.kept_logits_backward_hidden(*args),
            ),
            (
                name,
                lambda args=(picked, sets[0][:6], sets[1], hidden, weight): (
                    kept_logits.kept_logits_backward_weight(*args)
                ),
            ),
        ]
        softmax = (logits, 0.7, rows if optional else None, optional)
        stored = torch.float32 if optional else dtype
        output = torch.zeros(2, 3, vocab, dtype=stored)
        found += [
            (name, lambda args=(*softmax, stored): temperature_softmax.temperature_softmax(*args)),
            (
                name,
                lambda args=(output, output, *softmax[1:], dtype, optional): (
                    temperature_softmax.temperature_softmax_backward(*args)
                ),
            ),
        ]
        weight = 0.5 if optional and dtype == torch.float32 else 0.0
        pair = (logits, torch.zeros(2, 3, vocab, dtype=dtype), *head[2:], weight)
        wanted = (torch.zeros(6, 2, 3), rows, True, optional)
        found += [
            (name, lambda args=pair: kl_divergence.kl_divergence(*args)),
            (name, lambda args=(*pair, *wanted): kl_divergence.kl_divergence_backward(*args)),
        ]
        if dtype == torch.float16:
            continue  # long kernels, compiled as for bfloat16
        stored = output.to(dtype)
        row, whole = rows.flatten(), rows.long().flatten()
        given = (row, 3, whole, 0.9, row.double(), 0.1, row) if optional else (None, 0, None, 1.0)
        filters = (0.7, *given, *((None, 0.0, None) if not optional else ()), int(optional))
        words = torch.zeros(6, (vocab + 31) // 32, dtype=torch.int32)
        draws = (3, 5, whole, 7, whole) if optional else (1, 5, None, 7, None)
        masked = (words, whole) if optional else (None, None)
        beams = (0.7, None, None, True, None, None, 6, 1, 0.0)
        if optional:
            beams = (0.7, rows, words, False, whole[:2], whole[:3], 12, 3, 0.5)
        found += [
            (name, lambda args=(logits, *filters): filter_logits.filter_logits(*args)),
            (
                name,
                lambda args=(stored, stored, 0.7, filters[1]): filter_logits.filter_logits_backward(
                    *args
                ),
            ),
            (
                name,
                lambda args=(logits, *filters, *masked, *draws, *[optional] * 4): sample.sample(
                    *args
                ),
            ),
            (
                name,
                lambda args=(logits, rows, *beams): beam_step.beam_step(*args),
            ),
        ]
    tokens, offsets = torch.zeros(40), torch.tensor([0, 8, 40])
    for level, rule, kl, optional in itertools.product(
        ("token", "sequence"), ("ppo", "cispo", "sapo"), ("none", "k3"), (False, True)
    ):
        config = PolicyLossConfig(
            level=level,
            rule=rule,
            kl=kl,
            cap=3.0 if optional and rule == "ppo" else None,
            kl_coef=0.1 if kl != "none" else 0.0,
            aggregation="seq-mean-token-mean" if optional else "token-mean",
        )
        extra = [tokens, tokens, tokens] if optional else [tokens if config.kl_coef else None]
        args = (
            *(tokens, tokens, tokens if optional else tokens[:2], optional, offsets),
            *(tokens > 0 if optional else None, *extra, *[None] * (3 - len(extra)), 0.0),
            *(offsets.float()[0] if optional else None, config.choices, config.constants),
        )
        found.append(("policy_loss", lambda args=args: policy_loss.policy_loss(*args)))
    for optional in (False, True):
        flags, rows = (tokens > 0, tokens[:2]) if optional else (None, None)
        args = (tokens, tokens, offsets, flags, flags, rows, 0.99, 0.95, rows, rows, optional)
        found.append(("gae", lambda args=args: gae.gae(*args)))
    return found


@functools.cache
def _facts(binary: bytes) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        return cubin_facts(cubin, smem=0)


def main() -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    h100 = mock.Mock()
    h100.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    h100.get_current_device.return_value = h100.get_current_stream.return_value = 0
    driver.set_active(h100)
    compile_and_launch, launched = JITFunction.run, []

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = compile_and_launch(function, *args, grid=grid, warmup=True, **options)
        launched.append(binary)
        return binary

    JITFunction.run = compile_only
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # of what no kernel writes, a size is read
    for name, call in calls():
        launched.clear()
        call()
        first = list(launched)
        launched.clear()
        call()
        for binary, again in zip(first, launched, strict=True):
            facts = _facts(binary.asm["cubin"])
            line = {
                "call": name,
                "kernel": binary.metadata.name,
                "cached": again is binary,
                "loads_128": facts.loads_128,
                "stores_128": facts.stores_128,
                "spills": facts.spills + facts.stack,
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
