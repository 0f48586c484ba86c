"""linear_token_logprobs: token_logprobs from hidden states, without the logits in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyllmtune import _backend, _checks, _ops
from pyllmtune._backend import Backend
from pyllmtune.kept import KeptTokens
from pyllmtune.ops import linear_shards as shards
from pyllmtune.ops import linear_tiles as tiles
from pyllmtune.ops.kept_logits import kept_logits
from pyllmtune.ops.kept_token_logprobs import check_kept, kept_token_logprobs
from pyllmtune.ops.token_logprobs import TokenLogprobs
from pyllmtune.reference import linear_token_logprobs as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    kept: KeptTokens | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of ``tokens``, entropy and logsumexp of ``softmax(z / temperature)``, where ``z =
    softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``, without ``[N, V]`` in
    memory.

    All three results are differentiable in ``hidden``, ``weight`` and ``bias``, in any combination.
    Masked rows are left out of every matmul; rows whose upstream gradients are all zero (masked,
    clipped, zero advantage) are left out of backward. Logits are made tile by tile, and again in
    backward: four matmuls for forward and backward instead of three, but for those that a large
    ``workspace_bytes`` has room to keep.

    bfloat16 operands are multiplied as they are and summed in float32; logits are never rounded to
    bfloat16, and float32 operands never leave float32. Gradients are summed in float32 and rounded
    once. On the CPU a row's results and hidden gradient have the same bits in any batch, and no
    result depends on ``workspace_bytes`` or the number of threads.

    Inside ``torch.autocast`` hidden and weight are cast as ``torch.nn.functional.linear`` would.

    Args:
        hidden: ``[..., D]``, float16, bfloat16, float32 or float64.
        weight: ``[V, D]``, the lm_head, in the dtype of ``hidden``. A DTensor sharded by rows over
            a 1-d mesh brings ``process_group`` and ``vocab_start`` with it, and ``bias`` is then
            placed alike; other tensors may be replicated DTensors.
        tokens: ``[...]``, int64 or int32, in ``[0, V)`` wherever the mask selects.
        bias: ``[V]``; -inf forbids a token.
        temperature: positive scalar, or one per token ``[...]``.
        logit_scale: multiplies the logits (Cohere, Granite).
        softcap: bound of the logits (Gemma 2), applied before the temperature.
        mask: ``[...]``, true selects. Masked rows give exactly 0, with gradient exactly 0, whatever
            they hold. On a GPU the number of selected rows is read by the host.
        kept: the tokens that a sampler kept, as of ``token_logprobs``: their distribution alone, by
            a dot product for each; of large sets by a matmul, which rounds otherwise. The gradient
            of ``weight`` is 0 in rows that nobody kept. Not for ``workspace_bytes`` or shards.
        process_group: ``weight`` and ``bias`` are this rank's rows of a head that is sharded over
            the ranks of this group; shards may differ in size and be empty, and do not overlap.
            Every rank calls with the same ``hidden``, ``tokens`` and options, gets the same results
            bit for bit, and must hand back the same upstream gradients; each then has the gradient
            of its own shard and the whole gradient of ``hidden``. One all-gather of four floats a
            token, and in backward one all-reduce. See docs/distributed.md.
        vocab_start: token id of the first row of this rank's ``weight``.
        workspace_bytes: bound of the memory for tiles of logits and their gradient, 32 MiB by
            default (512 MiB on a GPU). With room beside a tile, logits are kept for backward, all
            of them from about ``4 * N * V`` on, but for shards and ``torch.compile``. Backward also
            holds the gradient of ``hidden`` and of one tile of ``weight`` in float32.
        backend: ``"auto"`` takes the fastest present; a named one is used or refused, never
            replaced.

    Returns:
        ``TokenLogprobs(logprobs, entropy, logsumexp)`` as of ``token_logprobs``: float32 (float64
        for float64), each ``[...]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, D or V is 0, a number is out of its range, or (on the
            CPU, outside ``torch.compile``) an unmasked token is not in ``[0, V)``, or not in
            exactly one shard; elsewhere such a token turns its own row into NaN.

    >>> import torch
    >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> out = linear_token_logprobs(hidden, weight, torch.tensor([0]))
    >>> out.logprobs.exp()  # logits 3 and 1
    tensor([0.8808])
    """
    scores, _ = score_hidden(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        mask=mask,
        kept=kept,
        process_group=process_group,
        vocab_start=vocab_start,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return scores


def score_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None = None,
    kept: KeptTokens | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> tuple[TokenLogprobs, Tensor | None]:
    """``linear_token_logprobs`` with, of each row ``[N]``, sum e^((z - max z) / T): one over the
    probability of its best token. None on the reference floor and with ``kept``.
    """
    hidden, tokens = shards.whole("hidden", hidden), shards.whole("tokens", tokens)
    mask, temperature = shards.whole("mask", mask), shards.whole("temperature", temperature)
    weight, bias, process_group, vocab_start = shards.of_rank(
        weight, bias, process_group, vocab_start
    )
    sharded = process_group is not None
    given = (bias, temperature, logit_scale, softcap, mask, backend)
    floor, head = head_arguments(hidden, weight, tokens, *given, sharded=sharded)
    device, shape = hidden.device, hidden.shape[:-1]
    if kept is not None:
        if workspace_bytes is not None:
            raise ValueError("workspace_bytes bounds tiles of whole rows; leave it out with kept=")
        if sharded:
            raise ValueError("kept= needs the whole weight, got a shard; gather it for this call")
        check_kept(kept, tokens.numel(), weight.shape[0], device)
        rows, weight, flat_tokens, bias, scalar, per_row, scale, cap, flat_mask = head
        scores = kept_token_logprobs(
            _head_of_kept(rows, weight, bias, kept, scale, cap, flat_mask, floor),
            *(flat_tokens, kept, scalar, per_row, flat_mask, floor),
        )
        return TokenLogprobs(*(score.reshape(shape) for score in scores)), None

    arguments = (*head, check_workspace(workspace_bytes, device, head[0].dtype))
    if process_group is not None:
        results = shards.score_shards(floor, process_group, vocab_start, arguments)
    elif floor == "reference":
        results = reference.linear_token_logprobs(*arguments)
    else:
        results = _ops.handle("linear_token_logprobs", floor)(*arguments, keeps_logits(*head[:2]))
    scores = TokenLogprobs(*(result.reshape(shape) for result in results[:3]))
    return scores, results[3][1] if len(results) > 3 else None


def keeps_logits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether there is a backward to keep logits for. Compiled, how many would fit is a question
    about the number of rows, and each answer a compilation.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return wanted and not torch.compiler.is_compiling()


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    backend: Backend,
    sharded: bool = False,
) -> tuple[str, tuple[Any, ...]]:
    """The floor, and the operator's arguments before ``workspace_bytes``, checked and flat."""
    _checks.check_tensor("hidden", hidden, _checks.FLOATS)
    _checks.check_tensor("weight", weight, _checks.FLOATS)
    device, shape = hidden.device, hidden.shape[:-1]
    hidden, weight = _autocast(hidden, weight)
    _check_head(hidden, weight, 0 if sharded else 1)
    select = _checks.as_mask(mask, shape, device, "the leading shape of hidden")
    if sharded:  # what V is comes to light when the shards are merged
        _checks.check_tensor("tokens", tokens, (torch.int64, torch.int32))
        _checks.check_like("tokens", tokens, shape, device, "the leading shape of hidden")
    else:  # the logits that are never made: a view of one number
        _checks.check_tokens(tokens, weight.new_empty(()).expand(*shape, weight.shape[0]), select)
    scalar, per_row = _checks.split_temperature(temperature, shape, device)
    wide = tiles.accumulator(hidden.dtype)
    if bias is not None:
        _checks.check_tensor("bias", bias, _checks.FLOATS)
        _checks.check_like("bias", bias, weight.shape[:1], device, "one per row of weight")
        bias = bias.to(wide).contiguous()
    scale, cap = _check_numbers(logit_scale, softcap)
    return _backend.resolve(backend, device, hidden.dtype), (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        tokens.reshape(-1).contiguous().long(),
        bias,
        scalar,
        None if per_row is None else per_row.to(wide).reshape(-1).contiguous(),
        scale,
        cap,
        None if select is None else select.reshape(-1).contiguous(),
    )


