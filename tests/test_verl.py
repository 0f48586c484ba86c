"""Our functions in verl's registries beside verl's own: values, gradients and metrics."""

from __future__ import annotations

import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from pyllmtune.integrations import verl as integration
from tests import helpers

B, T = 6, 9
NAMES = ("uid-a", "uid-b", "uid-a", "uid-c", "uid-b", "uid-a")  # uid-c is alone


class _Anything(types.ModuleType):
    """Stands for ray, which verl imports at the top and its core algorithms never call."""

    __path__ = ()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return lambda function: function


@pytest.fixture(scope="module")
def core():
    """verl's core algorithms, with ours registered."""
    helpers.need("verl")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ray", "ray.util", "ray.util.scheduling_strategies", "ray.experimental"):
            patch.setitem(sys.modules, name, _Anything(name))
        for name in ("ray.actor", "ray.experimental.state", "ray.experimental.state.api"):
            patch.setitem(sys.modules, name, _Anything(name))
        from verl.trainer.ppo import core_algos

    losses, estimators = core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY
    before = dict(losses), dict(estimators)
    names = integration.register()
    assert names == integration.register() and all(name.startswith("pyllmtune.") for name in names)
    yield core_algos
    for registry, saved in zip((losses, estimators), before, strict=True):
        registry.clear()
        registry.update(saved)


def config(core, **batch):
    from verl.workers.config import ActorConfig

    made = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    own = made.policy_loss
    for name, value in {"clip_cov_ratio": 1.0, "kl_cov_ratio": 0.1}.items():
        object.__setattr__(own, name, value)
    object.__setattr__(made, "global_batch_info", batch)
    return made


def inputs() -> dict[str, torch.Tensor]:
    """Log-ratios on both sides of every bound, beyond 20 too; a row without tokens at the end."""
    mask = (torch.arange(T) < torch.tensor([9, 4, 1, 7, 2, 0])[:, None]).long()
    log_prob = -3 * torch.rand(B, T)
    apart = torch.randn(B, T).mul(0.5)
    apart[0, 0], apart[1, 1] = 30.0, -30.0
    return {
        "old_log_prob": log_prob - apart,
        "log_prob": log_prob.requires_grad_(),
        "advantages": torch.randn(B, T) * mask,
        "response_mask": mask,
    }


MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
BATCHES = (
    {},
    {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12, "loss_scale_factor": 16},
)


@pytest.mark.parametrize("batch", BATCHES, ids=("alone", "one-of-two-ranks"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", integration.LOSSES)
def test_policy_loss_equals_verl(core, name, mode, batch):
    x = inputs()
    if name in ("clip_cov", "kl_cov", "gspo", "geo_mean"):  # no clamp of log-ratios there
        x["old_log_prob"] = x["log_prob"].detach() + 0.4 * torch.randn(B, T)
    weights = 0.5 + torch.rand(B, T)
    own = config(core, **batch)
    for rollout in (None,) if name == "kl_cov" else (None, weights):
        results = []
        for function in (name, f"pyllmtune.{name}"):
            torch.manual_seed(0)
            loss, metrics = core.get_policy_loss_fn(function)(
                **x, loss_agg_mode=mode, config=own, rollout_is_weights=rollout
            )
            (grad,) = torch.autograd.grad(loss, x["log_prob"])
            results.append((loss.detach(), torch.where(x["response_mask"] > 0, grad, 0.0), metrics))
        want, got = results
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-6)
        if name in ("vanilla", "cispo"):
            for key, value in want[2].items():
                assert math.isclose(got[2][key], value, rel_tol=1e-5, abs_tol=1e-6), key


def test_kl_cov_refuses_weights_of_the_rollout(core):
    with pytest.raises(ValueError, match="verl weights the penalty with the loss"):
        core.get_policy_loss_fn("pyllmtune.kl_cov")(
            **inputs(), config=config(core), rollout_is_weights=torch.ones(B, T)
        )


@pytest.mark.parametrize("name", integration.ESTIMATORS)
@pytest.mark.parametrize("normed", (True, False))
def test_advantages_equal_verl(core, name, normed):
    mask = (torch.arange(T) < torch.tensor([9, 4, 1, 7, 2, 5])[:, None]).float()
    mask[0, 3] = 0  # the answer of a tool between turns
    rewards = torch.randn(B, T) * mask
    names = NAMES if name != "grpo_passk" else ("a", "b", "a", "c", "b", "c")
    own = SimpleNamespace(gamma=0.9, get=lambda key, default=None: normed)
    given = {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": names,
        "config": own,
        "reward_baselines": torch.randn(B),
    }
    if name == "grpo":
        given["norm_adv_by_std_in_grpo"] = normed
    want = _call(core.ADV_ESTIMATOR_REGISTRY[name], given)
    got = _call(core.ADV_ESTIMATOR_REGISTRY[f"pyllmtune.{name}"], given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a * mask, b * mask, rtol=1e-5, atol=1e-6)


def _call(function, given):
    import inspect

    parameters = inspect.signature(function).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        given = {key: value for key, value in given.items() if key in parameters}
    return function(**{k: v.clone() if torch.is_tensor(v) else v for k, v in given.items()})
