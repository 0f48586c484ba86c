"""sample_beams: continuations of an item's beams drawn without replacement, from ``sample``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyllmtune._backend import Backend
from pyllmtune.ops.beam_step import (
    BeamStep,
    as_beams,
    as_ids,
    candidates_of,
    of_beams,
    split_beam_temperature,
)
from pyllmtune.ops.sample import as_allowed, sample, split_seed
from pyllmtune.reference import masses

POSITION_BITS = 40  # of Philox's 64-bit position; the draw and its beam are above them


def sample_beams(
    logits: Tensor,
    beam_scores: Tensor,
    *,
    num_beams: int,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_candidates: int | None = None,
    allowed: Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int = 0,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> BeamStep:
    """``beam_step`` that draws its candidates without replacement, with the probabilities that the
    scores have among all continuations of the item: ``softmax(beam_scores + log_softmax(logits /
    temperature))`` over beams and tokens, as Transformers draws when it samples with beams.

    Drawing without replacement is a race (Gumbel top-k, Kool et al. 2019): every continuation
    arrives after an exponential time whose rate is its probability, the first ones are taken. Here
    nothing is given a time but what arrives: the next of a beam comes after an exponential time of
    the rate that is left in it, and which it is, ``sample`` draws from the tokens that are left. So
    a step is ``num_candidates`` reads of the logits and their integer masses: what a beam draws is
    exact, and the same on every backend and in any batch. The race between beams is run on their
    log-probs, which backends round differently: arrivals that close may change places.

    Args:
        logits, beam_scores, num_beams, eos_token_id, temperature, num_candidates, allowed: as in
            ``beam_step``. Filter before (``filter_logits``) to draw from top-k or top-p.
        seed: int64, or one per item ``[batch]``. None draws one per item from ``generator``, or
            from torch's own, so that ``torch.manual_seed`` works.
        position: 0 to 2^40 - 1, e.g. the step: another one gives other random numbers. The first
            token drawn of beam 0 is that of ``sample`` at this seed and position.
        backend: of ``sample``.

    Returns:
        A ``BeamStep``, its candidates in the order in which they were drawn.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.

    >>> import torch
    >>> z = torch.tensor([[2.0, 1.0, 0.0, -9.0], [3.0, 0.0, 0.0, -9.0]])
    >>> out = sample_beams(z, torch.tensor([[-0.5, -1.0]]), num_beams=2, seed=1)
    >>> out.tokens, out.parents
    (tensor([[0, 1, 0, 2]]), tensor([[1, 0, 0, 0]]))
    """
    logits = as_beams(logits, num_beams)
    device, shape, vocab = logits.device, logits.shape[:2], logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = of_beams("beam_scores", beam_scores, shape, device).detach().double()
    scalar, per_row = split_beam_temperature(temperature, shape, device)
    temperature = scalar if per_row is None else per_row
    eos = as_ids(eos_token_id, device)
    num_candidates = candidates_of(num_candidates, num_beams, eos)
    if not 0 <= position < 1 << POSITION_BITS:
        raise ValueError(f"position must be in [0, 2^{POSITION_BITS}), got {position}")
    seeds = seeds_of(seed, generator, shape[0], device)[:, None].expand(shape).contiguous()
    left = _Left(allowed, shape, vocab, device)

    beams = torch.arange(num_beams, device=device).expand(shape)
    live = scores > -math.inf
    time = torch.full(shape, -math.inf, dtype=torch.float64, device=device)  # log of it
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []  # arrival, token and score, [batch, beams] each
    for draw in range(num_candidates):
        at = position + ((draw * num_beams + beams) << POSITION_BITS)
        out = sample(
            logits,
            temperature=temperature,
            allowed=left.mask,
            seed=seeds,
            position=at,
            logprobs="scaled",
            backend=backend,
        )
        assert isinstance(out.logprobs, Tensor)
        if draw == 0:
            valid = out.valid & (scores < math.inf)
            first = out.logprobs.double() - _scaled(logits, out.tokens, temperature)
        logprob = first + _scaled(logits, out.tokens, temperature)  # of the whole row
        log_rate = scores + logprob - out.logprobs  # of all that is left
        time = torch.logaddexp(time, _exponential(seeds, at).log() - log_rate)
        arrives = out.valid & valid & live
        time = torch.where(arrives, time, math.inf)
        drawn.append((time, out.tokens, torch.where(arrives, scores + logprob, -math.inf)))
        left.remove(out.tokens)

    arrival, token, score = (torch.stack(x, dim=-1).flatten(1) for x in zip(*drawn, strict=True))
    parent = beams[:, :, None].expand(*shape, num_candidates).flatten(1)
    taken = arrival.topk(num_candidates, dim=-1, largest=False).indices  # [batch, candidates]
    token, parent, score = (x.gather(-1, taken) for x in (token, parent, score.to(dtype)))
    empty = score == -math.inf
    token, parent = token.masked_fill(empty, -1), parent.masked_fill(empty, 0)
    ends = torch.zeros_like(empty) if eos is None else torch.isin(token, eos)
    return BeamStep(score, token, parent, ends, valid | ~live)


def seeds_of(
    seed: int | Tensor | None, generator: torch.Generator | None, batch: int, device: torch.device
) -> Tensor:
    """One seed an item, ``[batch]`` int64."""
    one, each = split_seed(seed, generator, torch.Size((batch,)), device)
    return torch.full((batch,), one, device=device) if each is None else each


def _scaled(logits: Tensor, tokens: Tensor, temperature: float | Tensor) -> Tensor:
    """z / T of one token a beam, float64 ``[batch, beams]``; of token 0 where there is none."""
    return logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0].double() / temperature


def _exponential(seeds: Tensor, position: Tensor) -> Tensor:
    """Exponential times of rate 1, float64: the second number at a position, beside the token's."""
    word = masses.uniform(seeds, position, torch.ones_like(seeds))
    uniform = (((word >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -uniform.log()


class _Left:
    """The tokens of each beam that were not drawn yet: bits, or the caller's bools."""

    def __init__(
        self, allowed: Tensor | None, shape: torch.Size, vocab: int, device: torch.device
    ) -> None:
        width = (vocab + 31) // 32
        if allowed is None:
            self.mask = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
            return
        lead = shape if allowed.dim() != 2 else torch.Size((shape.numel(),))
        mask = as_allowed(allowed, lead, vocab, device)
        assert mask is not None
        self.mask = mask.expand(shape.numel(), -1).reshape(*shape, -1).clone()

    def remove(self, tokens: Tensor) -> None:
        """Of each beam the token drawn; where none was, nothing is left that could be lost."""
        at = tokens.clamp(min=0)[..., None]
        if self.mask.dtype == torch.bool:
            self.mask.scatter_(-1, at, False)
            return
        word, bit = at >> 5, (torch.ones_like(at) << (at & 31)).to(torch.int32)
        self.mask.scatter_(-1, word, self.mask.gather(-1, word) & ~bit)
