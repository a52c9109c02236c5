"""In the place of Ray: the one function that the adapter calls, for futures of this process."""

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any


def get(references: Iterable["Future[Any]"]) -> list[Any]:
    """The results, or the first failure."""
    return [reference.result() for reference in references]
