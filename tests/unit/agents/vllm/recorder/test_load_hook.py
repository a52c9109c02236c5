"""The hook around vLLM's loading, with a double of vLLM's loader: what it sees, and whom it leaves alone."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightsync.agents.vllm.recorder import drafts, load_hook
from weightsync.agents.vllm.recorder.recorded import RecordError, recorded_layout

BASE = "vllm.model_executor.model_loader.base_loader"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4, bias=False)
        self.loads = 0

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        self.loads += 1
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)
        return set(parameters)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loader class shaped like vLLM's, in the place where the hook looks for it."""

    class BaseModelLoader:
        def __init__(self, weights: dict[str, torch.Tensor] | None) -> None:
            self.weights = weights

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            model = Model()
            self.load_weights(model, model_config)
            model.proj.weight = nn.Parameter(model.proj.weight.data.clone(), requires_grad=False)
            return model

        def load_weights(self, model: Model, model_config: Any) -> None:
            if self.weights is not None:
                model.load_weights(iter(self.weights.items()))

    module = ModuleType(BASE)
    module.BaseModelLoader = BaseModelLoader  # type: ignore[attr-defined]
    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, BASE, module)
    monkeypatch.setattr(drafts, "_drafters", type(drafts._drafters)())
    return BaseModelLoader


def config(directory: Path | str = "", backend: str = "weightsync") -> SimpleNamespace:
    model_config = SimpleNamespace(model=str(directory), dtype=torch.float32)
    transfer = SimpleNamespace(backend=backend)
    load_config = SimpleNamespace(load_format="auto")
    return SimpleNamespace(model_config=model_config, weight_transfer_config=transfer, load_config=load_config)


def test_a_load_is_recorded_from_what_the_loader_was_fed(loader: Any) -> None:
    load_hook.install()
    weight = torch.randn(4, 3)
    settings = config()
    model = loader({"proj.weight": weight}).load_model(settings, settings.model_config)
    assert torch.equal(model.proj.weight, weight)
    recorded = recorded_layout(model, settings)
    assert [(t.name, t.shape) for t in recorded.layout.tensors] == [("proj.weight", (4, 3))]
    assert recorded.layout.regions[0].base == model.proj.weight.data_ptr()
    assert "load_weights" not in model.__dict__


def test_the_configuration_of_a_load_stays_with_the_model(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load_hook.install()
    settings, other = config(), config(backend="nccl")
    model = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config)
    assert load_hook.config_of(model) is settings
    left_alone = loader({"proj.weight": torch.randn(4, 3)}).load_model(other, other.model_config)
    assert load_hook.config_of(left_alone) is None
    monkeypatch.setattr(load_hook, "writes_adapter", lambda: True)
    base = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config)
    assert load_hook.config_of(base) is settings


def test_installing_twice_wraps_once(loader: Any) -> None:
    load_hook.install()
    wrapped = loader.load_model
    load_hook.install()
    assert loader.load_model is wrapped
    settings = config()
    assert loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config).loads == 3


@pytest.mark.parametrize("backend", ["nccl", None])
def test_engines_with_another_backend_are_left_alone(loader: Any, backend: str | None) -> None:
    load_hook.install()
    settings = config()
    settings.weight_transfer_config = SimpleNamespace(backend=backend) if backend else None
    model = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config)
    assert model.loads == 1
    with pytest.raises(RecordError, match="without the recorder"):
        recorded_layout(model, settings)


def test_a_drafter_is_recorded_with_its_model(loader: Any) -> None:
    load_hook.install()
    settings = config()
    own = SimpleNamespace(model="another", dtype=torch.float32)
    settings.speculative_config = SimpleNamespace(
        method="draft_model", draft_model_config=own, target_model_config=settings.model_config
    )
    model = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config)
    drafter = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, own)
    recorded = recorded_layout(model, settings)
    assert [tensor.name for tensor in recorded.layout.tensors] == ["proj.weight", "draft.proj.weight"]
    weights = {name: torch.randn(4, 3) for name in ("proj.weight", "draft.proj.weight")}
    recorded.load(weights.items())
    assert torch.equal(model.proj.weight, weights["proj.weight"])
    assert torch.equal(drafter.proj.weight, weights["draft.proj.weight"])


def test_a_drafter_that_rounds_leave_alone_is_loaded_once(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(drafts.VARIABLE, drafts.KEEP)
    monkeypatch.setattr(drafts, "_left", type(drafts._left)())
    load_hook.install()
    settings = config()
    own = SimpleNamespace(model="another", dtype=torch.float32)
    settings.speculative_config = SimpleNamespace(
        method="draft_model", draft_model_config=own, target_model_config=settings.model_config
    )
    model = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, settings.model_config)
    drafter = loader({"proj.weight": torch.randn(4, 3)}).load_model(settings, own)
    assert drafter.loads == 1
    assert [tensor.name for tensor in recorded_layout(model, settings).layout.tensors] == ["proj.weight"]


def test_the_loader_is_left_as_it_was_when_loading_fails(loader: Any) -> None:
    load_hook.install()
    settings = config()
    broken = loader({"proj.weight": torch.zeros(5, 3)})
    with pytest.raises(RuntimeError, match="size"):
        broken.load_model(settings, settings.model_config)
    assert "load_weights" not in broken.__dict__


def test_dummy_weights_are_recorded_from_the_files_beside_the_config(loader: Any, tmp_path: Path) -> None:
    save_file({"proj.weight": torch.zeros(4, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    load_hook.install()
    settings = config(tmp_path)
    recorded = recorded_layout(loader(None).load_model(settings, settings.model_config), settings)
    assert [(t.name, t.dtype) for t in recorded.layout.tensors] == [("proj.weight", "float32")]


def test_dummy_weights_without_files_are_recorded_from_the_model_s_own_shapes(loader: Any, tmp_path: Path) -> None:
    load_hook.install()
    settings = config(tmp_path)
    recorded = recorded_layout(loader(None).load_model(settings, settings.model_config), settings)
    assert [(t.name, t.shape) for t in recorded.layout.tensors] == [("proj.weight", (4, 3))]
