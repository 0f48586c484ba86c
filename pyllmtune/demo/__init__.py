"""The demo: a small language model, trained and then tuned, ours beside eager PyTorch.

``python -m pyllmtune demo --help`` says what can be chosen.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if everything that was compared agrees."""
    from pyllmtune.demo.command import run

    return run(argv)
