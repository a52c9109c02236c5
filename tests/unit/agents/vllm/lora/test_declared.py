"""What the environment may declare, and what is refused with its reason."""

from pathlib import Path

import pytest
import torch
from peft_files import A, B, adapter
from weightsync.agents.vllm import backend
from weightsync.agents.vllm.lora.declared import AdapterRefused, declared


@pytest.fixture(autouse=True)
def _undeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ADAPTER_VARIABLE, raising=False)


def test_nothing_is_declared_by_default() -> None:
    assert declared() is None
    assert not backend.writes_adapter()


def test_a_name_and_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = adapter(tmp_path / "a=b")
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, f"policy={directory}")
    found = declared()
    assert found is not None
    assert backend.writes_adapter()
    assert (found.name, found.directory, found.config["lora_alpha"]) == ("policy", directory, 4)
    assert {(entry.name, entry.shape) for entry in found.tensors} == {(A, (2, 3)), (B, (5, 2))}
    assert found.is_in(str(tmp_path / "x" / ".." / "a=b"))
    assert not found.is_in(str(tmp_path))


@pytest.mark.parametrize("value", ["policy", "=somewhere", "policy="])
def test_half_a_declaration(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, value)
    with pytest.raises(AdapterRefused, match="give NAME=DIRECTORY"):
        declared()


def refused(directory: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, f"policy={directory}")
    with pytest.raises(AdapterRefused, match=reason):
        declared()


def test_directories_that_hold_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nowhere", monkeypatch, "has no adapter_config.json")
    (adapter(tmp_path / "half") / "adapter_model.safetensors").unlink()
    refused(tmp_path / "half", monkeypatch, "has no adapter_model.safetensors")
    refused(adapter(tmp_path / "empty", {}), monkeypatch, "holds no factors of LoRA")
    dora = {A: torch.zeros(2, 3), "base_model.model.q_proj.lora_magnitude_vector": torch.zeros(2)}
    refused(
        adapter(tmp_path / "dora", dora), monkeypatch, r"holds base_model\.model\.q_proj\.lora_magnitude_vector, no"
    )


def test_the_embedding_beside_its_adapter_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = "base_model.model.model.embed_tokens"
    factors = {f"{embedding}.lora_embedding_A": torch.zeros(2, 8), f"{embedding}.lora_embedding_B": torch.zeros(4, 2)}
    directory = adapter(tmp_path, {**factors, f"{embedding}.base_layer.weight": torch.zeros(8, 4)})
    monkeypatch.setenv(backend.ADAPTER_VARIABLE, f"policy={directory}")
    found = declared()
    assert found is not None
    assert {entry.name for entry in found.tensors} == factors.keys()


def test_configurations_that_cannot_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(adapter(tmp_path / "a", lora_alpha="4"), monkeypatch, "lora_alpha '4', where a number belongs")
    refused(adapter(tmp_path / "b", rank_pattern={"q": 4}), monkeypatch, r"rank_pattern \{'q': 4\}")
    refused(adapter(tmp_path / "c", alpha_pattern={"q": 4}), monkeypatch, "alpha_pattern")
    broken = adapter(tmp_path / "d")
    (broken / "adapter_config.json").write_text("{")
    refused(broken, monkeypatch, "is no JSON")
    (broken / "adapter_config.json").write_text(" " * (1024 * 1024 + 1))
    refused(broken, monkeypatch, "exceeds 1048576 bytes")
