"""Command line: ``python -m pyllmtune env | check | demo | bench``."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


def _bench(arguments: list[str]) -> int:
    """Run ``benchmarks/`` of the source tree; it is not part of the installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").exists():
        print(
            "The benchmarks are part of the source tree, not of the installed package: "
            "clone the project and run this from an editable install.",
            file=sys.stderr,
        )
        return 2
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], cwd=root)


def _demo(arguments: list[str]) -> int:
    missing = [name for name in ("numpy", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The demo needs {', '.join(missing)}: pip install 'pyllmtune[demo]'", file=sys.stderr
        )
        return 2
    from pyllmtune import demo

    return demo.main(arguments)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pyllmtune", description=sys.modules["pyllmtune"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="what is installed, which backends are ready, and why not")
    commands.add_parser("check", help="run every op on every backend present against the reference")
    commands.add_parser(
        "demo",
        help="tune a small language model, ours beside eager PyTorch",
        add_help=False,
    )
    commands.add_parser(
        "bench", help="time an op: python -m pyllmtune bench token_logprobs", add_help=False
    )
    options, rest = parser.parse_known_args(argv)
    if options.command in ("env", "check") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "env":
        from pyllmtune import _env

        print(_env.report())
        return 0
    if options.command == "check":
        from pyllmtune import _selfcheck

        return 0 if _selfcheck.run() else 1
    return _demo(rest) if options.command == "demo" else _bench(rest)


if __name__ == "__main__":
    sys.exit(main())
