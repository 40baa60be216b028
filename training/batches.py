"""Consecutive parts of a list."""

from typing import TypeVar

_Item = TypeVar("_Item")


def batched(items: list[_Item], size: int) -> list[list[_Item]]:
    """Consecutive parts of at most `size` items (itertools.batched needs Python 3.12)."""
    return [items[start : start + size] for start in range(0, len(items), size)]
