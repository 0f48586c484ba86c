"""Run one planted operator: python run_planted.py overflow|bad_shift|race|no_race."""

import sys

import torch

import pyllmtune  # noqa: F401  loads the module that holds them

if __name__ == "__main__":
    torch.set_num_threads(2)
    x = torch.zeros(64)
    for _ in range(20):
        getattr(torch.ops.pyllmtune_planted, sys.argv[1])(x)
    print("finished")
