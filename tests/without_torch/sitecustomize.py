"""Hides torch from a process, as where this package is used without it.

transformers imports torch where it finds it, which takes longer than all else that a command does.
"""

from importlib.machinery import PathFinder
from typing import Any

_finder: Any = PathFinder
_find_spec = _finder.find_spec


def _find_all_but_torch(name: str, *where: Any) -> Any:
    return None if name == "torch" else _find_spec(name, *where)


_finder.find_spec = _find_all_but_torch
