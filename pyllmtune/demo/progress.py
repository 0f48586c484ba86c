"""A progress bar, if tqdm is installed; without it, silence until the phase ends."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """``with Progress("PPO", steps) as bar: bar.advance(reward="0.9")``."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.bar: Any = None

    def __enter__(self) -> Progress:
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"{self.title}: up to {self.total} steps (no progress bar: pip install tqdm)")
        else:
            self.bar = tqdm(
                total=self.total, desc=self.title, unit="step", dynamic_ncols=True, miniters=1
            )
        return self

    def advance(self, **shown: str) -> None:
        """One step further; ``shown`` replaces what stands behind the bar."""
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
