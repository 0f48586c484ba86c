"""The emulator's race detector against an oracle: it reports what nothing orders, nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest

from .emulator import KernelFault, load
from .toolchain import require

READ, WRITE, ATOMIC = range(3)
NOTHING, BARRIER, SYNCWARP, SHUFFLE = range(4)


@pytest.fixture(scope="module")
def library():
    require("g++", "nvcc", "addr2line")
    return load(["tests/gpuless/race_pairs.cu"], "tsan")


def is_race(library, entry, *arguments) -> bool:
    try:
        library.call(entry, *arguments)
    except KernelFault as fault:
        assert "race: " in str(fault) and str(fault).count("race_pairs.cu:") == 2, fault
        return True
    return False


def random_pair(draw: random.Random) -> dict[str, int]:
    """Two accesses; half of the time in one block, often by one thread or one warp."""
    threads, blocks = draw.choice([32, 64, 96, 256]), draw.choice([1, 2, 3, 6])
    block1, thread1 = draw.randrange(blocks), draw.randrange(threads)
    near = thread1 // 32 * 32 + draw.randrange(32)
    return {
        "blocks": blocks,
        "threads": threads,
        "block1": block1,
        "thread1": thread1,
        "deed1": draw.randrange(3),
        "block2": draw.choice([block1, draw.randrange(blocks)]),
        "thread2": draw.choice([thread1, near, draw.randrange(threads)]),
        "deed2": draw.randrange(3),
        "between": draw.randrange(4),
        "around": draw.randrange(3),
    }


def expected(p: dict[str, int]) -> bool:
    harmless = p["deed1"] == p["deed2"] != WRITE
    same_block, same_warp = p["block1"] == p["block2"], p["thread1"] // 32 == p["thread2"] // 32
    ordered = same_block and (
        p["thread1"] == p["thread2"]
        or p["between"] == BARRIER
        or (p["between"] == SYNCWARP and same_warp)
    )
    return not harmless and not ordered


def test_random_pairs_agree_with_the_oracle(library):
    draw, word, races = random.Random(0), np.zeros(1, np.float32), 0
    for case in range(600):
        pair = random_pair(draw)
        library.seed(case % 3)
        assert is_race(library, "pair", word, *pair.values()) == expected(pair), pair
        races += expected(pair)
    assert 150 < races < 450  # both answers were asked for


NONE, BEFORE_WRITE, OF_DEVICE, OF_BLOCK, BY_ANNOUNCER = range(5)


@pytest.mark.parametrize(
    "fences, writer, announcer, race",
    [
        (NONE, 0, 0, True),
        (BEFORE_WRITE, 0, 0, True),
        (OF_DEVICE, 0, 0, False),
        (OF_BLOCK, 0, 0, True),
        (NONE, 40, 0, True),
        (OF_DEVICE, 40, 0, False),  # fence, barrier, and another thread's atomic
        (
            BY_ANNOUNCER,
            40,
            0,
            False,
        ),  # barrier, fence and atomic: what the barrier ordered goes along
    ],
)
def test_hand_over_between_blocks(library, fences, writer, announcer, race):
    y = np.zeros(3, np.float32)
    library.seed(0)
    assert is_race(library, "hand_over", y, fences, writer, announcer) == race


@pytest.mark.parametrize("form", range(10))
def test_every_form_of_access_is_seen(library, form):
    assert is_race(library, "forms", np.zeros(32, np.float32), np.zeros(32, np.float32), form)


def test_neighbouring_bytes_are_no_race(library):
    data, halves = np.zeros(64, np.uint8), np.zeros(64, np.int16)
    assert not is_race(library, "neighbours", data, halves)
    np.testing.assert_array_equal(halves, np.arange(64))


def test_a_local_variable_is_nobody_elses(library):
    with pytest.raises(KernelFault, match=r"another thread's local variable.*race_pairs.cu:\d+"):
        library.call("others_local", np.zeros(32, np.float32))
