"""What ``tests/test_linear_shards.py`` runs on every rank: DDP, FSDP2, DTensors at the head."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pyllmtune import PolicyLossConfig, linear_token_logprobs, policy_loss
from pyllmtune.nn import LogprobHead
from tests.ranks import Case
from tests.shard_cases import close
from tests.test_linear_token_logprobs import head, leaf

STEPS, LENGTH, WIDTH, VOCAB = 4, 9, 12, 61
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class Policy(nn.Module):
    """A bigram model with a hidden layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.lm_head.weight = self.table.weight
        self.lm_head = LogprobHead(self.lm_head, softcap=20.0)

    def forward(self, tokens: Tensor, mask: Tensor):
        hidden = torch.tanh(self.body(self.table(tokens[:, :-1])))
        return self.lm_head(hidden, tokens[:, 1:], mask=mask, temperature=0.9)


def batches(sequences: int) -> list[dict[str, Tensor]]:
    return [
        {
            "tokens": torch.randint(0, VOCAB, (sequences, LENGTH + 1)),
            "mask": torch.rand(sequences, LENGTH) > 0.3,
            "old": -4 - torch.rand(sequences, LENGTH),
            "advantages": torch.randn(sequences),
        }
        for _ in range(STEPS)
    ]


def train(model: nn.Module, data: list[dict[str, Tensor]], mine: slice, ranks: int) -> list[float]:
    """SGD on the rows ``mine`` of each batch; the normalizer is the whole batch's tokens, and the
    factor ``ranks`` undoes the mean that DDP and FSDP take of the gradients. Returns the losses.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    config, losses = PolicyLossConfig(entropy_coef=0.01), []
    for batch in data:
        part = {name: value[mine] for name, value in batch.items()}
        scores = model(part["tokens"], part["mask"])
        loss = policy_loss(
            scores.logprobs,
            part["old"],
            part["advantages"],
            part["mask"],
            entropy=scores.entropy,
            normalizer=float(batch["mask"].sum()),
            config=config,
        ).loss
        optimizer.zero_grad()
        (ranks * loss).backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def wrapped_equals_one_process(wrap: Callable[[Policy], nn.Module], tied: bool) -> Case:
    def run(rank: int, world: int) -> None:
        models = [Policy(tied) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        start = {name: value.clone() for name, value in models[0].state_dict().items()}
        data = batches(2 * world)
        want = torch.stack(train(models[0], data, slice(None), 1))
        model = wrap(models[1])
        mine = slice(2 * rank, 2 * rank + 2)
        with warnings.catch_warnings():
            ours = "FSDP(LogprobHead|Policy)"  # torch's own Linear does
            warnings.filterwarnings("error", f"FSDP2-wrapped module .{ours}. returned a view")
            got = torch.stack(train(model, data, mine, world))
        distributed.all_reduce(got)
        state = {name.removeprefix("module."): x for name, x in model.state_dict().items()}
        state = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in state.items()}
        close(got, want, 1e-6, "losses")
        assert state.keys() == start.keys()
        for name, value in models[0].state_dict().items():
            close(state[name], value, 1e-6, name)
            assert (value - start[name]).abs().max() > 1e-3, f"{name} did not move"

    return run


def by_fsdp(model: Policy) -> nn.Module:
    """FSDP2 over the module, the layer and, if it owns its weight, the head each."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model.body, mesh=mesh)
    if model.lm_head.weight is not model.table.weight:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


for tied in (False, True):
    for wrap in (DistributedDataParallel, by_fsdp):
        name = f"{wrap.__name__} tied={tied}"
        CASES[name] = wrapped_equals_one_process(wrap, tied)


