"""The entry point, on fakes of vLLM's factory."""

import sys
from types import ModuleType
from typing import Any

import pytest
from weightsync.agents.vllm import guard, hold, plugin
from weightsync.agents.vllm.recorder import load_hook


class Factory:
    """Stands for ``WeightTransferEngineFactory``, with its refusal of a second registration."""

    _registry: dict[str, Any]

    @classmethod
    def register_engine(cls, name: str, module: str, class_name: str) -> None:
        if name in cls._registry:
            raise ValueError(f"{name} is already registered")
        cls._registry[name] = (module, class_name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fresh factory in the place of vLLM's; what ``register`` installs, in order."""
    Factory._registry = {"nccl": None}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm.distributed.weight_transfer.factory")
    module.WeightTransferEngineFactory = Factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    order: list[str] = []
    monkeypatch.setattr(guard, "install", lambda: order.append("guard"))
    monkeypatch.setattr(hold, "install", lambda: order.append("hold"))
    monkeypatch.setattr(load_hook, "install", lambda: order.append("load_hook"))
    return order


def test_registering_twice_does_no_harm(installed: list[str]) -> None:
    plugin.register()
    plugin.register()
    assert Factory._registry["weightsync"] == ("weightsync.agents.vllm.adapter.choose", "WeightsyncEngine")
    assert installed == ["guard", "hold", "load_hook"]


def test_a_vllm_without_weight_transfer_is_left_alone(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", None)
    plugin.register()
    assert installed == []
