"""Whether a vLLM uses our backend."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm import backend


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        (SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="weightsync")), True),
        (SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="nccl")), False),
        (SimpleNamespace(weight_transfer_config=None), False),
        (SimpleNamespace(), False),
        (None, False),
    ],
)
def test_the_user_chooses(config: Any, chosen: bool) -> None:
    assert backend.chosen(config) is chosen