def _head_of_kept(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: KeptTokens,
    scale: float,
    cap: float,
    mask: Tensor | None,
    floor: str,
) -> Tensor:
    """z of each kept token, ``[entries]``."""
    logits = kept_logits(hidden, weight, kept, mask, floor)
    if bias is not None:  # the weight of one more hidden state, which is 1
        one = bias.new_ones(hidden.shape[0], 1)
        logits = logits + kept_logits(one, bias[:, None], kept, mask, floor)
    logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def _check_head(hidden: Tensor, weight: Tensor, least: int) -> None:
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be [..., D] with D at least 1, got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1]}] with V at least {least}, as hidden is "
            f"{list(hidden.shape)}; got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight is {weight.dtype} and hidden {hidden.dtype}; convert one of them with .to()"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"weight is on {weight.device}, hidden on {hidden.device}; move it with .to()"
        )


def _check_numbers(logit_scale: float, softcap: float | None) -> tuple[float, float]:
    scale = float(logit_scale)
    if not -math.inf < scale < math.inf or scale == 0.0:
        raise ValueError(f"logit_scale must be finite and not 0, got {scale}; 1 changes nothing")
    cap = 0.0 if softcap is None else float(softcap)
    if softcap is not None and not 0.0 < cap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {cap}; None is no cap")
    return scale, cap


