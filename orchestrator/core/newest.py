"""Mappings that remember only what came last."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def keep_newest(mapping: dict[K, V], key: K, value: V, limit: int) -> list[K]:
    """Put ``value`` under ``key`` as the newest entry of ``mapping``; returns the keys that ``limit`` has no room for.

    Its order is that of the last putting, oldest first.
    """
    mapping.pop(key, None)
    mapping[key] = value
    gone = []
    while len(mapping) > limit:
        gone.append(next(iter(mapping)))
        del mapping[gone[-1]]
    return gone
