"""sample: temperature, top-k, top-p and min-p, then an exact draw, in one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune._filters import Order, check_filters, split_parameter
from pyllmtune.kept import KeptTokens
from pyllmtune.ops.token_logprobs import as_rows
from pyllmtune.reference import sample as reference

Kind = Literal["raw", "scaled", "processed"]
KINDS = ("raw", "scaled", "processed")  # the rows of the operator's `logprobs`
Stat = Literal["rank", "kept_mass", "entropy"]
STATS = ("rank", "kept_mass", "entropy")


class SampleOutput(NamedTuple):
    """What ``sample`` returns; a field that was not asked for is None.

    tokens: ``[...]`` int64, with a last axis ``num_samples`` if that is above 1; -1 if invalid.
    valid: ``[...]`` bool, false where the row holds NaN or +inf or allows nothing.
    logprobs: as ``tokens``, float32, in nats; a dict of them if several kinds were asked for.
    rank: as ``tokens``: 1 + number of allowed tokens strictly ahead (higher logit, or equal and
        lower id); 0 if invalid.
    num_kept: ``[...]`` int64, tokens that the filters left; 0 if invalid.
    kept_mass: ``[...]`` float32, their probability before the filters, at this temperature.
    entropy: ``[...]`` float32, nats, of the distribution that was sampled.
    kept: the tokens themselves, a row of ``KeptTokens`` per row.
    """

    tokens: Tensor
    valid: Tensor
    logprobs: Tensor | dict[str, Tensor] | None
    rank: Tensor | None
    num_kept: Tensor
    kept_mass: Tensor | None
    entropy: Tensor | None
    kept: KeptTokens | None


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    order: Order = "hf",
    allowed: Tensor | None = None,
    row_indices: Tensor | None = None,
    num_samples: int = 1,
    seed: int | Tensor | None = None,
    position: int | Tensor = 0,
    generator: torch.Generator | None = None,
    logprobs: Kind | Sequence[Kind] | None = None,
    return_stats: bool | Stat | Sequence[Stat] = False,
    return_kept: bool = False,
    on_invalid: Literal["flag", "raise"] = "flag",
    backend: Backend = "auto",
) -> SampleOutput:
    """Draw tokens from the filtered softmax of each row of ``logits``, exactly and without a sort.

    The token is a pure function of the row's logits, parameters, seed and position: the same on
    every backend, in any batch, with any number of threads. One 64-bit Philox number is inverted
    through the cumulative integer masses of the kept tokens in order of id, so the probability of
    each is exact to 2^-44 of the largest, however rare the token. See docs/sample.md.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64 (rounded to float32), last axis
            contiguous. -inf means "not allowed".
        temperature, top_k, top_p, min_p, order: as in ``filter_logits``; each a scalar or one per
            row, greedy rows (temperature 0) among them.
        allowed: bool ``[..., V]`` or ``[V]``, or int32 bits ``[..., ceil(V / 32)]`` or
            ``[ceil(V / 32)]``, lowest bit first, as grammar engines write them; what is not
            allowed may hold anything.
        row_indices: ``[N]`` int64: draw from these rows (leading axes of ``logits`` flattened), the
            same row as often as wanted. All per-row arguments and results are then ``[N]``.
        num_samples: independent draws per row, with replacement.
        seed: int64; one per row makes rows independent, a single number gives every row the same
            random number. None draws one per row from ``generator``, or from torch's own, so that
            ``torch.manual_seed`` works.
        position: 0 or more, e.g. the index of the token in its sequence: with one seed a sequence,
            another position gives another random number.
        logprobs: ``"raw"`` (temperature 1, no filter), ``"scaled"`` (temperature alone),
            ``"processed"`` (the distribution that is sampled), or several.
        return_stats: also ``"rank"``, ``"kept_mass"`` or ``"entropy"``, or several; True is all. On
            the CPU a row with ``top_k`` is drawn, scored (``"processed"``) and ranked from its
            candidates; ``"kept_mass"``, ``"raw"`` and ``"scaled"`` look at all its logits.
        return_kept: also the kept tokens. On a GPU their number is waited for.
        on_invalid: ``"raise"`` makes an invalid row an error and waits for the device; it is for
            debugging.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.

    >>> import torch
    >>> z = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    >>> sample(z, temperature=0).tokens  # the first of equals
    tensor([1, 0])
    >>> out = sample(z, top_k=2, seed=torch.tensor([1, 2]), logprobs="processed")
    >>> out.num_kept
    tensor([2, 2])
    """
    _checks.check_logits("logits", logits)
    device, vocab = logits.device, logits.shape[-1]
    shape = logits.shape[:-1]
    logits_rows = as_rows(logits.detach())
    if row_indices is not None:
        _check_row_indices(row_indices, logits_rows.shape[0] * logits_rows.shape[1], device)
        shape, row_indices = row_indices.shape, row_indices.long().contiguous()
    if on_invalid not in ("flag", "raise"):
        raise ValueError(f"on_invalid must be 'flag' or 'raise', got {on_invalid!r}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer of at least 1, got {num_samples!r}")
    filters = check_filters(temperature, top_k, top_p, min_p, order, shape, device)
    kinds = _names("logprobs", logprobs, KINDS)
    stats = STATS if return_stats is True else _names("return_stats", return_stats or None, STATS)
    bits = as_allowed(allowed, shape, vocab, device)
    seeds = split_seed(seed, generator, shape, device)
    limits = {"least": 0, "most": 2**63 - 1, "remedy": "an int64, 0 or more"}
    positions = split_parameter(
        "position", position, shape, device, off=0, dtype=torch.int64, **limits
    )
    floor = _backend.resolve(backend, device, logits.dtype)

    run = reference.sample if floor == "reference" else _ops.handle("sample", floor)
    tokens, valid, scores, rank, num_kept, kept_mass, entropy, kept_ids = run(
        logits_rows,
        *filters,
        bits,
        row_indices,
        num_samples,
        *seeds,
        *positions,
        bool(kinds),
        bool(stats),
        not {"raw", "scaled", "kept_mass"}.isdisjoint((*kinds, *stats)),
        return_kept,
    )
    if on_invalid == "raise" and not bool(valid.all()):
        first = int((~valid).nonzero()[0])
        raise ValueError(
            f"logits row {first} holds NaN or +inf or allows no token; "
            "on_invalid='flag' marks such rows in `valid` instead"
        )
    draws = shape if num_samples == 1 else (*shape, num_samples)
    found = {kind: scores[KINDS.index(kind)].reshape(draws) for kind in kinds}
    return SampleOutput(
        tokens.reshape(draws),
        valid.reshape(shape),
        found if not isinstance(logprobs, str) and kinds else found.get(logprobs),
        rank.reshape(draws) if "rank" in stats else None,
        num_kept.reshape(shape),
        kept_mass.reshape(shape) if "kept_mass" in stats else None,
        entropy.reshape(shape) if "entropy" in stats else None,
        KeptTokens.from_counts(num_kept, kept_ids) if return_kept else None,
    )


def greedy(
    logits: Tensor,
    *,
    logprobs: bool = False,
    allowed: Tensor | None = None,
    backend: Backend = "auto",
) -> SampleOutput:
    """The most probable token of each row, the lowest id of equals; one read.

    Args:
        logits: as in ``sample``.
        logprobs: also the token's log-prob under the plain softmax (``"raw"`` of ``sample``).
        allowed: as in ``sample``.
        backend: as in ``sample``.

    Returns:
        A ``SampleOutput``.

    >>> import torch
    >>> greedy(torch.tensor([[1.0, 3.0, 3.0]])).tokens
    tensor([1])
    """
    kind = "raw" if logprobs else None
    return sample(logits, temperature=0.0, seed=0, allowed=allowed, logprobs=kind, backend=backend)


def split_seed(
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    shape: torch.Size,
    device: torch.device,
) -> tuple[int, Tensor | None]:
    """One for all rows, or one a row; drawn if there is none."""
    limits = {"least": -(2**63), "most": 2**63 - 1}
    if seed is None:
        seed = torch.randint(
            *limits.values(), shape, dtype=torch.int64, device=device, generator=generator
        )
    elif generator is not None:
        raise ValueError("generator draws the seeds, so it cannot be given together with seed")
    return split_parameter(
        "seed", seed, shape, device, off=0, dtype=torch.int64, **limits, remedy="an int64"
    )


def _names(
    argument: str, given: str | Sequence[str] | None, known: tuple[str, ...]
) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given or ())
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} must be of {', '.join(known)}, got {name!r}")
    return names


def _check_row_indices(indices: Tensor, rows: int, device: torch.device) -> None:
    _checks.check_tensor("row_indices", indices, (torch.int64, torch.int32))
    if indices.dim() != 1 or indices.device != device:
        raise ValueError(
            f"row_indices must be [N] on {device}, got {list(indices.shape)} on {indices.device}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"row_indices must be in [0, {rows}), the rows of logits; got {low} to {high}"
            )


def as_allowed(
    allowed: Tensor | None, shape: torch.Size, vocab: int, device: torch.device
) -> Tensor | None:
    """``allowed`` as ``[R or 1, V]`` bool or ``[R or 1, words]`` int32, contiguous."""
    if allowed is None:
        return None
    _checks.check_tensor("allowed", allowed, (torch.bool, torch.int32))
    width = vocab if allowed.dtype == torch.bool else (vocab + 31) // 32
    if tuple(allowed.shape) not in ((width,), (*shape, width)):
        raise ValueError(
            f"allowed must be {[*shape, width]} or [{width}] "
            f"({'bool' if allowed.dtype == torch.bool else 'int32 bits, 32 tokens a word'}), "
            f"got {list(allowed.shape)}"
        )
    if allowed.device != device:
        raise ValueError(f"allowed is on {allowed.device}, logits are on {device}; move it")
    return allowed.reshape(-1, width).contiguous()


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    row_indices, num_samples = args[10:12]
    scores, stats, _, kept = args[16:]
    rows = logits.shape[0] * logits.shape[1] if row_indices is None else row_indices.shape[0]
    some = rows if stats else 0
    size = torch.library.get_ctx().new_dynamic_size() if kept else 0
    new = logits.new_empty
    return (
        new((rows, num_samples), dtype=torch.int64),
        new(rows, dtype=torch.bool),
        new((3 if scores else 0, rows, num_samples), dtype=torch.float32),
        new((some, num_samples), dtype=torch.int64),
        new(rows, dtype=torch.int64),
        new(some, dtype=torch.float32),
        new(some, dtype=torch.float32),
        new(size, dtype=torch.int32),
    )


def _register(floor: str) -> None:
    name = f"{_ops.NAMESPACE}::{_ops.op_name('sample', floor)}"
    torch.library.register_fake(name, _fake, lib=_ops.LIBRARY)


_ops.for_every_floor(_register)
