"""What a simulated engine answers to a call."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """To a call. ``paused``: whether the engine is, where the call says so."""

    paused: bool | None = None
    error: str = ""


Reply = Callable[[Answer], None]
