"""The operators: every schema in one place, and the floors that implement them.

Schemas are declared here, in Python, so that the operators exist even when nothing was compiled.
C++ and CUDA implement ``pyllmtune::<word>`` for their device; the Triton kernels implement
``pyllmtune::<word>_triton``. The fake kernel and the gradient are the same for every floor and live
in ``pyllmtune/ops/<word>.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "pyllmtune"

# logits [outer, inner, V] with unit last stride; tokens, mask and all results [outer, inner];
# stats [2, outer, inner]: the row's maximum and log sum e^((z - max)/T), for backward
_SCORE_INPUTS = "Tensor tokens, float temperature, Tensor? row_temperature, Tensor? mask"
_SCORE_UPSTREAM = (
    "Tensor entropy, Tensor stats, Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_logsumexp"
)
_SCORE_GRADIENT = f"{_SCORE_INPUTS}, {_SCORE_UPSTREAM}"
_KEPT_INPUTS = f"Tensor offsets, Tensor token_ids, {_SCORE_INPUTS}"

_TILE = (
    "Tensor logits, int first, float scale, float softcap, Tensor? bias,"
    " Tensor tokens, float temperature, Tensor? row_temperature"
)
# hidden [N, D], weight [V, D], bias [V], the rest [N]; stats [2, N]; softcap 0 is none
_LINEAR_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, float temperature,"
    " Tensor? row_temperature, float logit_scale, float softcap, Tensor? mask, int workspace_bytes"
)

# a scalar for all rows, or one value per row [rows], for each filter; `order` indexes
# reference.row_filter.ORDERS
_FILTERS = (
    "float temperature, Tensor? row_temperature, int top_k, Tensor? row_top_k,"
    " float top_p, Tensor? row_top_p, float min_p, Tensor? row_min_p, int order"
)

SCHEMAS = {
    "token_logprobs": f"(Tensor logits, {_SCORE_INPUTS}, bool inplace_backward)"
    " -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor stats)",
    "token_logprobs_backward": f"(Tensor logits, {_SCORE_GRADIENT}) -> Tensor",
    "token_logprobs_backward_inplace": f"(Tensor(a!) logits, {_SCORE_GRADIENT}) -> ()",
    # js_weight 0: KL; divergence [outer, inner], stats [6, outer, inner]: csrc/math/divergence.h
    "kl_divergence": "(Tensor logits, Tensor ref_logits, float temperature,"
    " Tensor? row_temperature, Tensor? mask, float js_weight)"
    " -> (Tensor divergence, Tensor stats)",
    # a gradient that is not wanted is empty
    "kl_divergence_backward": "(Tensor logits, Tensor ref_logits, float temperature,"
    " Tensor? row_temperature, Tensor? mask, float js_weight, Tensor stats, Tensor grad,"
    " bool logits_gradient, bool ref_gradient)"
    " -> (Tensor grad_logits, Tensor grad_ref_logits)",
    # logits [outer, inner, V], or [entries] of the kept tokens alone; offsets [rows + 1] and
    # token_ids [entries] as in KeptTokens; the rest and the results [rows], stats [2, rows]
    "kept_token_logprobs": f"(Tensor logits, {_KEPT_INPUTS})"
    " -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor stats)",
    "kept_token_logprobs_backward": f"(Tensor logits, {_KEPT_INPUTS}, {_SCORE_UPSTREAM}) -> Tensor",
    # one tile of logits [rows, columns], float32 or float64; columns first ... of V.
    # bias [columns]; running [4, rows] = (max, sum, weighted, target logit), scores [3, rows] =
    # (log-prob, entropy, logsumexp) of the columns so far
    "linear_token_logprobs_tile": f"({_TILE}, Tensor(a!) running, Tensor(b!) scores) -> ()",
    # stats [3, rows] = (max, sum, entropy), upstream [3, rows], grad [rows, columns]
    "linear_token_logprobs_tile_backward": f"({_TILE}, Tensor stats, Tensor upstream,"
    " Tensor(a!) grad) -> ()",
    # hidden [rows, D] and weight [V, D] of one dtype, contiguous; the result [entries], float32
    "kept_logits": "(Tensor hidden, Tensor weight, Tensor offsets, Tensor token_ids, Tensor? mask)"
    " -> Tensor",
    "kept_logits_backward_hidden": "(Tensor grad, Tensor weight, Tensor offsets, Tensor token_ids)"
    " -> Tensor",
    # the entries by token: grad, rows and token_ids [entries], token_ids ascending
    "kept_logits_backward_weight": "(Tensor grad, Tensor rows, Tensor token_ids, Tensor hidden,"
    " Tensor weight) -> Tensor",
    # logits, output and grad [outer, inner, V] with unit last stride; row_temperature and
    # grad_temperature [outer, inner]; dtype is that of the logits or float32, as stored by the op
    "temperature_softmax": "(Tensor logits, float temperature, Tensor? row_temperature, bool log,"
    " ScalarType dtype) -> Tensor",
    "temperature_softmax_out": "(Tensor logits, float temperature, Tensor? row_temperature,"
    " bool log, Tensor(a!) out) -> ()",
    # dtype is that of the logits; without temperature_gradient its result is empty
    "temperature_softmax_backward": "(Tensor grad, Tensor output, float temperature,"
    " Tensor? row_temperature, bool log, ScalarType dtype, bool temperature_gradient)"
    " -> (Tensor grad_logits, Tensor grad_temperature)",
    "filter_logits": f"(Tensor logits, {_FILTERS}) -> Tensor",
    "filter_logits_out": f"(Tensor logits, {_FILTERS}, Tensor(a!) out) -> ()",
    "filter_logits_backward": "(Tensor grad, Tensor output, float temperature,"
    " Tensor? row_temperature) -> Tensor",
    # R rows are drawn from: those of logits, or row_indices [R]. allowed [R or 1, V] bool or
    # [R or 1, ceil(V / 32)] int32. Of the results, logprobs is [3, R, num_samples] (raw, scaled,
    # processed) or [0, ...], rank [R, num_samples], kept_mass and entropy [R] or empty, kept_ids
    # the kept tokens of all rows or empty. Without totals, raw and scaled log-probs and kept_mass
    # hold anything: they alone need all logits of a top-k row
    "sample": f"(Tensor logits, {_FILTERS}, Tensor? allowed, Tensor? row_indices, int num_samples,"
    " int seed, Tensor? row_seed, int position, Tensor? row_position,"
    " bool logprobs, bool return_stats, bool totals, bool return_kept)"
    " -> (Tensor tokens, Tensor valid, Tensor logprobs, Tensor rank, Tensor num_kept,"
    " Tensor kept_mass, Tensor entropy, Tensor kept_ids)",
    # logits [batch, num_beams, V] with unit last stride; beam_scores, row_temperature and valid
    # [batch, num_beams]; allowed [batch * num_beams or 1, ...] as for sample; widths [batch] int64;
    # other results [batch, num_candidates], group after group
    "beam_step": "(Tensor logits, Tensor beam_scores, float temperature, Tensor? row_temperature,"
    " Tensor? allowed, bool renormalize, Tensor? widths, Tensor? eos_token_ids,"
    " int num_candidates, int num_groups, float diversity_penalty)"
    " -> (Tensor scores, Tensor tokens, Tensor parents, Tensor is_eos, Tensor valid)",
    # per-token tensors are flat [total], sequence i is offsets[i]:offsets[i + 1]; advantages are
    # [total] or [sequences]; normalizer 0 means: count tokens or sequences; choices and constants
    # are those of PolicyLossConfig; the gradients returned are still to be multiplied by `scale`
    "policy_loss": "(Tensor logprobs, Tensor old_logprobs,"
    " Tensor advantages, bool token_advantages, Tensor offsets, Tensor? mask,"
    " Tensor? ref_logprobs, Tensor? entropy, Tensor? weights,"
    " float normalizer, Tensor? device_normalizer, int[] choices, float[] constants)"
    " -> (Tensor loss, Tensor metrics, Tensor grad_logprobs, Tensor grad_entropy, Tensor scale)",
    # per-token tensors as above; bootstrap, sequence_gamma and sequence_lam [sequences]
    "gae": "(Tensor rewards, Tensor values, Tensor offsets, Tensor? mask, Tensor? terminated,"
    " Tensor? bootstrap, float gamma, float lam, Tensor? sequence_gamma, Tensor? sequence_lam,"
    " bool carry_masked) -> (Tensor advantages, Tensor returns)",
}

# operators whose kernel is Python on every floor: loops over the operators above and torch's
COMPOSED = {
    # logits: of some columns, for backward, if they are to be kept and the workspace has room
    "linear_token_logprobs": f"({_LINEAR_INPUTS}, bool keep_logits)"
    " -> (Tensor logprobs, Tensor entropy, Tensor logsumexp, Tensor stats, Tensor logits)",
    # [4, N] = (max, sum, weighted, target logit): what the shards of a vocabulary are joined from
    "linear_token_logprobs_stats": f"({_LINEAR_INPUTS}) -> Tensor",
    # a gradient that is not wanted is returned empty; wide_hidden: that of hidden in float32
    "linear_token_logprobs_backward": f"({_LINEAR_INPUTS}, Tensor entropy, Tensor stats,"
    " Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_logsumexp,"
    " bool hidden_gradient, bool weight_gradient, bool bias_gradient, bool wide_hidden=False,"
    " Tensor? logits=None)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    # the loss's arguments as of policy_loss; a gradient that is not wanted is returned empty
    "linear_policy_loss": f"({_LINEAR_INPUTS}, Tensor old_logprobs, Tensor advantages,"
    " bool token_advantages, Tensor offsets, Tensor? ref_logprobs, Tensor? weights,"
    " float normalizer, Tensor? device_normalizer, int[] choices, float[] constants,"
    " bool hidden_gradient, bool weight_gradient, bool bias_gradient)"
    " -> (Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    # grad times a 0-d factor in float32, rounded to dtype
    "linear_policy_loss_backward": "(Tensor grad, Tensor factor, ScalarType dtype) -> Tensor",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_registrars: list[Callable[[str], None]] = []
_floors: list[str] = []


def op_name(word: str, floor: str) -> str:
    """Name of an operator on a floor: C++ and CUDA share one, each other floor has its own."""
    return word if floor in ("cpp", "cuda") else f"{word}_{floor}"


def handle(word: str, floor: str) -> Any:
    """The callable operator of one floor."""
    return getattr(getattr(torch.ops, NAMESPACE), op_name(word, floor)).default


def add_floor(floor: str) -> None:
    """Declare every operator for a floor and attach the fakes and gradients registered so far and
    later.
    """
    for word, schema in (SCHEMAS | COMPOSED).items():
        # strides are part of the contract: the last axis is contiguous, rows may be strided
        LIBRARY.define(op_name(word, floor) + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _floors.append(floor)
    for registrar in _registrars:
        registrar(floor)


def for_every_floor(registrar: Callable[[str], None]) -> None:
    """Run ``registrar(floor)``, which attaches a fake or a gradient, for each floor, present and
    future.
    """
    _registrars.append(registrar)
    for floor in _floors:
        registrar(floor)


def register_autograd(
    name: str, gradient: Callable[..., tuple[Any, ...]], setup_context: Callable[..., None]
) -> None:
    """``torch.library.register_autograd`` for operators without default arguments. That one looks
    every argument up in the schema at every call to fill in defaults: 40 us for 13 arguments. The
    dispatcher leaves out what equals its default, so an operator with one would come up short.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name.removeprefix(f"{NAMESPACE}::")).default
    assert not any(argument.has_default_value() for argument in operator._schema.arguments), name

    def below(*inputs_and_keys: Any) -> Any:
        *inputs, keys = inputs_and_keys
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs_and_keys: Any) -> Any:
            output = below(*inputs_and_keys)
            setup_context(ctx, inputs_and_keys[:-1], output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return *gradient(ctx, *grads), None

    def run(keys: Any, *inputs: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return (Node.apply if wanted else below)(*inputs, keys)

    Node.__name__ = Node.__qualname__ = f"Gradient of {name}"
    LIBRARY.impl(name, run, "Autograd", with_keyset=True)


# out [M, N] (+)= a [M, K] @ b [K, N], any strides, accumulated in float32: what torch lacks on CPUs
LIBRARY.define("matmul(Tensor a, Tensor b, bool add, Tensor(a!) out) -> ()")

add_floor("cpp")
add_floor("triton")
