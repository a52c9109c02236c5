"""What all tests share: property tests without a clock, and loggers as they were."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How fast an example runs says something about the machine, nothing about the code.
settings.register_profile("weightsync", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weightsync")


@pytest.fixture(autouse=True)
def _own_logger_as_it_was() -> Iterator[None]:
    """Inside a vLLM worker our logger takes over vLLM's handlers; no other test may inherit them."""
    ours = logging.getLogger("weightsync")
    handlers, propagate, level = list(ours.handlers), ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)
