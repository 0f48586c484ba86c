"""Two libraries on the same weights and batch: how far apart are loss and gradient?"""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmtune.demo.losses import Batch, Library, Objective
from pyllmtune.demo.model import Transformer
from pyllmtune.demo.rollout import answer_outputs

TOLERANCE = 1e-5  # relative, float32


class Lockstep:
    """Compares before an update, without touching the run; keeps the largest difference seen."""

    def __init__(self, first: Library, second: Library, objective: Objective) -> None:
        self.libraries, self.objective = (first, second), objective
        self.updates = 0
        self.loss_difference = self.gradient_difference = 0.0

    def __call__(self, policy: Transformer, prompts: Tensor, batch: Batch) -> None:
        (loss, gradient), (other_loss, other_gradient) = (
            self._evaluate(library, policy, prompts, batch) for library in self.libraries
        )
        # a loss may sum terms of the size of the advantages, which cancel: that size is the scale
        terms = 0.0 if batch.advantages is None else batch.advantages.abs().mean().item()
        scale = max(terms, abs(other_loss))
        norm = other_gradient.norm().item()
        self.updates += 1
        self.loss_difference = _worse(
            self.loss_difference, abs(loss - other_loss) / max(scale, 1e-12)
        )
        difference = (gradient - other_gradient).norm().item() / max(norm, 1e-12)
        self.gradient_difference = _worse(self.gradient_difference, difference)

    @property
    def passed(self) -> bool:
        return self.loss_difference <= TOLERANCE and self.gradient_difference <= TOLERANCE

    def _evaluate(
        self, library: Library, policy: Transformer, prompts: Tensor, batch: Batch
    ) -> tuple[float, Tensor]:
        """The loss, and its gradient in all weights as one float64 vector."""
        outputs = answer_outputs(policy, prompts, batch.tokens)
        value = library.loss(outputs, batch, self.objective).value
        gradients = torch.autograd.grad(value, list(policy.parameters()))
        return value.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def _worse(worst: float, difference: float) -> float:
    """The larger; NaN, which no comparison sees, is worse than all and stays."""
    return difference if difference > worst or difference != difference else worst