@case
def fsdp_over_a_sharded_vocabulary(rank, world):
    """A mesh of data by tensor parallel ranks: the head's DTensor over one axis, FSDP2 over the
    other.
    """
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    models = [Policy(tied=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    data, groups = batches(2 * world), world // 2
    want = torch.stack(train(models[0], data, slice(None), 1))
    top = models[1].lm_head
    for name, value in list(top.named_parameters()):
        part = distribute_tensor(value.detach(), mesh["tensor"], [Shard(0)])
        top.register_parameter(name, nn.Parameter(part))
    for part in (models[1].body, top, models[1]):
        fully_shard(part, mesh=mesh["data"])
    each = 4  # sequences: 2 * world over world / 2 groups
    first = mesh["data"].get_local_rank() * each
    got = torch.stack(train(models[1], data, slice(first, first + each), groups))
    distributed.all_reduce(got, group=mesh["data"].get_group())
    state = {name: value.full_tensor() for name, value in models[1].state_dict().items()}
    close(got, want, 1e-6, "losses")
    for name, value in models[0].state_dict().items():
        close(state[name], value, 1e-6, name)


@case
def fsdp_in_bfloat16_is_the_op_in_bfloat16(rank, world):
    """Parameters gathered in bfloat16: the head takes them as they are."""
    linear = nn.Linear(WIDTH, VOCAB)
    hidden, tokens = torch.randn(5, WIDTH), torch.randint(0, VOCAB, (5,))
    rounded = [value.detach().bfloat16() for value in (hidden, linear.weight, linear.bias)]
    want = linear_token_logprobs(*rounded[:2], tokens, bias=rounded[2])
    module = LogprobHead(linear)
    fully_shard(
        module,
        mesh=init_device_mesh("cpu", (world,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    out = module(hidden, tokens)
    out.logprobs.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    assert module.weight.grad.dtype == torch.float32
    assert module.weight.grad.full_tensor().any()


def dtensor_run(mesh, placements, operands, upstream, bias):
    """Results and gradients with weight and bias as DTensors."""
    hidden, weight, tokens = operands
    hidden = leaf(hidden)
    parts = [distribute_tensor(value, mesh, placements) for value in (weight, bias)]
    parts = [part.requires_grad_() for part in parts]
    out = linear_token_logprobs(hidden, parts[0], tokens, bias=parts[1])
    return out, torch.autograd.grad(out, (hidden, *parts), list(upstream))


@case
def dtensor_weights_bring_their_shards(rank, world):
    """Even, uneven, and fewer rows than ranks; a replicated one; gradients placed alike."""
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for vocab in (64, 61, 9, 1):
        for placement in (Shard(0), Replicate()):
            operands, bias, upstream = head((7,), 6, vocab), torch.randn(vocab), torch.randn(3, 7)
            out, grads = dtensor_run(mesh, [placement], operands, upstream, bias)
            leaves = leaf(operands[0]), leaf(operands[1]), leaf(bias)
            want = linear_token_logprobs(leaves[0], leaves[1], operands[2], bias=leaves[2])
            truth = torch.autograd.grad(want, leaves, list(upstream))
            placed = [tuple(grad.placements) for grad in grads[1:]]
            whole = [grads[0], *(grad.full_tensor() for grad in grads[1:])]
            found.append((placement, out, want, placed, whole, truth))
    for placement, out, want, placed, whole, truth in found:
        assert placed == [(placement,), (placement,)]
        for got, expected in zip((*out, *whole), (*want, *truth), strict=True):
            assert not isinstance(got, DTensor)
            # of at least 1: of one row of the vocabulary, gradients are 0 but for rounding
            assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


@case
def dtensor_hidden_and_head_module(rank, world):
    """A module whose parameters were distributed in place, hidden states and tokens replicated."""
    mesh = init_device_mesh("cpu", (world,))
    linear = nn.Linear(6, 61)
    hidden, tokens = torch.randn(7, 6), torch.randint(0, 61, (7,))
    want = LogprobHead(linear)(hidden, tokens)
    for name, value in list(linear.named_parameters()):
        part = nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)]))
        linear.register_parameter(name, part)
    module = LogprobHead(linear)
    replicated = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    out = module(replicated, distribute_tensor(tokens, mesh, [Replicate()]))
    out.logprobs.sum().backward()
    for got, expected in zip(out, want, strict=True):
        close(got, expected, 1e-6, "results")
    assert isinstance(replicated.grad, DTensor) and module.weight.grad.placements == (Shard(0),)
    assert replicated.grad.to_local().any()


@case
def dtensors_placed_otherwise_are_refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, tokens = head((world,), 4, 4 * world)
    rows = distribute_tensor(weight, mesh, [Shard(0)])
    square = init_device_mesh("cpu", (world // 2, 2))
    bad = {
        "weight must be sharded by rows": (distribute_tensor(weight, mesh, [Shard(1)]), hidden, {}),
        "on a 2-d mesh": (distribute_tensor(weight, square, [Shard(0), Shard(0)]), hidden, {}),
        "bias must be a DTensor placed as": (rows, hidden, {"bias": torch.zeros(4 * world)}),
        "leave out process_group": (rows, hidden, {"process_group": distributed.group.WORLD}),
        "hidden must be replicated": (rows, distribute_tensor(hidden, mesh, [Shard(0)]), {}),
    }
    for message, (matrix, states, options) in bad.items():
        said = ""
        try:
            linear_token_logprobs(states, matrix, tokens, **options)
        except ValueError as error:
            said = str(error)
        assert message in said, (message, said)


def dtensor_weights_compile_without_a_graph_break(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, tokens = head((5,), 6, 61)
    results = []

    def step(x: Tensor, w: Tensor) -> Tensor:
        out = linear_token_logprobs(torch.tanh(x), w, tokens)
        return (out.logprobs - 0.1 * out.entropy).sum()

    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = leaf(hidden), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        loss = function(*leaves)
        by_hidden, by_weight = torch.autograd.grad(loss, leaves)
        results.append((loss, by_hidden, by_weight.to_local()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


SLOW_CASES = {f.__name__: f for f in (dtensor_weights_compile_without_a_graph_break,)}
