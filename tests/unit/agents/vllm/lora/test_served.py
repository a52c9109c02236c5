"""The served adapter: its layout, the files that vLLM reads, and what it must have loaded of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_files import A, B, adapter
from safetensors.torch import load_file
from weightsync.agents.tables.runs import digest_table, table_bytes
from weightsync.agents.vllm import backend
from weightsync.agents.vllm.lora.declared import AdapterRefused, declared
from weightsync.agents.vllm.lora.served import LoadAsked, ServedAdapter
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.names import SCALING

CPU = torch.device("cpu")


def served(directory: Path, monkeypatch: pytest.MonkeyPatch) -> ServedAdapter:
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, f"policy={directory}")
    found = declared()
    assert found is not None
    return ServedAdapter(found, ["embed.weight", "norm.weight"], torch.bfloat16, CPU)


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServedAdapter:
    return served(adapter(tmp_path / "policy"), monkeypatch)


@dataclass
class Manager:
    """vLLM's, as far as an adapter is loaded by it."""

    story: list[Any] = field(default_factory=list)
    drops: bool = False

    def remove_adapter(self, number: int) -> None:
        self.story.append(("removed", number))

    def add_adapter(self, request: Any) -> None:
        self.story.append(("added", request))

    def list_adapters(self) -> set[int]:
        return set() if self.drops else {request.lora_int_id for what, request in self.story if what == "added"}


def test_the_layout_is_the_adapter_and_its_scaling_in_the_engines_dtype(policy: ServedAdapter) -> None:
    layout = policy.layout
    assert set(layout.tensors) == {
        Tensor(A, "bfloat16", (2, 3)),
        Tensor(B, "bfloat16", (5, 2)),
        Tensor(SCALING, "float64", (2,)),
    }
    assert layout.regions[0].base == policy.tensors[0].data_ptr()
    assert table_bytes(digest_table(layout.matrix(), layout)) == 2 * 6 + 2 * 10 + 16
    (left_out,) = layout.left_out
    assert (left_out.kind, left_out.names, left_out.count) == ("unwritten", ("embed.weight", "norm.weight"), 2)
    assert policy.rebalanced("") is None


def test_it_begins_as_its_files_do(policy: ServedAdapter) -> None:
    first = load_file(policy.declared.directory / "adapter_model.safetensors")
    with policy.files() as directory:
        found = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text())
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.to(torch.bfloat16).tolist() for name, value in first.items()
    }
    assert config == {**policy.declared.config, "use_rslora": False}
    assert isinstance(config["lora_alpha"], int)
    assert not directory.exists()


def test_what_is_written_is_what_vllm_reads(policy: ServedAdapter) -> None:
    manager, request = Manager(), SimpleNamespace(lora_int_id=3)
    policy.asked = LoadAsked(manager, request)
    new = {A: torch.full((2, 3), 1.5), B: torch.full((5, 2), -2.0), SCALING: torch.tensor([6.5, 1.0])}
    policy.load(new.items())
    assert manager.story == [("removed", 3), ("added", request)]
    with policy.files() as directory:
        found = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text())
    assert torch.equal(found[A], torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    assert torch.equal(found[B], torch.full((5, 2), -2.0, dtype=torch.bfloat16))
    assert (config["lora_alpha"], config["use_rslora"]) == (6.5, True)


def test_an_adapter_that_vllm_does_not_keep(policy: ServedAdapter) -> None:
    policy.asked = LoadAsked(Manager(drops=True), SimpleNamespace(lora_int_id=3))
    with pytest.raises(AdapterRefused, match="does not list it after it has loaded it"):
        policy.refresh()


def test_a_tensor_that_did_not_come_or_does_not_fit(policy: ServedAdapter) -> None:
    with pytest.raises(AdapterRefused, match=r"lora_A\.weight' of adapter 'policy' is nothing, not \(2, 3\)"):
        policy.load([(B, torch.zeros(5, 2))])
    with pytest.raises(AdapterRefused, match=r"is \(3, 3\), not \(2, 3\)"):
        policy.load([(A, torch.zeros(3, 3)), (B, torch.zeros(5, 2))])


def test_an_adapter_that_the_server_does_not_serve(policy: ServedAdapter) -> None:
    for asked in (policy.check, policy.refresh):
        with pytest.raises(AdapterRefused, match="--enable-lora --lora-modules policy="):
            asked()


def loaded(policy: ServedAdapter, **changed: torch.Tensor) -> Any:
    """vLLM's ``LoRAModel`` of the adapter."""
    first = load_file(policy.declared.directory / "adapter_model.safetensors")
    weights = {"lora_a": first[A].to(torch.bfloat16), "lora_b": first[B].to(torch.bfloat16), **changed}
    return SimpleNamespace(loras={"model.layers.0.q_proj": SimpleNamespace(**weights)})


def test_what_vllm_has_loaded_is_compared(policy: ServedAdapter) -> None:
    policy.require_loaded(loaded(policy))
    with pytest.raises(AdapterRefused, match=r"vLLM has loaded another model\.layers\.0\.q_proj\.lora_B"):
        policy.require_loaded(loaded(policy, lora_b=torch.zeros(5, 2, dtype=torch.bfloat16)))
    with pytest.raises(AdapterRefused, match="vLLM has loaded no module of it"):
        policy.require_loaded(SimpleNamespace(loras={}))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3, dtype=torch.int8), torch.zeros(()), torch.zeros(0, 3)], ids=["int8", "scalar", "empty"]
)
def test_what_is_no_matrix_of_numbers(tensor: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterRefused, match="no matrix of numbers"):
        served(adapter(tmp_path / "odd", {A: tensor}), monkeypatch)
