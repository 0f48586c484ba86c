"""Modules: the functions' options and defaults, the functions' numbers, whole graphs."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor

import pyllmtune
from pyllmtune import PolicyLossConfig, nn

B, T = 4, 5

# module, its function, options that are not the defaults, and the tensors both take
CASES = {
    "PolicyLoss": ("policy_loss", {"config": PolicyLossConfig(rule="cispo")}, "token"),
    "LinearPolicyLoss": (
        "linear_policy_loss",
        {"softcap": 9.0, "config": PolicyLossConfig(rule="cispo")},
        "head",
    ),
    "PPOClipLoss": ("ppo_clip_loss", {"eps": 0.1, "dual_clip": 3.0}, "token"),
    "GRPOLoss": ("grpo_loss", {"kl_coef": 0.1, "eps_high": 0.3, "level": "sequence"}, "token"),
    "ReinforceLoss": ("reinforce_loss", {"aggregation": "token-mean"}, "reward"),
    "ValueLoss": ("value_loss", {"clip": 0.2}, "value"),
    "PreferenceLoss": ("preference_loss", {"margin": 0.5, "center": 0.1}, "pair"),
    "DPOLoss": ("dpo_loss", {"beta": 0.3, "loss_type": "ipo"}, "reference"),
    "SimPOLoss": ("simpo_loss", {"gamma": 0.1, "alpha": 0.2, "reduction": "none"}, "measured"),
    "CPOLoss": ("cpo_loss", {"loss_type": "hinge", "nll_coef": 0.5}, "half-measured"),
    "ORPOLoss": ("orpo_loss", {"beta": 0.7}, "measured"),
    "KTOLoss": ("kto_loss", {"desirable_weight": 2.0, "reduction": "sum"}, "marked"),
}


def tensors(kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the function takes, the first a leaf with a gradient."""
    logprobs = -torch.rand(B, T)
    if kind in ("token", "reward"):
        leaf = logprobs.requires_grad_()
        mask, advantages = torch.rand(B, T) < 0.7, torch.randn(B)
        if kind == "reward":
            return [leaf, advantages, mask], {}
        return [leaf, leaf.detach() - 0.05 * torch.randn(B, T), advantages, mask], {}
    if kind == "head":
        hidden, weight = torch.randn(B, T, 3, requires_grad=True), torch.randn(7, 3)
        return [hidden, weight, torch.randint(0, 7, (B, T)), logprobs, torch.randn(B)], {}
    if kind == "value":
        values, returns = torch.randn(2, B, T)
        return [values.requires_grad_(), returns], {"old_values": values.detach() + 0.1}
    chosen = logprobs.sum(-1).requires_grad_()
    rejected, lengths = chosen.detach().flip(0) - 0.5, torch.arange(2, B + 2)
    return {
        "pair": ([chosen, rejected], {}),
        "reference": (
            [chosen, rejected, rejected + 0.1, rejected],
            {"chosen_lengths": lengths, "rejected_lengths": lengths.flip(0)},
        ),
        "measured": ([chosen, rejected, lengths, lengths.flip(0)], {}),
        "half-measured": ([chosen, rejected, lengths], {}),
        "marked": ([chosen, lengths > 3, rejected], {"mismatched_logratios": torch.rand(3)}),
    }[kind]


def test_every_module_is_tested():
    found = {name for name, value in vars(nn).items() if inspect.isclass(value)}
    found = {name for name in found if issubclass(vars(nn)[name], nn._Loss)} - {"_Loss"}
    assert found == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_options_are_the_functions(name):
    """What a module holds is what the function takes by keyword, beside tensors; same defaults."""
    module, function = getattr(nn, name), getattr(pyllmtune, CASES[name][0])
    taken = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
        and (not parameter.annotation.startswith(("Tensor", "float | Tensor |")))
        and parameter.name != "temperature"  # may be a tensor, one per token
    }
    assert module().options == taken


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_module_is_the_function(name, compiled):
    function, options, kind = CASES[name]
    results = []
    positional, named = tensors(kind)
    extra = {"ref_logprobs": positional[0].detach() - 0.1} if name == "GRPOLoss" else {}
    module = getattr(nn, name)(**options)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True, backend="aot_eager")
    for call in (module, lambda *a, **k: getattr(pyllmtune, function)(*a, **k, **options)):
        positional[0].grad = None
        out = call(*positional, **named, **extra)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.sum().backward()
        results.append((loss.detach(), positional[0].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()


@pytest.mark.parametrize("name", CASES)
def test_a_module_shows_its_options_and_can_be_copied(name):
    _, options, _ = CASES[name]
    module = getattr(nn, name)(**options)
    for key, value in options.items():
        assert f"{key}={value!r}" in repr(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.options == module.options
    assert not list(module.parameters()) and not module.state_dict()
    assert module.eval().training is False
    with pytest.raises(TypeError):
        getattr(nn, name)(*options.values())  # keyword only
