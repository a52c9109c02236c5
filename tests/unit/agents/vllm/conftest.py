"""vLLM's engine core in the tests of what wraps it."""

import pytest
from engine_cores import EngineCore, pretend_vllm
from weightsync.agents.vllm import hold


@pytest.fixture
def core_class(monkeypatch: pytest.MonkeyPatch) -> type[EngineCore]:
    """A fresh engine core class in the place of vLLM's, with the hold installed twice."""
    fresh = type("EngineCore", (EngineCore,), {"_initialize_kv_caches": EngineCore._initialize_kv_caches})
    pretend_vllm(monkeypatch, fresh)
    hold.install()
    hold.install()
    return fresh
