"""One load, proved: with files, with files that promise something else, and without a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.vllm.recorder.proved_load import proved_load


class Model(nn.Module):
    """A projection and a bias; ``trick`` is what its loader does to real values only."""

    def __init__(self, trick: Any = None) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)
        self.trick = trick
        self.fed: list[list[str]] = [[]]

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        self.fed.append([])
        for name, tensor in weights:
            self.fed[-1].append(name)
            parameters[name].data.copy_(tensor)
            if self.trick is not None and not tensor.is_meta:
                self.trick(parameters[name].data)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in (("proj.weight", (4, 3)), ("proj.bias", (4,)))}


def config(directory: Path | str) -> SimpleNamespace:
    return SimpleNamespace(model=str(directory), dtype=torch.float32)


def test_files_are_traced_first_and_loaded_once(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "model.safetensors")
    model = Model()
    recording = proved_load(model, config(tmp_path), lambda: model.load_weights(iter(weights(1).items())))
    assert len(model.fed) == 3  # the trace, and the load
    assert torch.equal(model.proj.weight, weights(1)["proj.weight"])
    assert recording.unused == []
    assert "load_weights" not in vars(model)


@pytest.mark.parametrize(
    "files", [{"proj.weight": (4, 3)}, {"proj.weight": (4, 3), "proj.bias": (4,), "more": (2,)}, {}]
)
def test_other_tensors_than_the_files_promise_are_loaded_once_more(
    tmp_path: Path, files: dict[str, tuple[int, ...]]
) -> None:
    if files:
        save_file({name: torch.zeros(shape) for name, shape in files.items()}, tmp_path / "model.safetensors")
    model = Model()
    proved_load(model, config(tmp_path), lambda: model.load_weights(iter(weights(1).items())))
    assert model.fed[-1] == ["proj.weight", "proj.bias"]
    assert torch.equal(model.proj.bias, weights(1)["proj.bias"])


@pytest.mark.parametrize("from_files", [True, False])
def test_a_loader_that_treats_values_otherwise_than_stand_ins_is_refused(tmp_path: Path, from_files: bool) -> None:
    if from_files:
        save_file(weights(1), tmp_path / "model.safetensors")
    model = Model(trick=lambda data: data.mul_(2))
    load = (lambda: model.load_weights(iter(weights(1).items()))) if from_files else (lambda: None)
    with pytest.raises(RecordError, match=r"proj\.weight does not hold proj\.weight at \[0, 0\]"):
        proved_load(model, config(tmp_path), load)


def test_without_a_checkpoint_the_loader_is_proved_with_made_values(tmp_path: Path) -> None:
    model = Model()
    filled: list[float] = []

    def load() -> None:
        filled.append(float(model.proj.weight.detach()[0, 0]))
        with torch.no_grad():
            model.proj.weight.fill_(7)

    proved_load(model, config(tmp_path), load)
    assert len(filled) == 2
    assert 0.5 <= filled[1] < 1.5  # made values were in the real parameters
    assert model.proj.weight.unique().tolist() == [7]
