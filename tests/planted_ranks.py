"""Faults for tests/ranks.py to find: a wrong number, a wait in vain, a rank that is gone."""

from __future__ import annotations

import datetime
import time

import torch
from torch import distributed


def right(rank: int, world: int) -> None:
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total == world


def wrong_on_one(rank: int, world: int) -> None:
    assert rank == 0


def waited_for_in_vain(rank: int, world: int) -> None:
    group = distributed.new_group(timeout=datetime.timedelta(seconds=1))
    if rank == 0:
        distributed.all_reduce(torch.ones(1), group=group)
    time.sleep(2)


def after_it(rank: int, world: int) -> None:
    right(rank, world)


CASES = {case.__name__: case for case in (right, wrong_on_one, waited_for_in_vain, after_it)}
