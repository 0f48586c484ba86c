"""Replaces functions of another project wherever they were bound, and puts them back."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Seam:
    """A name of another project, the parameters it is known to have, and what we put there.

    ``name`` is that of a function or a class, or ``"Class.method"``.
    ``make(original)`` returns the function that replaces it, which may fall back to the original.
    ``method`` names the method that is called and whose parameters are compared, ``("apply",
    "forward")`` for an autograd function; None where the object itself is called. ``everywhere``:
    in every module of the project that bound it, not in ``module`` alone.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Any], Any]
    method: tuple[str, str] | None = None
    everywhere: bool = True

    def find(self) -> Any:
        """The original; a RuntimeError with what was expected and found if it has moved."""
        expected = f"{self.module}.{self.name}({', '.join(self.parameters)})"
        original = importlib.import_module(self.module)
        for part in self.name.split("."):
            if not hasattr(original, part):
                raise RuntimeError(f"expected {expected}, but {self.module} has no {self.name}")
            original = getattr(original, part)
        described = getattr(original, self.method[1]) if self.method else original
        found = tuple(inspect.signature(described).parameters)
        if found != self.parameters:
            raise RuntimeError(f"expected {expected}, found parameters ({', '.join(found)})")
        return original


class Patch:
    """Replaced names, from :meth:`apply` to :meth:`undo`; as a context manager, for a block.

    Attributes:
        changed: every name that was replaced, ``module.name``, also where it had been imported to.
        calls: how often each replacement ran, by the seam's name.
    """

    def __init__(self, project: str, seams: Sequence[Seam]) -> None:
        self.project, self.seams = project, seams
        self.changed: list[str] = []
        self.calls: Counter[str] = Counter()
        self._pairs: list[tuple[Seam, Any, Any]] = []  # seam, original, replacement

    @property
    def active(self) -> bool:
        return bool(self._pairs)

    def apply(self, *more: Seam) -> Patch:
        """All seams and ``more``, or none: every original is found before the first is replaced."""
        replaced = [seam for seam, *_ in self._pairs]
        seams = [seam for seam in (*self.seams, *more) if seam not in replaced]
        for seam, original in [(seam, seam.find()) for seam in seams]:
            replacement = self._counted(seam, original)
            self._pairs.append((seam, original, replacement))
            self.changed += self._rebind(seam, original, replacement)
        return self

    def undo(self) -> None:
        for seam, original, replacement in reversed(self._pairs):
            self._rebind(seam, replacement, original)
        self._pairs.clear()
        self.changed.clear()

    def _counted(self, seam: Seam, original: Any) -> Any:
        replacement = seam.make(original)

        @functools.wraps(replacement)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[seam.name] += 1
            return replacement(*args, **kwargs)

        return SimpleNamespace(**{seam.method[0]: counted}) if seam.method else counted

    def _rebind(self, seam: Seam, old: Any, new: Any) -> list[str]:
        """Bind ``new`` in the modules that hold ``old`` under the seam's name, or in its class."""
        changed = []
        *classes, name = seam.name.split(".")
        for module_name, module in list(sys.modules.items()):
            inside = module_name == self.project or module_name.startswith(self.project + ".")
            wanted = inside if seam.everywhere else module_name == seam.module
            owner = functools.reduce(lambda of, part: getattr(of, part, None), classes, module)
            if wanted and owner is not None and vars(owner).get(name) is old:
                setattr(owner, name, new)
                changed.append(f"{module_name}.{seam.name}")
        return changed

    def __enter__(self) -> Patch:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()
