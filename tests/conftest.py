"""What all tests share: property tests without a clock (CI=true for many examples), and loggers as they were."""

import logging
import os
from collections.abc import Iterator

import preloaded
import pytest
from hypothesis import HealthCheck, settings

preloaded.use()

# How fast an example runs says something about the machine, nothing about the code.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# For the loop of edit and test. Property tests that give no number of examples of their own take the profile's.
settings.register_profile("dev", settings.get_profile("ci"), max_examples=25)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


@pytest.fixture(autouse=True)
def _own_logger_as_it_was() -> Iterator[None]:
    """Inside a vLLM worker our logger takes over vLLM's handlers; no other test may inherit them."""
    ours = logging.getLogger("weightsync")
    handlers, propagate, level = list(ours.handlers), ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)
