"""The house rule: every op has one word, a room with that word on every floor, one signature, and
short files.
"""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

from pyllmtune import _ops
from tests import helpers

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "temperature_softmax",
    "token_logprobs",
    "kept_token_logprobs",
    "linear_token_logprobs",
    "kept_logits",
    "filter_logits",
    "sample",
    "kl_divergence",
    "beam_step",
    "policy_loss",
    "gae",
)
COMPOSED_WORDS = ("linear_policy_loss",)  # no kernel of their own: loops over other words
ROOMS = (
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cuh",
    "csrc/cuda/{}.cu",
    "kernels/{}.py",
    "pyllmtune/ops/{}.py",
    "pyllmtune/reference/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
    "docs/{}.md",
)


def schema_arguments(name: str) -> list[str]:
    schemas = _ops.SCHEMAS | _ops.COMPOSED
    schema = torch._C.parse_schema(f"{_ops.NAMESPACE}::{name}{schemas[name]}")
    return [argument.name for argument in schema.arguments]


def tracked(*patterns: str) -> list[Path]:
    """Files of the project; without git (an sdist) every file below the root."""
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern)]


@pytest.mark.parametrize("word", COMPOSED_WORDS)
@pytest.mark.parametrize("room", ROOMS[4:])
def test_every_composed_op_has_every_room_in_python(word, room):
    test_every_op_has_every_room(word, room)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("room", ROOMS)
def test_every_op_has_every_room(word, room):
    path = ROOT / room.format(word)
    assert path.exists(), f"{word} has no {room.format(word)}"
    assert len(path.read_text().splitlines()) > 10, f"{path.name} is empty"


def test_every_schema_belongs_to_a_word():
    assert all(
        any(name.startswith(word) for word in WORDS + COMPOSED_WORDS)
        for name in _ops.SCHEMAS | _ops.COMPOSED
    )


@pytest.mark.parametrize("word", WORDS + COMPOSED_WORDS)
def test_reference_has_the_signature_of_the_schema(word):
    module = __import__(f"pyllmtune.reference.{word}", fromlist=[word])
    assert list(inspect.signature(getattr(module, word)).parameters) == schema_arguments(word)


@pytest.mark.parametrize("name", _ops.SCHEMAS)
def test_triton_has_the_signature_of_the_schema(name):
    helpers.need("triton")
    word = next(word for word in WORDS if name.startswith(word))
    module = __import__(f"pyllmtune.kernels.{word}", fromlist=[name])
    assert list(inspect.signature(getattr(module, name)).parameters) == schema_arguments(name)


@pytest.mark.parametrize("name", _ops.SCHEMAS)
@pytest.mark.parametrize("floor", ("cpu/{}.cpp", "cuda/{}.cu"))
def test_compiled_floors_implement_every_schema(name, floor):
    """The arguments of the C++ function, by name and order, are those of the schema."""
    word = next(word for word in WORDS if name.startswith(word))
    source = (ROOT / "csrc" / floor.format(word)).read_text()
    assert f'm.impl("{name}"' in source
    (arguments,) = re.findall(rf"\n\S[^\n]*\b{name}\(\s*(const Tensor& [^{{]*)\) {{", source)
    flat = re.sub(r"\s+", " ", re.sub(r"/\*|\*/", "", arguments))
    names = [part.split()[-1].lstrip("&") for part in flat.split(",")]
    wanted = schema_arguments(name)
    # an argument that a floor does not need may be unnamed
    assert len(names) == len(wanted)
    assert all(
        a == b or a in ("bool", "double", "int64_t") for a, b in zip(names, wanted, strict=True)
    )


@pytest.mark.parametrize("floor", ("cpp", "triton"))
def test_every_operator_is_implemented(floor):
    helpers.need(floor)
    for name in _ops.SCHEMAS | _ops.COMPOSED:
        qualified = f"{_ops.NAMESPACE}::{_ops.op_name(name, floor)}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"), qualified


def test_no_file_is_longer_than_400_lines():
    sources = tracked("*.py", "*.cpp", "*.cu", "*.cuh", "*.h")
    long = {path.name: n for path in sources if (n := len(path.read_text().splitlines())) > 400}
    assert sources and not long


def test_no_cpu_source_names_an_instruction_set():
    """One source for every instruction set: intrinsics live in the simd headers alone."""
    for path in tracked("csrc/cpu/*.cpp", "csrc/math/*.h"):
        assert "immintrin" not in path.read_text() and "_mm" not in path.read_text(), path.name


def test_only_stable_torch_headers():
    for path in tracked("csrc/*"):
        for header in re.findall(r'#include [<"]((?:torch|ATen|c10)/[^>"]+)', path.read_text()):
            assert header.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            ), f"{path.name} includes {header}"
