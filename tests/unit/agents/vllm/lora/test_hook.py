"""The hook in vLLM's loading of adapters, with doubles of the two classes that it wraps."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from peft_files import A, B, adapter
from safetensors.torch import load_file
from weightsync.agents.vllm import backend
from weightsync.agents.vllm.lora import hook
from weightsync.agents.vllm.lora.declared import AdapterRefused, declared
from weightsync.agents.vllm.lora.served import LoadAsked, ServedAdapter


class Request(msgspec.Struct):
    lora_name: str
    lora_path: str
    lora_int_id: int = 1


class Weights(msgspec.Struct):
    lora_a: torch.Tensor
    lora_b: torch.Tensor


class Loaded(msgspec.Struct):
    loras: dict[str, Weights]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two classes shaped like vLLM's, in the places where the hook looks for them."""

    class WorkerLoRAManager:
        def _load_adapter(self, request: Request) -> Loaded:
            found = load_file(Path(request.lora_path) / "adapter_model.safetensors")
            return Loaded({"model.layers.0.q_proj": Weights(found[A], found[B])})

    class LoRAModelRunnerMixin:
        resets = 0

        def reset_lora_state(self) -> None:
            self.resets += 1

    class Vllm:
        manager, runner = WorkerLoRAManager, LoRAModelRunnerMixin

    for name, value in (
        ("vllm.lora.worker_manager", WorkerLoRAManager),
        ("vllm.v1.worker.lora_model_runner_mixin", LoRAModelRunnerMixin),
    ):
        module = ModuleType(name)
        setattr(module, value.__name__, value)
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hook, "_served", [])
    return Vllm


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the declared adapter."""
    found = adapter(tmp_path / "policy")
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, f"policy={found}")
    return found


def policy() -> ServedAdapter:
    found = declared()
    assert found is not None
    return ServedAdapter(found, [], torch.bfloat16, torch.device("cpu"))


def test_a_server_without_an_adapter_is_left_alone(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ADAPTER_VARIABLE, raising=False)
    before = vllm.manager._load_adapter
    hook.install()
    assert vllm.manager._load_adapter is before


def test_asked_for_the_adapter_vllm_gets_what_rounds_wrote(vllm: Any, directory: Path) -> None:
    hook.install()
    hook.install()
    adapter = policy()
    hook.serve(adapter)
    adapter._values[A].fill_(2.5)
    manager, request = vllm.manager(), Request("policy", str(directory))
    loaded = manager._load_adapter(request)
    assert loaded.loras["model.layers.0.q_proj"].lora_a.tolist() == [[2.5] * 3] * 2
    assert adapter.asked == LoadAsked(manager, request)


def test_other_adapters_are_loaded_from_their_files(vllm: Any, directory: Path, tmp_path: Path) -> None:
    other = adapter(tmp_path / "other")
    hook.install()
    adapter_of_rounds = policy()
    hook.serve(adapter_of_rounds)
    loaded = vllm.manager()._load_adapter(Request("other", str(other)))
    assert torch.equal(loaded.loras["model.layers.0.q_proj"].lora_a, load_file(other / "adapter_model.safetensors")[A])
    assert adapter_of_rounds.asked is None


def test_other_files_under_its_name_are_refused(vllm: Any, directory: Path, tmp_path: Path) -> None:
    hook.install()
    hook.serve(policy())
    with pytest.raises(AdapterRefused, match=r"'policy' is written by rounds, and .*other is not where it began"):
        vllm.manager()._load_adapter(Request("policy", str(adapter(tmp_path / "other"))))


def test_the_end_of_an_update_drops_no_adapter_of_an_unchanged_base(vllm: Any, directory: Path) -> None:
    hook.install()
    runner = vllm.runner()
    runner.reset_lora_state()
    assert runner.resets == 1
    hook.serve(policy())
    runner.reset_lora_state()
    assert runner.resets == 1


def test_a_vllm_that_loads_adapters_otherwise_is_refused(vllm: Any, directory: Path) -> None:
    del vllm.manager._load_adapter
    hook.install()
    with pytest.raises(hook.HookUnavailable, match=r"no WorkerLoRAManager\._load_adapter"):
        hook.serve(policy())
