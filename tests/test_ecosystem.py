"""What people build around the ops: compiled training steps, exported decoding steps, AOTInductor
packages.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pyllmtune import (
    gae,
    grpo_loss,
    linear_token_logprobs,
    ppo_clip_loss,
    sample,
    temperature_softmax,
    token_logprobs,
    value_loss,
)
from tests import helpers

VOCAB, WIDTH = 70, 24


class Policy(nn.Module):
    """A language model in small: hidden states, a head, and a value of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, WIDTH]
        hidden = self.embedding(tokens)
        return torch.tanh(self.mixer(hidden + hidden.cumsum(1) / 8))


def grpo_from_hidden_states(policy: Policy, batch: dict[str, Tensor]) -> Tensor:
    hidden, targets = policy(batch["tokens"])[:, :-1], batch["tokens"][:, 1:]
    out = linear_token_logprobs(hidden, policy.head.weight, targets, mask=batch["mask"])
    options = {"ref_logprobs": batch["ref"], "kl_coef": 0.04, "eps_high": 0.28}
    advantages = batch["rewards"][:, 0]
    return grpo_loss(out.logprobs, batch["old"], advantages, batch["mask"], **options).loss


def ppo_with_critic(policy: Policy, batch: dict[str, Tensor]) -> Tensor:
    hidden, targets = policy(batch["tokens"])[:, :-1], batch["tokens"][:, 1:]
    scores = token_logprobs(policy.head(hidden), targets, mask=batch["mask"])
    values = policy.value(hidden)[..., 0]
    advantages, returns = gae(batch["rewards"], values.detach(), batch["mask"])
    actor = ppo_clip_loss(scores.logprobs, batch["old"], advantages, batch["mask"])
    critic = value_loss(values, returns, batch["mask"], old_values=batch["values"], clip=0.2)
    entropy = torch.where(batch["mask"], scores.entropy, 0.0).mean()
    return actor.loss + 0.5 * critic.loss - 0.01 * entropy


def make_batch(size: int, length: int) -> dict[str, Tensor]:
    shape = (size, length - 1)
    return {
        "tokens": torch.randint(0, VOCAB, (size, length)),
        "mask": torch.rand(shape) > 0.2,
        **{name: torch.randn(shape) - 4 for name in ("old", "ref")},
        **{name: torch.randn(shape) for name in ("rewards", "values")},
    }


@pytest.mark.parametrize("loss", (grpo_from_hidden_states, ppo_with_critic))
def test_a_whole_training_step_compiles_without_a_graph_break(loss):
    """Three steps of an optimiser, compiled and not: the same losses and parameters; batches of
    other sizes compile once more at most, with dynamic shapes.
    """
    helpers.need("cpp")
    batches = [make_batch(*size) for size in ((4, 9), (6, 12), (3, 17))]
    torch.manual_seed(0)
    start = Policy()
    found = []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        policy = Policy()
        policy.load_state_dict(start.state_dict())
        step = torch.compile(loss, fullgraph=True, backend=counter) if compiled else loss
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            value = step(policy, batch)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        found.append((torch.stack(losses), torch.cat([p.flatten() for p in policy.parameters()])))
    for got, want in zip(found[1], found[0], strict=True):
        helpers.assert_close(got, want, 1e-6, loss.__name__)
    assert not torch.allclose(
        found[0][1], torch.cat([p.flatten() for p in start.parameters()]), atol=1e-3
    )
    assert counter.frame_count == 2  # the first sizes, then all sizes


class DecodingStep(nn.Module):
    """Tokens so far, a seed and a position for each row -> the next token and its log-prob."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, tokens: Tensor, seeds: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.policy.head(self.policy(tokens)[:, -1])
        filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
        draws = {"seed": seeds, "position": position, "logprobs": "processed"}
        out = sample(logits, **filters, **draws)
        return out.tokens, out.logprobs


def test_an_exported_decoding_step_draws_the_same_tokens(tmp_path):
    """At other batch sizes and lengths than it was exported with, and after it was saved."""
    helpers.need("cpp")
    step = DecodingStep(Policy()).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    rows, position = torch.arange(4), torch.arange(4)  # one tensor twice would be one input
    program = torch.export.export(
        step,
        (torch.randint(0, VOCAB, (4, 6)), rows, position),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}),
    )
    assert any("pyllmtune.sample" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    tokens, seeds = torch.randint(0, VOCAB, (7, 3)), torch.arange(7) * 11
    want_tokens = tokens
    for position in range(5):
        at = torch.full((7,), position)
        want, want_logprobs = step(want_tokens, seeds, at)
        for run in (program.module(), loaded):
            got, logprobs = run(tokens, seeds, at)
            assert torch.equal(got, want) and torch.equal(logprobs, want_logprobs)
        tokens = torch.cat((tokens, got[:, None]), 1)
        want_tokens = torch.cat((want_tokens, want[:, None]), 1)
    assert len(set(tokens[:, 3:].flatten().tolist())) > 5  # it does draw


class Scores(nn.Module):
    def forward(self, logits: Tensor, tokens: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
        out = token_logprobs(logits, tokens, temperature=0.7)
        drawn = sample(logits, top_p=0.9, seed=seeds)
        return out.logprobs, out.entropy, temperature_softmax(logits, 0.7), drawn.tokens


@pytest.mark.skipif(
    helpers.torch_before("2.12"),
    reason="pytorch/pytorch#169157: AOTInductor hands operators another dtype than was given",
)
def test_an_aotinductor_package_gives_the_same_bits(tmp_path):
    helpers.need("cpp")
    helpers.need("g++")
    args = torch.randn(5, 130), torch.randint(0, 130, (5,)), torch.arange(5)
    with torch.no_grad():
        program = torch.export.export(Scores(), args)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "scores.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        other = torch.randn(5, 130) * 3, torch.randint(0, 130, (5,)), torch.arange(5) + 9
        for case in (args, other):
            for got, want in zip(run(*case), Scores()(*case), strict=True):
                assert torch.equal(got, want)
