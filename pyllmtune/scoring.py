"""Which of several answers does a model find most probable? Zero-shot and few-shot choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyllmtune import _checks
from pyllmtune._backend import Backend
from pyllmtune.ops.token_logprobs import token_logprobs

INTEGERS = (torch.int64, torch.int32)


def score_answers(
    model: Callable[[Tensor], Any],
    prompt: Tensor,
    answers: Sequence[Tensor],
    *,
    reduction: Literal["sum", "mean"] = "sum",
    temperature: float = 1.0,
    pad_token_id: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Log-prob of each candidate answer after ``prompt``, in one forward of a causal model.

    ``temperature_softmax`` of the scores is the probability of each answer among the candidates,
    ``argmax`` the choice. Solved examples in the prompt make it few-shot.

    Args:
        model: ``tokens [B, T] -> logits [B, T, V]``, or an object with such ``logits``, causal:
            the padding behind a short answer must not change the logits before it.
        prompt: ``[P]`` token ids, at least one.
        answers: token ids ``[T_i]`` of the candidates, each at least one; lengths may differ.
        reduction: ``"sum"``, the log-prob of the answer, or ``"mean"`` per token, which does not
            favour short answers.
        temperature: of the distribution that is scored.
        pad_token_id: what fills the shorter rows; any id of the vocabulary.
        backend: of ``token_logprobs``.

    Returns:
        ``[len(answers)]`` float32 (float64 for float64 logits), differentiable if the model is.

    Raises:
        TypeError: token ids are not integer tensors.
        ValueError: a prompt or an answer is empty or not one-dimensional, or the logits do not
            fit the tokens.

    >>> import torch
    >>> table = torch.tensor([[0.0, 3.0, 1.0]] * 3)  # the next token's logits, after any token
    >>> model = lambda tokens: table[tokens]
    >>> scores = score_answers(model, torch.tensor([0]), [torch.tensor([1]), torch.tensor([2])])
    >>> scores.softmax(-1)  # e^3 / (e^3 + e^1)
    tensor([0.8808, 0.1192])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    named = {"prompt": prompt, **{f"answers[{i}]": answer for i, answer in enumerate(answers)}}
    for name, ids in named.items():
        _checks.check_tensor(name, ids, INTEGERS)
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(f"{name} must be [T] with at least one token, got {list(ids.shape)}")
    if not answers:
        raise ValueError("answers must hold at least one candidate")

    lengths = torch.tensor([len(answer) for answer in answers], device=prompt.device)
    tokens = torch.nn.utils.rnn.pad_sequence(
        list(answers), batch_first=True, padding_value=pad_token_id
    )  # [B, T]
    mask = torch.arange(tokens.shape[1], device=prompt.device) < lengths[:, None]
    rows = torch.cat((prompt.expand(len(answers), -1), tokens), dim=1)[:, :-1]  # [B, P + T - 1]
    output = model(rows)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.dim() != 3 or logits.shape[:2] != rows.shape:
        raise ValueError(f"model must return [*{list(rows.shape)}, V], got {list(logits.shape)}")
    scored = token_logprobs(
        logits[:, len(prompt) - 1 :], tokens, temperature=temperature, mask=mask, backend=backend
    )
    total = scored.logprobs.sum(-1)
    return total if reduction == "sum" else total / lengths