def check_workspace(workspace_bytes: int | None, device: torch.device, dtype: torch.dtype) -> int:
    if workspace_bytes is None:
        return tiles.WORKSPACE.get(device.type, tiles.WORKSPACE["cpu"])
    least = tiles.CHUNK_ROWS * tiles.row_bytes(device, dtype)
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be at least {least}, one tile of {tiles.CHUNK_ROWS} rows, got "
            f"{workspace_bytes}; None takes the default"
        )
    return int(workspace_bytes)


def _fake_forward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    space, keep = rest[7], any(rest[8:])
    rows, dtype = hidden.shape[0], tiles.accumulator(hidden.dtype)
    one = [hidden.new_empty(rows, dtype=dtype) for _ in range(3)]
    columns = tiles.kept_columns(rows, weight.shape[0], space, hidden) if keep else 0
    stats, logits = (hidden.new_empty(size, dtype=dtype) for size in ((2, rows), (rows, columns)))
    return (*one, stats, logits)


def _fake_stats(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((4, hidden.shape[0]), dtype=tiles.accumulator(hidden.dtype))


def _fake_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight, of_bias, *wide_hidden = rest[13:17]
    wide = tiles.accumulator(hidden.dtype)
    return (
        hidden.new_empty(
            hidden.shape if of_hidden else (0, hidden.shape[1]),
            dtype=wide if any(wide_hidden) else hidden.dtype,
        ),
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(weight.shape[:1] if of_bias else (0,), dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, bias, temperature, row_temperature, scale, cap, mask, space, _ = inputs
    _, entropy, _, stats, logits = output
    ctx.mark_non_differentiable(stats, logits)
    saved = (hidden, weight, tokens, bias, row_temperature, mask, entropy, stats, logits)
    ctx.save_for_backward(*saved)
    ctx.numbers = temperature, scale, cap, space


def _register(floor: str) -> None:
    forward, backward, stats, tile, tile_backward = (
        f"{_ops.NAMESPACE}::{_ops.op_name('linear_token_logprobs' + suffix, floor)}"
        for suffix in ("", "_backward", "_stats", "_tile", "_tile_backward")
    )

    @once_differentiable
    def gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rest, logits = ctx.saved_tensors
        hidden, weight, tokens, bias, row_temperature, mask, entropy, stats = rest
        temperature, scale, cap, space = ctx.numbers
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        found = _ops.handle("linear_token_logprobs_backward", floor)(
            *(hidden, weight, tokens, bias, temperature, row_temperature, scale, cap, mask, space),
            *(entropy, stats, *(grad.contiguous() for grad in grads[:3]), *wanted),
            logits=logits,
        )
        by_hidden, by_weight, by_bias = (
            grad if want else None for grad, want in zip(found, wanted, strict=True)
        )
        return (by_hidden, by_weight, None, by_bias, *(None,) * 7)

    torch.library.register_fake(forward, _fake_forward, lib=_ops.LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_ops.LIBRARY)
    torch.library.register_fake(stats, _fake_stats, lib=_ops.LIBRARY)
    torch.library.register_fake(tile, lambda *args: None, lib=_ops.LIBRARY)
    torch.library.register_fake(tile_backward, lambda *args: None, lib=_ops.LIBRARY)
    _ops.register_autograd(forward, gradient, _save)


_ops.for_every_floor(_register)
