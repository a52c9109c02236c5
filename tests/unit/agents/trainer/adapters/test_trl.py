"""TRL's protocol, spoken as TRL 1.16.0 speaks it."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_ranks import CONFIG
from weightsync.agents.trainer.adapters.trl import WeightsyncTransfer
from weightsync.agents.trainer.publication import PublishError

PROTOCOL = {
    "init_weight_transfer": ["self"],
    "pause": ["self"],
    "send_weights": ["self", "iterator"],
    "resume": ["self"],
    "destroy": ["self"],
}
"""WeightTransferProtocol of 1.16.0 (trl/experimental/async_grpo/async_grpo_trainer.py): methods and arguments."""


def transfer(folder: Path, **more: int) -> WeightsyncTransfer:
    token = folder / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    given = {"hub_url": "ws://127.0.0.1:9/agents", "run_id": "r", "run_dir": folder, "model_config": CONFIG}
    return WeightsyncTransfer(token_file=token, **given, **more)


def test_it_has_the_protocols_methods() -> None:
    found = {name: list(inspect.signature(getattr(WeightsyncTransfer, name)).parameters) for name in PROTOCOL}
    assert found == PROTOCOL


@pytest.mark.parametrize("first", [1, 8])
def test_each_sending_is_a_version_and_the_stream_is_read_to_its_end(first: int, tmp_path: Path) -> None:
    trainer, passed = transfer(tmp_path, first_step=first), []

    def codes() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b"):
            yield name, torch.ones(2, dtype=torch.uint8)
            passed.append(name)

    trainer.init_weight_transfer()
    trainer.pause()
    for step in (first, first + 1):
        with pytest.raises(PublishError, match=rf"step {step} .*'a' is uint8; "):
            trainer.send_weights(codes())
        assert trainer.step == step
    trainer.resume()
    trainer.destroy()
    trainer.destroy()
    assert passed == ["a", "b", "a", "b"]
