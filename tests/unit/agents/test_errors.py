"""The tree of errors: drawn as it is, and read by ``blame``."""

import importlib
import pkgutil
import re

import pytest
from weightsync import agents
from weightsync.agents import errors
from weightsync.agents.errors import AgentError, blame
from weightsync.agents.trainer.publication import BusyError, PublishError
from weightsync.agents.transport.filesystem import CheckpointError
from weightsync.agents.transport.nixl.errors import MetadataError, NixlError, RegionError
from weightsync.agents.transport.shares import PlanMismatch
from weightsync.kernels.errors import KernelError

NEEDS_ANOTHER = ("lifecycle", "callback", "adapters.vllm", "adapters.verl")
"""Modules that import vLLM or verl."""


def kinds(root: type[AgentError]) -> set[type[AgentError]]:
    """``root`` and all classes below it."""
    return {root}.union(*(kinds(kind) for kind in root.__subclasses__()))


def test_every_error_is_drawn_with_the_module_that_it_is_in() -> None:
    for module in pkgutil.walk_packages(agents.__path__, f"{agents.__name__}."):
        if not module.name.endswith(NEEDS_ANOTHER):
            importlib.import_module(module.name)
    text = errors.__doc__ or ""
    found = {kind for kind in kinds(AgentError) if kind.__module__.startswith("weightsync.")}
    # The errors of a trainer's tensors are many and alike: the tree names some and says so.
    drawn = {kind for kind in found if kind.__module__ != "weightsync.agents.trainer.errors"}
    missing = [kind.__name__ for kind in drawn if not re.search(rf"\b{kind.__name__}\b", text)]
    assert missing == []
    for line in re.findall(r"── (\w+) .*?  (\w+(?:\.\w+)+)$", text, re.MULTILINE):
        name, module = line
        assert hasattr(importlib.import_module(f"weightsync.agents.{module}"), name), line


@pytest.mark.parametrize(
    ("error", "fault", "retry"),
    [
        (RegionError("overlaps"), "config", False),
        (MetadataError("torn"), "network", False),
        (PlanMismatch("worth less"), "daemon", False),
        (CheckpointError("part 2"), "trainer", True),
        (BusyError("step 1"), "trainer", True),
        (KernelError("no such region"), "engine", False),
        (MemoryError(), "engine", True),
        (RuntimeError("CUDA error"), "engine", True),
    ],
)
def test_blame(error: Exception, fault: str, retry: bool) -> None:
    assert blame(error, "engine") == (fault, retry)


def test_training_scripts_may_catch_a_failed_publish_as_a_runtime_error() -> None:
    assert issubclass(PublishError, RuntimeError)
    assert not issubclass(NixlError, RuntimeError), "what is ours is caught by our names"
