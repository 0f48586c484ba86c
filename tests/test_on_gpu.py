"""How tests get to a GPU, tried without one: strides, alignment, aliases and results survive."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests import on_gpu
from tests.gpuless.toolchain import REPO


@pytest.fixture
def cpu_for_a_gpu(monkeypatch):
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")


def test_a_view_keeps_its_strides_and_alignment(cpu_for_a_gpu):
    memory = torch.arange(60.0)
    view = memory.view(3, 20)[1:, 3:17:2].T
    moved = on_gpu.there(view, {})
    assert torch.equal(moved, view) and moved.stride() == view.stride()
    assert moved.storage_offset() == view.storage_offset()
    assert on_gpu.there(view[:0], {}).shape == view[:0].shape and on_gpu.there(7, {}) == 7


def test_views_of_one_storage_stay_views_of_one(cpu_for_a_gpu):
    memory, storages = torch.zeros(10), {}
    a, b = (on_gpu.there(x, storages) for x in (memory[:5], memory[3:]))
    a[3] = 1.0
    assert b[0] == 1.0


def test_what_an_operator_writes_comes_back(cpu_for_a_gpu):
    logits, out = torch.randn(1, 2, 33), torch.zeros(1, 2, 33)
    softmax = ("temperature_softmax_out", logits, 1.0, None, False, out)
    assert on_gpu.run_there("cpp", *softmax) is None
    assert torch.allclose(out, logits.softmax(-1))


def test_without_a_gpu_the_check_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "tests.gpu_check", "--steps", "check"]
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ran.returncode == 2 and "no CUDA device" in ran.stderr
