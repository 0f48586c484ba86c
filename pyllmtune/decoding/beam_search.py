"""beam_search: the best sequences of any model that is a function of new tokens and a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune._backend import Backend
from pyllmtune.decoding.beam_loop import BeamLoop, Settings
from pyllmtune.decoding.hypotheses import EarlyStopping
from pyllmtune.decoding.sample_beams import seeds_of
from pyllmtune.decoding.search_tree import SearchTree


class BeamSearchOutput(NamedTuple):
    """The best R sequences of each of B prompts, best first; L is the longest's length.

    tokens: ``[B, R, L]`` int64, without the prompt, the ending token included, then padding.
    scores: ``[B, R]`` float32: the sum of the log-probs over ``length ** length_penalty``; -inf if
        there are fewer sequences than R.
    logprobs: ``[B, R, L]`` float32, of each token; 0 at padding.
    lengths: ``[B, R]`` int64; 0 if there is no sequence.
    parents: ``[B, R, L]`` int64: the beam, 0 to num_beams - 1, that each token was appended to; -1
        at padding.
    trees: with ``return_trees``, a ``SearchTree`` a prompt, or one a prompt and group.
    """

    tokens: Tensor
    scores: Tensor
    logprobs: Tensor
    lengths: Tensor
    parents: Tensor
    trees: list[SearchTree] | None


def reorder_cache(cache: Any, rows: Tensor) -> Any:
    """The cache of ``rows`` of the batch: tensors are indexed along their first axis, also inside
    tuples, lists and dicts; an object with a method ``reorder_cache`` is told to do it in place;
    None, numbers and strings stay.
    """
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows)
    if isinstance(cache, dict):
        return {name: reorder_cache(value, rows) for name, value in cache.items()}
    if isinstance(cache, tuple | list):
        parts = [reorder_cache(value, rows) for value in cache]
        return type(cache)(*parts) if hasattr(cache, "_fields") else type(cache)(parts)
    if cache is None or isinstance(cache, int | float | str):
        return cache
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
        return cache
    raise TypeError(
        f"cache holds a {type(cache).__name__}, which has no reorder_cache(rows); "
        "pass reorder=, a function of the cache and the rows to take"
    )


def beam_search(
    step: Callable[[Tensor, Any], Any],
    start: Tensor,
    *,
    num_beams: int,
    max_length: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None = None,
    cache: Any = None,
    reorder: Callable[[Any, Tensor], Any] = reorder_cache,
    length_penalty: float = 0.0,
    early_stopping: EarlyStopping = False,
    min_length: int = 0,
    num_return_sequences: int = 1,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
    temperature: float = 1.0,
    do_sample: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    return_trees: bool = False,
    backend: Backend = "auto",
) -> BeamSearchOutput:
    """The most probable continuations of each prompt, by beam search over ``beam_step``.

    Each step keeps the ``num_beams`` best unfinished prefixes by their sum of log-probs; finished
    ones compete by sum / length^length_penalty. The search of an item is over when no running beam
    can win a place any more, by ``early_stopping``. See docs/beam_search.md.

    Args:
        step: ``step(tokens, cache) -> logits`` or ``-> (logits, cache)``. It is first called with
            ``start``, ``[B, T]``, then with ``[B * num_beams, 1]``, the last token of each beam;
            it returns ``[rows, V]``, the logits of what comes next, as ``beam_step`` takes them.
        start: ``[B, T]`` token ids, passed to ``step`` as they are: what padding means, and a mask
            if it needs one, is the model's and travels in ``cache``.
        num_beams: beams that run, and finished hypotheses that are kept.
        max_length: most tokens of a continuation, its ending token included; the prompt does not
            count. What runs at that length is finished as it is.
        eos_token_id: the tokens that end a sequence; None: only ``max_length`` does.
        pad_token_id: fills ``tokens`` behind the end; the first ending token, or 0, if not given.
        cache: what ``step`` is given first, e.g. an empty key-value cache.
        reorder: ``reorder(cache, rows)`` returns the cache whose row i is row ``rows[i]`` of the
            old one; ``rows`` is ``[B * num_beams]``. The first call spreads the prompts over
            their beams. The default knows tensors, containers and transformers' caches.
        length_penalty: 0 compares sums of log-probs, 1 their means; positive favours the long.
            Transformers' default is 1.0, the textbook's and this one's is 0.0.
        early_stopping: True, False or "never", as in Transformers; exact with "never".
        min_length: a sequence of fewer tokens does not end. Log-probs are not renormalised.
        num_return_sequences: R, at most ``num_beams``.
        num_groups, diversity_penalty: diverse beam search (Vijayakumar et al. 2016, eq. 5, Hamming
            diversity): groups of ``num_beams / num_groups`` beams choose in turn, a token costs
            ``diversity_penalty`` each time an earlier group has chosen it at this step. The
            penalty guides the choice alone, sums and scores are of log-probs.
        temperature: as in ``beam_step``.
        do_sample: candidates are drawn without replacement (``sample_beams``) in place of the best;
            those that end among the first ``num_beams`` drawn are finished, the best of the others
            run on, as in Transformers.
        seed, generator: of ``do_sample``, as in ``sample_beams``: one seed for all prompts, or one
            each, ``[B]``.
        return_trees: also what was looked at, for ``plot_search_tree``.
        backend: of ``beam_step``.

    Returns:
        A ``BeamSearchOutput``. A beam whose logits hold NaN or +inf, or allow nothing, ends without
        a sequence; no other beam notices.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.

    >>> import torch
    >>> probabilities = torch.tensor(  # of the next token, after 0, 1, 2 and 3 = end
    ...     [[0.0, 0.6, 0.4, 0.0], [0.3, 0.3, 0.4, 0.0], [0.0, 0.0, 0.1, 0.9], [0.0, 0.0, 0.0, 1.0]]
    ... )
    >>> def step(tokens, cache):
    ...     return probabilities[tokens[:, -1]].log()
    >>> out = beam_search(
    ...     step, torch.tensor([[0]]), num_beams=2, max_length=2, eos_token_id=3
    ... )
    >>> out.tokens, out.scores.exp()  # greedy takes 1, 2: 0.24
    (tensor([[[2, 3]]]), tensor([[0.3600]]))
    """
    _checks.check_tensor("start", start, (torch.int64, torch.int32))
    if start.dim() != 2:
        raise ValueError(f"start must be [B, T], got {list(start.shape)}")
    eos = _as_ids(eos_token_id)
    if not do_sample and (seed is not None or generator is not None):
        raise ValueError("seed and generator are for do_sample=True; leave them out otherwise")
    settings = Settings(
        num_beams=num_beams,
        max_length=max_length,
        eos=eos,
        min_length=min_length,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_groups=num_groups,
        diversity_penalty=diversity_penalty,
        temperature=temperature,
        do_sample=do_sample,
        seeds=seeds_of(seed, generator, start.shape[0], start.device) if do_sample else None,
        backend=backend,
    )
    settings.check()
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be from 1 to num_beams={num_beams}, "
            f"got {num_return_sequences}"
        )
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0

    def call(tokens: Tensor) -> Tensor:
        nonlocal cache
        result = step(tokens, cache)
        logits, cache = result if isinstance(result, tuple) else (result, cache)
        _checks.check_logits("the logits that step returns", logits)
        if logits.dim() != 2 or logits.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"step must return logits [{tokens.shape[0]}, V] for tokens {list(tokens.shape)}, "
                f"got {list(logits.shape)}; take those of the last position"
            )
        return logits

    spread = num_beams  # the first rows are those of num_beams copies of each prompt

    def forward(rows: Tensor, tokens: Tensor) -> Tensor:
        nonlocal cache, spread
        cache = reorder(cache, rows // spread)
        spread = 1
        return call(tokens[:, None].to(start.dtype))

    loop = BeamLoop(start.shape[0], settings, forward, trees=return_trees)
    if start.shape[0]:
        logits = call(start)
        copies = logits[:, None].expand(-1, num_beams, -1)  # of a row, which is not copied
        loop.run(copies)
    return _collect(loop, start, num_return_sequences, pad_token_id)


def _as_ids(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise ValueError(f"eos_token_id must be of token ids, 0 or more, got {one!r}")
    return tuple(dict.fromkeys(ids))


def _collect(loop: BeamLoop, start: Tensor, count: int, pad: int) -> BeamSearchOutput:
    best = [loop.finished(item)[:count] for item in range(start.shape[0])]
    length = max((len(one.tokens) for item in best for one in item), default=0)
    shape = (start.shape[0], count, length)
    tokens = torch.full(shape, pad)
    scores = torch.full(shape[:2], -math.inf)
    logprobs = torch.zeros(shape)
    lengths = torch.zeros(shape[:2], dtype=torch.int64)
    parents = torch.full(shape, -1)
    for item, hypotheses in enumerate(best):
        for rank, one in enumerate(hypotheses):
            at = (item, rank, slice(0, len(one.tokens)))
            tokens[at] = torch.tensor(one.tokens)
            scores[item, rank] = one.score
            logprobs[at] = torch.tensor([0.0, *one.sums], dtype=torch.float64).diff().float()
            lengths[item, rank] = len(one.tokens)
            parents[at] = torch.tensor(one.parents)
    found = [tensor.to(start.device) for tensor in (tokens, scores, logprobs, lengths, parents)]
    return BeamSearchOutput(*found, loop.trees())
