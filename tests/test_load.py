"""Which compiled module is taken, how it is forced, and what is said when there is none. Each in a
fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pyllmtune import _load
from tests import helpers


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# a module that is not there, whatever was built
HIDE = """
import sys
for name in ("_C", "_C_avx2", "_C_avx512", "_C_cuda", "_host"):
    sys.modules["pyllmtune." + name] = None
"""

FINGERPRINT = """
import torch, pyllmtune, hashlib
torch.manual_seed(0)
logits = (torch.randn(3, 40_001) * 3).requires_grad_()
out = pyllmtune.token_logprobs(logits, torch.tensor([1, 2, 40_000]), temperature=0.8, backend="cpp")
loss = pyllmtune.grpo_loss(out.logprobs[None], out.logprobs[None].detach() * 1.01, torch.ones(1),
entropy=out.entropy[None],
                           entropy_coef=0.1, kl_coef=0.1, ref_logprobs=out.logprobs[None].detach() *
                           0.9).loss
loss.backward()
digest = hashlib.sha256()
for value in (*out, loss, logits.grad):
    digest.update(value.detach().numpy().tobytes())
from pyllmtune import _load
print(_load.cpu_module, digest.hexdigest())
"""


def available() -> list[str]:
    order = list(_load._CPU_MODULES)
    best = _load._TORCH_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return order[: order.index(best) + 1]


def test_each_capability_can_be_forced_and_avx2_equals_avx512_bit_for_bit():
    helpers.need("cpp")
    prints = {}
    for capability in available():
        out = python(FINGERPRINT, PYLLMTUNE_CPU_CAPABILITY=capability)
        assert out.returncode == 0, out.stderr
        module, prints[capability] = out.stdout.split()
        assert module == _load._CPU_MODULES[capability]
    if "avx512" in prints:
        assert prints["avx2"] == prints["avx512"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512"))
def test_the_op_tests_pass_under_every_capability(capability):
    """The whole C++ part of the suite again, in a process with that module."""
    helpers.need("cpp")
    if capability not in available():
        pytest.skip(f"this CPU has no {capability}")
    if capability == _load.cpu_capability and "PYLLMTUNE_CPU_CAPABILITY" not in os.environ:
        return  # what this very process runs
    tests = [
        "tests/test_token_logprobs.py",
        "tests/test_policy_loss.py",
        "tests/test_registration.py",
    ]
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-k",
            "cpp and not compile",
            "-p",
            "no:cacheprovider",
            *tests,
        ],
        env=os.environ | {"PYLLMTUNE_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout[-3000:]


def test_a_capability_beyond_the_cpu_or_unknown_is_refused_with_the_reason():
    code = (
        "import pyllmtune, torch\n"
        "pyllmtune.token_logprobs(torch.rand(1, 3), torch.tensor([0]), backend='cpp')"
    )
    out = python(code, PYLLMTUNE_CPU_CAPABILITY="sse9")
    assert "PYLLMTUNE_CPU_CAPABILITY='sse9' is none of baseline, avx2, avx512" in out.stderr
    out = python(code, PYLLMTUNE_CPU_CAPABILITY="avx512", ATEN_CPU_CAPABILITY="avx2")
    assert "asks for more than this CPU has (avx2)" in out.stderr


def test_without_any_compiled_module_the_reference_works_and_env_says_why():
    code = HIDE + (
        "import pyllmtune, torch\n"
        "out = pyllmtune.token_logprobs(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))\n"
        "assert abs(out.logprobs.exp().item() - 0.880797) < 1e-6\n"
        "from pyllmtune.__main__ import main\n"
        "assert main(['env']) == 0 and main(['check']) == 0\n"
        "pyllmtune.token_logprobs(torch.rand(1, 3), torch.tensor([0]), backend='cpp')\n"
    )
    out = python(code)
    assert "backend cpp               no: import of pyllmtune._C" in out.stdout
    assert (
        "ValueError: backend='cpp' was asked for, but no compiled CPU module loaded" in out.stderr
    )


def test_backend_variable_overrides_auto_and_is_named_in_its_error():
    code = "import pyllmtune, torch; pyllmtune.token_logprobs(torch.rand(1, 3), torch.tensor([0]))"
    assert python(code, PYLLMTUNE_BACKEND="reference").returncode == 0
    assert "PYLLMTUNE_BACKEND must be one of" in python(code, PYLLMTUNE_BACKEND="fastest").stderr
    out = python(code, PYLLMTUNE_BACKEND="triton", TRITON_INTERPRET="0")
    assert "PYLLMTUNE_BACKEND='triton' was asked for, but" in out.stderr


def test_import_is_light():
    """Below 0.2 s of processor time beyond torch, and nothing optional is imported."""
    code = (
        "import time, torch, sys\n"
        "before = set(sys.modules)\n"
        "start = time.process_time()\n"
        "import pyllmtune\n"
        "print(time.process_time() - start)\n"
        "optional = {'triton', 'matplotlib', 'tqdm', 'transformers'}\n"
        "print(*((optional & set(sys.modules)) - before))\n"
    )
    times = []
    for _ in range(3):
        seconds, optional = python(code).stdout.split("\n")[:2]
        assert not optional
        times.append(float(seconds))
    assert min(times) < 0.2
