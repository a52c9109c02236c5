"""For a while, bytes made of others."""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from mutated import mutated

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1"))
EXAMPLES = 200
HANG = timedelta(seconds=10)
"""Nothing here takes a hundredth of it; the machine may be busy."""

CORPUS = Path(__file__).with_name("corpus")


def corpus(name: str) -> list[bytes]:
    """What once was answered wrongly."""
    return [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]


def fuzz(feed: Callable[[bytes], object], seeds: Sequence[bytes], seconds: float) -> None:
    """Feed bytes made of ``seeds`` for so long, EXAMPLES at the least."""
    end = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < end:
        number += 1

        @seed(number)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=HANG,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(mutated(seeds))
        def some(data: bytes) -> None:
            feed(data)

        some()
